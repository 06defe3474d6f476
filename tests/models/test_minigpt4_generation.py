"""MiniGPT-4 generates what its language model does from the original's embeddings: beams, sampling, ragged, fused and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_fast.models.minigpt4 import MiniGPT4ForConditionalGeneration
from tests.families.instruments import fused
from tests.models.minigpt4_models import (
    IMAGE,
    QUERIES,
    config,
    inputs,
    llama,
    minigpt4,
    original_files,
    original_rows,
    padded_left,
    write_files,
)

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LENGTH = inputs()["input_ids"].shape[1]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sequences": {"num_beams": 4, "num_return_sequences": 2},
    # As the original's chat, where the prompt's words count for nothing.
    "penalty": {"repetition_penalty": 1.5},
    "sampling": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3},
}
wraps = pytest.mark.parametrize("wrap", [lambda model: model, lambda model: fused(model)], ids=["unfused", "fused"])


def original_embeddings(model: Any, files: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as the original puts it together: sample by sample, piece by piece, zeros on the left."""
    images = iter(original_rows(files, given["pixel_values"]).float())
    words, samples = model.get_input_embeddings().weight, []
    for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
        pieces, position, own = [], 0, ids[mask.bool()]
        while position < len(own):
            is_image = own[position] == IMAGE
            pieces.append(next(images) if is_image else words[own[position]][None])
            position += len(pieces[-1])
        samples.append(torch.cat(pieces))
    return padded_left(samples)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@wraps
def test_generation(tmp_path: Path, wrap: Any, settings: dict[str, Any]) -> None:
    files, given = original_files(), inputs()
    model = MiniGPT4ForConditionalGeneration.from_original(**write_files(tmp_path, files, llama()), config=config())
    batch = original_embeddings(model, files, given)
    torch.manual_seed(5)
    expected = model.language_model.generate(**batch, **GREEDY | settings)
    ours, seen = wrap(model), []
    ours.vision_model.register_forward_hook(lambda module, args, output: seen.append(len(output.last_hidden_state)))
    torch.manual_seed(5)
    out = ours.generate(**given, **GREEDY | settings)
    assert torch.equal(out[:, LENGTH:], expected)
    prompt = given["input_ids"].masked_fill(given["input_ids"] == IMAGE, 1)
    assert torch.equal(out[:, :LENGTH], prompt.repeat_interleave(len(out) // len(prompt), dim=0))
    assert seen == [5], "images are encoded once, before the beams"
    assert len({tuple(row) for row in out[:, LENGTH:].tolist()}) >= 4, "the samples differ"


@wraps
def test_alone_and_together(wrap: Any) -> None:
    """A sample generates in a batch, padded on the left, what it generates by itself; without Q-Former too."""
    for has_qformer in (True, False):
        model = wrap(minigpt4(has_qformer=has_qformer))
        given = inputs(model.config.rows_per_image)
        together = model.generate(**given, **GREEDY)
        first = 0
        for row, count in enumerate((2, 1, 0, 2)):
            pixels = given["pixel_values"][first : first + count] if count else None
            own = given["input_ids"][row : row + 1, given["attention_mask"][row].bool()]
            assert torch.equal(model.generate(own, pixels, **GREEDY)[0, -5:], together[row, -5:])
            first += count


def test_images_of_a_conversation_are_encoded_once() -> None:
    """What `get_image_features` gave serves every turn; images may have a dimension for the sample."""
    model, given = fused(minigpt4()), inputs()
    expected = model.generate(**given, **GREEDY)
    rows = model.get_image_features(given["pixel_values"]).pooler_output
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, image_features=rows, **GREEDY), expected)
    two = {name: value[3:] for name, value in text.items()}
    again = model.generate(**two, pixel_values=given["pixel_values"][None, 3:], **GREEDY)
    assert torch.equal(again, expected[3:])


def test_output_and_stops() -> None:
    model, given = minigpt4(), inputs()
    first = model.generate(**given, **GREEDY | {"max_new_tokens": 1})[0, -1].item()
    out = model.generate(**given, **GREEDY | {"eos_token_id": first}, return_dict_in_generate=True, output_scores=True)
    assert out.sequences[0, LENGTH:].tolist() == [first, *[0] * (out.sequences.shape[1] - LENGTH - 1)]
    assert out.scores[0].shape == (4, 108)
    limited = model.generate(
        **given, **{k: v for k, v in GREEDY.items() if k != "max_new_tokens"}, max_length=LENGTH + 2
    )
    assert limited.shape == (4, LENGTH + 2)
    assert model.generation_config.eos_token_id == 2


def test_the_language_model_alone() -> None:
    model, text = minigpt4(), torch.tensor([[1, 5, 6]])
    assert torch.equal(model.generate(text, **GREEDY), model.language_model.generate(text, **GREEDY))
    embeddings = model.embed_prompt(inputs()["input_ids"][2:3])
    mask = inputs()["attention_mask"][2:3]
    assert model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY).shape == (1, 5)
    with pytest.raises(ValueError, match=f"hold {QUERIES} image tokens"):
        model.generate(torch.tensor([[1, *[IMAGE] * QUERIES]]), **GREEDY)

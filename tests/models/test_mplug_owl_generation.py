"""mPLUG-Owl generates: beams, sampling, left padding, caches, over any language model, fused and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.instruments import fused
from tests.models.mplug_owl_models import IMAGE, QUERIES, ROWS, TEXTS, VISION, inputs, original_embeddings, owl

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LENGTH = inputs()["input_ids"].shape[1]


wraps = pytest.mark.parametrize("wrap", [lambda m: m, fused], ids=["unfused", "fused"])


def encoded(model: Any) -> list[int]:
    """Grows by the number of images whenever the vision model runs."""
    seen: list[int] = []
    model.vision_model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


def by_hand(model: Any, given: dict[str, Tensor], new: int) -> Tensor:
    """Greedy continuation by the original's embeddings and whole passes of the language model: no cache, no `generate`."""
    embeddings, mask = original_embeddings(model, given), given["attention_mask"]
    chosen = []
    for _ in range(new):
        positions = mask.cumsum(1).sub(1).clamp(min=0)
        logits = model.language_model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).logits
        chosen.append(logits[:, -1].argmax(dim=-1))
        embeddings = torch.cat((embeddings, model.get_input_embeddings()(chosen[-1])[:, None]), dim=1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return torch.stack(chosen, dim=1)


@wraps
def test_greedy(wrap: Any) -> None:
    model, given = owl(), inputs()
    with torch.no_grad():
        expected = by_hand(model, given, 5)
    ours = wrap(model)
    seen = encoded(ours)
    out = ours.generate(**given, **GREEDY)
    assert torch.equal(out[:, LENGTH:], expected)
    assert torch.equal(out[:, :LENGTH], given["input_ids"].masked_fill(given["input_ids"] == IMAGE, 1))
    assert seen == [3]
    assert len({tuple(row) for row in expected.tolist()}) == 3, "the samples differ"


@wraps
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams(wrap: Any, settings: dict[str, int]) -> None:
    model, given = owl(), inputs()
    expected = model.language_model.generate(
        inputs_embeds=original_embeddings(model, given), attention_mask=given["attention_mask"], **GREEDY, **settings
    )
    ours = wrap(model)
    seen = encoded(ours)
    assert torch.equal(ours.generate(**given, **GREEDY, **settings)[:, LENGTH:], expected)
    assert seen == [3], "images are encoded before they would be repeated for the beams"


@wraps
def test_sampling(wrap: Any) -> None:
    model, given = owl(), inputs()
    settings = GREEDY | {"do_sample": True, "num_return_sequences": 3, "top_k": 4}
    torch.manual_seed(5)
    out = wrap(model).generate(**given, **settings)
    torch.manual_seed(5)
    expected = model.language_model.generate(
        inputs_embeds=original_embeddings(model, given), attention_mask=given["attention_mask"], **settings
    )
    assert torch.equal(out[:, LENGTH:], expected)


@pytest.mark.filterwarnings("ignore:Passing `")
def test_processors_of_earlier_tokens() -> None:
    """They index the vocabulary by earlier tokens, and are never shown an image token."""
    model, given = owl(), inputs()
    ids, pixels = given["input_ids"][:1], given["pixel_values"][:2]
    for settings in ({"repetition_penalty": 100.0}, {"no_repeat_ngram_size": 1}):
        new = model.generate(ids, pixels, **GREEDY | {"max_new_tokens": 12}, **settings)[0, LENGTH:].tolist()
        assert len(set(new)) == len(new)
    plain = model.generate(ids, pixels, **GREEDY | {"max_new_tokens": 12})[0, LENGTH:].tolist()
    assert len(set(plain)) < len(plain)


@pytest.mark.parametrize("text", TEXTS)
def test_language_models(text: str) -> None:
    """A sample generates in a batch, padded on the left, what it generates by itself."""
    model, given = fused(owl(text)), inputs()
    together = model.generate(**given, **GREEDY)
    first = 0
    for row, count in enumerate((2, 1, 0)):
        mask = given["attention_mask"][row].bool()
        pixels = given["pixel_values"][first : first + count] if count else None
        alone = model.generate(given["input_ids"][row : row + 1, mask], pixels, **GREEDY)
        assert torch.equal(alone[0, -5:], together[row, -5:])
        first += count


def test_it_stops_and_returns_what_is_asked_for() -> None:
    model, given = owl(), inputs()
    first = model.generate(**given, **GREEDY | {"max_new_tokens": 1})[0, -1].item()
    out = model.generate(**given, **GREEDY | {"eos_token_id": first}, return_dict_in_generate=True, output_logits=True)
    assert out.sequences[0, LENGTH:].tolist() == [first, *[0] * (out.sequences.shape[1] - LENGTH - 1)]
    assert out.logits[0].shape == (3, 60)
    assert model.generation_config.eos_token_id == 2, "as the language model's configuration says"


def test_text_alone_and_embeddings() -> None:
    model, given = owl(), inputs()
    text = torch.tensor([[1, 5, 6]])
    assert torch.equal(model.generate(text, **GREEDY), model.language_model.generate(text, **GREEDY))
    rows = model.get_image_features(given["pixel_values"]).pooler_output
    expected = model.generate(**given, **GREEDY)
    ids, mask = given["input_ids"], given["attention_mask"]
    assert torch.equal(model.generate(ids, attention_mask=mask, image_features=rows, **GREEDY), expected)
    embeddings = model.embed_prompt(ids, image_features=rows)
    out = model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert torch.equal(out, expected[:, LENGTH:])


def test_a_second_turn_with_another_image() -> None:
    """Tokens and images after a cache see what is in it."""
    model, pixels = owl(), inputs()["pixel_values"]
    image = [IMAGE] * ROWS
    whole = torch.tensor([[1, *image, 5, 6, *image, 7]])
    expected = model(whole, pixels[:2]).logits[:, -2:]
    cut = 1 + ROWS + 2
    before = model(whole[:, :cut], pixels[:1], use_cache=True)
    after = model(whole[:, cut:], pixels[1:2], past_key_values=before.past_key_values)
    torch.testing.assert_close(after.logits[:, -2:], expected, atol=1e-4, rtol=1e-4)
    # A step after it has no image, and does not ask whether its token is one.
    step = model(torch.tensor([[8]]), past_key_values=after.past_key_values).logits
    longer = model(torch.cat((whole, torch.tensor([[8]])), dim=1), pixels[:2]).logits[:, -1:]
    torch.testing.assert_close(step, longer, atol=1e-4, rtol=1e-4)


def test_one_row_of_queries_serves_all_images() -> None:
    """Queries are one row in memory, and rows of images do not depend on what else is in the batch."""
    model = fused(owl())
    shapes: list[tuple[int, ...]] = []
    model.abstractor.register_forward_pre_hook(lambda module, args: shapes.append(args[0].stride()))
    together = model.get_image_features(inputs()["pixel_values"]).pooler_output
    assert shapes == [(0, VISION, 1)]
    alone = model.get_image_features(inputs()["pixel_values"][1:2]).pooler_output
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    assert together.shape[1] == QUERIES + 1

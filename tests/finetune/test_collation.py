"""Batches of every system: what is supervised is the caption and its end, and the loss is the one computed by hand."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mllm_fast.finetune import can_skip_logits, language_model_loss
from mllm_fast.finetune.collation import IGNORED, DecoderCollator, collator_for
from mllm_fast.finetune.data import DataError, Sample
from mllm_fast.models.minigpt4_processing import MiniGPT4Processor
from tests.families import llava_models, qformers
from tests.finetune import systems
from tests.models import minigpt4_models, mplug_owl_models

ENDS = {"flamingo": " <|endofchunk|>", "minigpt4": "###", "blip2-t5": " <bos>", "instructblip-t5": " <bos>"}
# The token of an image, and how often it stands in `input_ids`.
PLACES = {
    "flamingo": (5, 1),
    "blip2-opt": (qformers.IMAGE_TOKEN, qformers.QUERIES),
    "instructblip": (qformers.IMAGE_TOKEN, qformers.QUERIES),
    "llava": (llava_models.IMAGE_TOKEN, llava_models.PATCHES),
    "minigpt4": (-1, minigpt4_models.QUERIES),
    "mplug-owl": (-1, mplug_owl_models.ROWS),
}


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def by_hand(model: Any, batch: dict[str, Tensor], rows: int) -> Tensor:
    """Mean of -log p of each supervised token, one row at a time and one token after another, without labels."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    if model.config.get_text_config(decoder=True).is_encoder_decoder:
        start = torch.full((rows, 1), model.config.text_config.decoder_start_token_id)
        given["decoder_input_ids"] = torch.cat((start, batch["labels"][:, :-1].clamp_min(0)), 1)
        targets = batch["labels"]
    else:
        targets = torch.cat((batch["labels"][:, 1:], batch["labels"].new_full((rows, 1), IGNORED)), 1)
    logits = model(**given).logits[:, -targets.shape[1] :].double()
    losses = [
        logits[row, place].logsumexp(0) - logits[row, place, token]
        for row in range(rows)
        for place, token in enumerate(targets[row].tolist())
        if token != IGNORED
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_the_caption_and_its_end_are_supervised_and_nothing_else(name: str) -> None:
    model, processor = systems.SYSTEMS[name]()
    model = model.double()
    samples = systems.samples()
    collate = collator_for(model, processor, prompt="what is")
    batch = collate(samples)
    end = ENDS.get(name, " <eos>")
    for row, sample in zip(batch["labels"], samples, strict=True):
        assert processor.tokenizer.decode(row[row != IGNORED]).strip() == sample.caption + end
    ids, labels = batch["input_ids"], batch["labels"]
    if name in PLACES:
        token, count = PLACES[name]
        assert ((ids == token).sum(1) == count).all()
        assert (labels[ids == token] == IGNORED).all()
        supervised = labels != IGNORED
        assert torch.equal(labels[supervised], ids[supervised])
        # Padding is on the right, and the last real token is the caption's end.
        lengths = batch["attention_mask"].sum(1)
        assert torch.equal(supervised.flip(1).long().argmax(1), ids.shape[1] - lengths)
    assert batch["pixel_values"].dtype == torch.float64
    assert pickle.loads(pickle.dumps(collate))(samples)["labels"].equal(labels)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_the_loss_is_the_one_computed_by_hand(name: str) -> None:
    model, processor = systems.SYSTEMS[name]()
    model = model.double()
    samples = systems.samples()
    collate = collator_for(model, processor, prompt="what is")
    alone = [doubled(collate([sample])) for sample in samples]
    hand = [by_hand(model, batch, 1) for batch in alone]
    counts = [int((batch["labels"] != IGNORED).sum()) for batch in alone]
    expected = sum(h * n for h, n in zip(hand, counts, strict=True)) / sum(counts)
    batch = doubled(collate(samples))
    torch.testing.assert_close(by_hand(model, batch, 3), expected, rtol=1e-9, atol=1e-9)
    # transformers computes losses in fp32.
    torch.testing.assert_close(model(**batch).loss.double(), expected, rtol=1e-5, atol=1e-5)
    model.requires_grad_(False)
    assert can_skip_logits(model)
    torch.testing.assert_close(language_model_loss(model, batch).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_a_prompt_of_a_sample_comes_before_the_stages_own(name: str) -> None:
    model, processor = systems.SYSTEMS[name]()
    first, second, third = systems.samples()
    collate = collator_for(model, processor, prompt="describe the image.")
    asked = Sample(first.images, first.caption, "describe the image.")
    assert torch.equal(collate([first])["input_ids"], collate([asked])["input_ids"])
    assert collate([third])["input_ids"].shape[1] < collate([Sample(third.images, third.caption)])["input_ids"].shape[1]
    short = collator_for(model, processor, max_caption_tokens=2)([second])
    assert int((short["labels"] != IGNORED).sum()) == 2


def test_a_plain_prompt_is_the_image_alone() -> None:
    model, processor = systems.llava()
    ids = collator_for(model, processor, plain=True)(systems.samples(1))["input_ids"][0]
    assert processor.tokenizer.decode(ids) == "<image> <image> <image> <image> a picture of this? <eos>"


def test_minigpt4_has_the_originals_template() -> None:
    model, processor = systems.minigpt4()
    sample = systems.samples(2)[1]
    ids = collator_for(model, processor)([sample])["input_ids"][0]
    text = "###Human: <Img><ImageHere></Img> describe the image. ###Assistant: "
    prompt = processor(list(sample.images), text)["input_ids"][0]
    assert torch.equal(ids[: len(prompt)], prompt)
    assert isinstance(processor, MiniGPT4Processor)


def test_stage_1_pairs_a_text_with_its_picture() -> None:
    model, processor = systems.blip2_stage1()
    samples = systems.samples()
    collate = collator_for(model, processor)
    batch = collate(samples)
    tokenizer = processor.tokenizer
    texts = [
        tokenizer.decode(row[mask.bool()])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == [
        "[CLS] a picture of this? [SEP]",
        "[CLS] describe the image. the image. [SEP]",
        "[CLS] what is the picture of the image. [SEP]",
    ]
    own = processor.image_processor(samples[2].images[0], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][2], own)
    assert set(model(**batch)) >= {"loss", "itc", "itm", "itg"}
    short = collator_for(model, processor, max_caption_tokens=5)(samples)["input_ids"]
    assert short.shape == (3, 5)
    assert short[:, -1].eq(model.eos_token_id).all()
    two = Sample(samples[0].images * 2, "the image.")
    with pytest.raises(DataError, match="has 2 pictures; stage 1"):
        collate([two])
    model.eos_token_id = 9
    with pytest.raises(ValueError, match=r"ends texts with token 2, the model with 9"):
        collator_for(model, processor)(samples)


def test_several_pictures_a_sample() -> None:
    for name in ("flamingo", "llava", "minigpt4", "mplug-owl"):
        model, processor = systems.SYSTEMS[name]()
        one, two = systems.samples(2)
        both = Sample((*one.images, *two.images), one.caption)
        batch = collator_for(model, processor)([two, both])
        token, count = PLACES[name]
        assert (batch["input_ids"] == token).sum(1).tolist() == [count, 2 * count]
        assert torch.isfinite(model(**batch).loss)
    model, processor = systems.SYSTEMS["blip2-opt"]()
    with pytest.raises(DataError, match="has 2 pictures; blip-2 reads one a caption"):
        collator_for(model, processor)([both])


def subwords(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers that write the space before a word into it: as GPT-2's, and as LLaMA's."""
    space = "Ġ" if kind == "bytes" else "▁"
    words = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz:.", space, "ca", "cat", f"{space}cat"]
    merges = [("c", "a"), ("ca", "t"), (space, "cat")]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    core.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if kind == "bytes" else pre_tokenizers.Metaspace()
    )
    core.decoder = decoders.ByteLevel() if kind == "bytes" else decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Words:
    """A processor that is a tokenizer, and puts bos before a text and eos behind it."""

    image_token = "<image>"
    chat_template = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, images: Any, text: list[str], **kwargs: Any) -> dict[str, Tensor]:
        rows = [[0, *self.tokenizer(t, add_special_tokens=False)["input_ids"], 1] for t in text]
        mask = torch.tensor([[1] * len(row) + [0] * (40 - len(row)) for row in rows])
        return {"input_ids": torch.tensor([row + [2] * (40 - len(row)) for row in rows]), "attention_mask": mask}


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize(("prompt", "said"), [("a", "a cat"), ("a:", "a: cat"), ("", "cat"), ("a ", "a cat")])
def test_a_caption_is_tokenised_as_it_stands_behind_its_prompt(kind: str, prompt: str, said: str) -> None:
    tokenizer = subwords(kind)
    collate = DecoderCollator(Words(tokenizer), "blip-2", 1, prompt)
    batch = collate([Sample((systems.picture(0),), "cat")])
    ids = batch["input_ids"][0].tolist()
    known = tokenizer.get_vocab()
    # The prompt is what the model is asked with (without the end that this processor puts), and the rest is learned.
    asked = [0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    assert ids[: len(asked)] == asked
    spaced = known["▁cat"] if kind == "metaspace" else known["Ġcat"]
    bare = kind == "bytes" and (not prompt or prompt == "a ")
    assert ids[len(asked) :] == [known["cat"] if bare else spaced, 1]
    assert batch["labels"][0].tolist() == [IGNORED] * len(asked) + ids[len(asked) :]
    if not (kind == "metaspace" and prompt == "a "):  # which writes the space that is there, and one of its own
        assert tokenizer.decode(ids[1:-1]).strip() == said


def test_what_it_refuses() -> None:
    model, processor = systems.llava()
    sample = Sample(systems.samples(1)[0].images, "the <image> image.")
    with pytest.raises(DataError, match="holds <image>; leave it out"):
        collator_for(model, processor)([sample])
    from tests.families import blip_models

    with pytest.raises(ValueError, match=r"no collation is known for BlipFor.*Known: blip-2, flamingo"):
        collator_for(blip_models.model(), processor)
    with pytest.raises(ValueError, match="no recipe"):
        collator_for(torch.nn.Linear(2, 2), processor)

"""mPLUG-Owl's processor: prompts are cut at the image token, and pictures go with them; from its files and the original's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoProcessor, PreTrainedTokenizerFast

from mllm_fast.models.mplug_owl import MplugOwlProcessor
from mllm_fast.models.mplug_owl_processing import MplugOwlImageProcessor
from tests.models.mplug_owl_models import IMAGE, ROWS, owl

WORDS = ["<unk>", "<s>", "</s>", *["a", "b", "c", "d", "Human", "AI", ":", "question", "The"]]
# Of the released model.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def processor(**options: Any) -> MplugOwlProcessor:
    size = {"height": 28, "width": 28}
    images = MplugOwlImageProcessor(size=size, crop_size=size, do_center_crop=False)
    return MplugOwlProcessor(images, tokenizer(), rows_per_image=ROWS, **options)


def picture(shade: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, (shade, 2 * shade, 0))


def ids(*words: str) -> list[int]:
    return [i for word in words for i in ([IMAGE] * ROWS if word == "<image>" else [WORDS.index(word)])]


def test_prompts_and_pictures() -> None:
    text = ["a <image> b <image><image> c", "<image>d", "a b"]
    out = processor()([picture(i) for i in (10, 20, 30, 40)], text)
    rows = [
        ids("<s>", "a", "<image>", "b", "<image>", "<image>", "c"),
        ids("<s>", "<image>", "d"),
        ids("<s>", "a", "b"),
    ]
    length = len(rows[0])
    assert out["input_ids"].tolist() == [[0] * (length - len(row)) + row for row in rows]
    assert out["attention_mask"].tolist() == [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    expected = [
        [(value / 255 - m) / s for value, m, s in zip((i, 2 * i, 0), MEAN, STD, strict=True)] for i in (10, 20, 30, 40)
    ]
    assert out["pixel_values"].shape == (4, 3, 28, 28)
    torch.testing.assert_close(out["pixel_values"][:, :, 14, 14], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    right = processor()(None, ["a b", "c"], padding_side="right", add_special_tokens=False)
    assert right["input_ids"].tolist() == [ids("a", "b"), [*ids("c"), 0]]
    assert "pixel_values" not in right


def test_pictures_by_prompt_or_alone() -> None:
    p = processor()
    flat = p([picture(10), picture(20)], ["<image> a", "b <image>"])
    nested = p([[picture(10)], [picture(20)]], ["<image> a", "b <image>"])
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert torch.equal(flat["input_ids"], nested["input_ids"])
    assert p(picture(10), "<image>")["pixel_values"].shape == (1, 3, 28, 28)
    assert p([[picture(1)], []], ["<image>", "a"])["pixel_values"].shape == (1, 3, 28, 28)
    assert list(p(np.zeros((30, 30, 3), dtype=np.uint8))) == ["pixel_values"]
    assert list(p([], ["a"])) == ["input_ids", "attention_mask"]


def test_what_does_not_match() -> None:
    p = processor()
    with pytest.raises(
        ValueError, match="hold 1, 2 times <image>, but 2 images were given; write <image> once for each"
    ):
        p([picture(1), picture(2)], ["<image>", "<image> <image>"])
    with pytest.raises(ValueError, match="hold 1, 1 times <image>, but 2, 0 images were given"):
        p([[picture(1), picture(2)], []], ["<image>", "<image>"])
    with pytest.raises(ValueError, match="hold 1 times <image>, but 0 images were given"):
        p(None, "<image>")
    with pytest.raises(ValueError, match="neither images nor text"):
        p()


def test_conversations() -> None:
    p = processor()
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a b"}]}
    turns = [asked, {"role": "assistant", "content": "c d"}, {"role": "user", "content": "d"}]
    introduction = (
        "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions.\n"
    )
    first = "Human: <image>\nHuman: <image>\nHuman: a b\n"
    assert p.apply_chat_template(turns[:1], add_generation_prompt=True) == introduction + first + "AI: "
    assert p.apply_chat_template(turns) == introduction + first + "AI: c d\nHuman: d\n"
    system = {"role": "system", "content": "The question"}
    assert p.apply_chat_template([system, *turns[2:]]) == "The question\nHuman: d\n"
    assert "Human: [X]\n" in processor(image_token="[X]").apply_chat_template(turns)


def test_it_feeds_the_model() -> None:
    p, model = processor(), owl()
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a b"}]}
    batch = p([picture(10), picture(20)], [p.apply_chat_template([asked], add_generation_prompt=True), "<s> c"])
    assert batch["input_ids"].eq(IMAGE).sum() == 2 * ROWS
    out = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, batch["input_ids"].shape[1] + 3)
    text = p.batch_decode(out.clamp(max=len(WORDS) - 1), skip_special_tokens=True)
    assert text[1].startswith("c")


def test_save_and_load(tmp_path: Path) -> None:
    p = processor(image_token="<|image|>", image_token_id=-7)
    p.save_pretrained(tmp_path)
    owl().config.save_pretrained(tmp_path)
    expected = p(picture(10), "a <|image|> b")
    for again in (MplugOwlProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is MplugOwlProcessor
        found = again(picture(10), "a <|image|> b")
        assert found["input_ids"].eq(-7).sum() == ROWS
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_originals_files(tmp_path: Path) -> None:
    """Its image processor and processor have names of their own, and it says nothing of the image token."""
    tokenizer().save_pretrained(tmp_path)
    owl().config.save_pretrained(tmp_path)
    settings = {
        "crop_size": {"height": 28, "width": 28}, "do_center_crop": False, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "feature_extractor_type": "MplugOwlImageProcessor", "image_mean": MEAN,
        "image_processor_type": "MplugOwlImageProcessor", "image_std": STD, "processor_class": "MplugOwlProcessor",
        "resample": 3, "size": {"height": 28, "width": 28},
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    p = AutoProcessor.from_pretrained(tmp_path)
    assert type(p) is MplugOwlProcessor
    assert type(p.image_processor) is MplugOwlImageProcessor
    out = p(picture(10), "a <image>")
    assert out["input_ids"].tolist() == [[*ids("<s>", "a"), *[-1] * 65]]
    assert torch.equal(out["pixel_values"], processor()(picture(10))["pixel_values"])

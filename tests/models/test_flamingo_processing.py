"""Flamingo's processor: one token an image, padding for ragged images and videos, and back from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_fast.models import FlamingoForConditionalGeneration, FlamingoProcessor
from mllm_fast.pipeline import Pipeline
from tests.models.flamingo_models import config

WORDS = ["<unk>", "<s>", "</s>", "Output", ":", "a", "cat", "dog", "what", "?"]
CHUNK, IMAGE, PAD = len(WORDS), len(WORDS) + 1, len(WORDS) + 2


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def processor() -> Any:
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return FlamingoProcessor(pictures, FlamingoProcessor.prepare_tokenizer(tokenizer()))


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (20, 30), (shade, shade, shade))


def shades(pixels: torch.Tensor) -> torch.Tensor:
    """What shade each picture had; 0 where there is none."""
    mean, std = 0.48145466, 0.26862954  # of CLIP's first channel
    values = (pixels[..., 0, 8, 8] * std + mean) * 255
    return torch.where(pixels.flatten(-3).any(-1), values, 0).round().long()


def test_prompts_and_pictures() -> None:
    text = ["<image>Output: a cat<|endofchunk|><image>Output:", "what? <image>", "a dog"]
    out = processor()([picture(10), picture(20), picture(30)], text)
    first = [IMAGE, 3, 4, 5, 6, CHUNK, IMAGE, 3, 4]
    rows = [first, [PAD] * 6 + [8, 9, IMAGE], [PAD] * 7 + [5, 7]]
    assert out["input_ids"].tolist() == rows
    assert out["attention_mask"].tolist() == [[int(i != PAD) for i in row] for row in rows]
    assert out["image_mask"].tolist() == [[1, 1], [1, 0], [0, 0]]
    assert shades(out["pixel_values"]).tolist() == [[10, 20], [30, 0], [0, 0]]
    nested = processor()([[picture(10), picture(20)], [picture(30)], []], text)
    assert all(torch.equal(nested[name], out[name]) for name in out)
    assert set(out) == set(processor().model_input_names)
    right = processor()(None, text=["a", "a dog"], padding_side="right")
    assert right["input_ids"].tolist() == [[5, PAD], [5, 7]] and "pixel_values" not in right
    assert processor().batch_decode(out["input_ids"], skip_special_tokens=True)[1] == "what ?"


def test_videos_beside_pictures() -> None:
    video = [picture(shade) for shade in (1, 2, 3)]
    out = processor()([[picture(10), video], [[picture(20), picture(30)]]], ["<image><image>", "<image>a"])
    assert out["image_mask"].tolist() == [[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]]
    assert shades(out["pixel_values"]).tolist() == [[[10, 0, 0], [1, 2, 3]], [[20, 30, 0], [0, 0, 0]]]
    assert processor()([[video]], "<image>")["pixel_values"].shape == (1, 1, 3, 3, 16, 16)


def test_pictures_alone() -> None:
    out = processor()([picture(10), picture(20)])
    assert shades(out["pixel_values"]).tolist() == [[10], [20]]
    assert set(out) == {"pixel_values", "image_mask"}


def test_saved_with_the_model_and_used_by_the_pipeline(tmp_path: Path) -> None:
    p = processor()
    p.save_pretrained(tmp_path)
    model = FlamingoForConditionalGeneration(config(image_token_id=p.image_token_id)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, FlamingoProcessor)
    given = ([[picture(1)], [picture(2), picture(3)]], ["<image>a", "<image><image>what?"])
    expected = p(*given)
    assert all(torch.equal(value, expected[name]) for name, value in loaded(*given).items())
    inputs = Pipeline(model, loaded).inputs([picture(1), picture(2)], "a cat")
    assert inputs["input_ids"].tolist() == [[IMAGE, IMAGE, 5, 6]]
    assert Pipeline(model, loaded).generate([picture(1)], "a", max_new_tokens=2, do_sample=False)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
    ]
    assert loaded.apply_chat_template(chat) == "<image>what?a cat<|endofchunk|>"


def test_clear_errors() -> None:
    p = processor()
    with pytest.raises(ValueError, match=r"1, 0 times <image>, but 2 images"):
        p([picture(1), picture(2)], ["<image>", "a"])
    with pytest.raises(ValueError, match=r"1, 1 times <image>, but 2, 0 images"):
        p([[picture(1), picture(2)], []], ["<image>", "<image>"])
    with pytest.raises(ValueError, match="the tokenizer has no token '<image>'"):
        FlamingoProcessor(p.image_processor, tokenizer())

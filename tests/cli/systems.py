"""Tiny models with their processors in a folder, as a user has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Processor,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    InstructBlipProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tests.families import blip_models, llava_models, qformers

WORDS = ("describe", "the", "image.", "what", "is", "this?", "USER:", "ASSISTANT:", "a", "picture", "of")
SIZE = {"height": 28, "width": 28}
PIXELS = {"do_resize": True, "do_center_crop": False, "size": SIZE}


def tokenizer(vocabulary: int, special: dict[str, int]) -> PreTrainedTokenizerFast:
    """One token a word, `special` tokens at their ids, and a word for every other id."""
    by_id = {0: "<pad>", 1: "<bos>", 2: "<eos>", 3: "<unk>"} | {i: name for name, i in special.items()}
    words = iter(WORDS)
    vocab = {by_id.get(i) or next(words, f"word{i}"): i for i in range(vocabulary)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=list(special), padding_side="left",
    )  # fmt: skip


def llava(folder: Path) -> None:
    model = llava_models.model()
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(**PIXELS),
        tokenizer(100, {"<image>": llava_models.IMAGE_TOKEN}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def _qformer(name: str, processor: Any, folder: Path, **more: Any) -> None:
    model = qformers.generator(name)
    model.save_pretrained(folder)
    processor(
        BlipImageProcessor(size=SIZE),
        tokenizer(100, {"<image>": qformers.IMAGE_TOKEN}),
        num_query_tokens=qformers.QUERIES,
        **more,
    ).save_pretrained(folder)


def blip2(folder: Path) -> None:
    _qformer("blip2", Blip2Processor, folder)


def instructblip(folder: Path) -> None:
    _qformer("instructblip", InstructBlipProcessor, folder, qformer_tokenizer=tokenizer(60, {}))


def blip(folder: Path) -> None:
    model = blip_models.model()
    model.save_pretrained(folder)
    size = model.config.vision_config.image_size
    vocabulary = model.config.text_config.vocab_size
    BlipProcessor(BlipImageProcessor(size={"height": size, "width": size}), tokenizer(vocabulary, {})).save_pretrained(
        folder
    )


SYSTEMS: dict[str, Callable[[Path], None]] = {
    "llava": llava,
    "blip2": blip2,
    "instructblip": instructblip,
    "blip": blip,
}

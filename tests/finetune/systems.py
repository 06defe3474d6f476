"""Tiny models of every system that has a stage, each with its processor, and samples to train them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    InstructBlipProcessor,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_fast.finetune.data import Sample
from mllm_fast.models import FlamingoProcessor
from mllm_fast.models.blip2_stage1 import Blip2Stage1
from mllm_fast.models.mplug_owl import MplugOwlProcessor
from mllm_fast.models.mplug_owl_processing import MplugOwlImageProcessor
from tests.cli.systems import PIXELS, SIZE, tokenizer
from tests.families import llava_models, qformers
from tests.models import flamingo_models, minigpt4_models, mplug_owl_models

# Words that every tokenizer here knows, of different numbers of tokens.
CAPTIONS = ("a picture of this?", "the image.", "what is the picture of the image.")
PROMPTS = (None, "describe the image.", "")
_FLAMINGO_IMAGE = 5
_BERT = (
    "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[DEC]", "a", "picture", "of", "this", "?", "the", "image", ".", "what", "is",
    "describe",
)  # fmt: skip


def picture(seed: int) -> Image.Image:
    """Noise, so that no two are alike."""
    pixels = torch.randint(0, 256, (30, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def samples(count: int = 3) -> list[Sample]:
    """One picture each; no prompt, a prompt, an empty one, and again."""
    return [Sample((picture(i),), CAPTIONS[i % 3], PROMPTS[i % 3]) for i in range(count)]


def llava() -> tuple[Any, Any]:
    words = tokenizer(100, {"<image>": llava_models.IMAGE_TOKEN})
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return llava_models.model(), LlavaProcessor(CLIPImageProcessor(**PIXELS), words, patch_size=14, **options)


def _qformer(name: str, language: str) -> tuple[Any, Any]:
    words = tokenizer(100, {"<image>": qformers.IMAGE_TOKEN})
    pictures, queries = BlipImageProcessor(size=SIZE), {"num_query_tokens": qformers.QUERIES}
    model = qformers.generator(name, language)
    if name == "blip2":
        return model, Blip2Processor(pictures, words, **queries)
    return model, InstructBlipProcessor(pictures, words, qformer_tokenizer=tokenizer(60, {}), **queries)


def flamingo() -> tuple[Any, Any]:
    model = flamingo_models.flamingo(image_token_id=_FLAMINGO_IMAGE)
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    words = tokenizer(flamingo_models.VOCABULARY, {"<image>": _FLAMINGO_IMAGE, "<|endofchunk|>": 6})
    return model, FlamingoProcessor(pictures, words)


def minigpt4() -> tuple[Any, Any]:
    return minigpt4_models.minigpt4(), minigpt4_models.processor()


def mplug_owl() -> tuple[Any, Any]:
    size = {"height": 28, "width": 28}
    pictures = MplugOwlImageProcessor(size=size, crop_size=size, do_center_crop=False)
    words = tokenizer(mplug_owl_models.VOCABULARY, {})
    return mplug_owl_models.owl(), MplugOwlProcessor(pictures, words, rows_per_image=mplug_owl_models.ROWS)


def blip2_stage1() -> tuple[Any, Any]:
    words = BertTokenizer(vocab={word: i for i, word in enumerate(_BERT)})
    ids = {"bos_token_id": _BERT.index("[DEC]"), "eos_token_id": _BERT.index("[SEP]")}
    model = Blip2Stage1(qformers.retrieval(), **ids).eval()
    return model, Blip2Processor(BlipImageProcessor(size=SIZE), words)


SYSTEMS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "flamingo": flamingo,
    "blip2-opt": lambda: _qformer("blip2", "opt"),
    "blip2-t5": lambda: _qformer("blip2", "t5"),
    "instructblip": lambda: _qformer("instructblip", "opt"),
    "instructblip-t5": lambda: _qformer("instructblip", "t5"),
    "llava": llava,
    "minigpt4": minigpt4,
    "mplug-owl": mplug_owl,
}

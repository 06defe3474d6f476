"""Tiny models with their processors in a folder, as a user has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Processor,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    Idefics2Processor,
    IdeficsProcessor,
    InstructBlipProcessor,
    LlavaProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from mllm_fast.models import FlamingoProcessor, MplugOwlProcessor
from tests.families import blip_models, builders, llava_models, qformers, test_idefics2, test_mllama
from tests.families.upstream_versions import BEFORE_5_20
from tests.models import flamingo_models, minigpt4_models, mplug_owl_models

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


def instructblipvideo(folder: Path) -> None:
    """transformers' own processor needs torchvision, so its files are written here as it writes them."""
    qformers.generator("instructblipvideo").save_pretrained(folder)
    tokenizer(100, {"<video>": qformers.IMAGE_TOKEN}).save_pretrained(folder)
    tokenizer(60, {}).save_pretrained(folder / "qformer_tokenizer")
    frames = {"do_resize": True, "size": SIZE, "video_processor_type": "InstructBlipVideoVideoProcessor"}
    settings = {"processor_class": "InstructBlipVideoProcessor", "num_query_tokens": qformers.QUERIES}
    (folder / "processor_config.json").write_text(json.dumps(settings | {"video_processor": frames}))


def blip(folder: Path) -> None:
    model = blip_models.model()
    model.save_pretrained(folder)
    size = model.config.vision_config.image_size
    vocabulary = model.config.text_config.vocab_size
    BlipProcessor(BlipImageProcessor(size={"height": size, "width": size}), tokenizer(vocabulary, {})).save_pretrained(
        folder
    )


def idefics(folder: Path) -> None:
    model = builders.idefics()
    model.save_pretrained(folder)
    special = {"<fake_token_around_image>": 4, "<image>": 5, "<end_of_utterance>": 6}
    pictures = IdeficsImageProcessorPil(image_size=28)
    IdeficsProcessor(pictures, tokenizer(model.config.vocab_size, special), image_size=28).save_pretrained(folder)


def idefics2(folder: Path) -> None:
    test_idefics2.model().save_pretrained(folder)
    special = {"<fake_token_around_image>": 4, "<end_of_utterance>": 5, "<image>": test_idefics2.IMAGE_TOKEN}
    edges = {"shortest_edge": 28, "longest_edge": 56}
    pictures = Idefics2ImageProcessorPil(size=edges, do_image_splitting=False)
    Idefics2Processor(pictures, tokenizer(128, special), image_seq_len=test_idefics2.LATENTS).save_pretrained(folder)


def mllama(folder: Path) -> None:
    test_mllama.model().save_pretrained(folder)
    # The image token's row is behind the vocabulary, as in the released models.
    words = tokenizer(129, {"<|begin_of_text|>": 4, "<|image|>": 128})
    MllamaProcessor(MllamaImageProcessorPil(size=SIZE, max_image_tiles=4), words).save_pretrained(folder)


def flamingo(folder: Path) -> None:
    model = flamingo_models.flamingo()
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    special = {"<image>": flamingo_models.IMAGE, "<unk>": 4}
    FlamingoProcessor(pictures, tokenizer(flamingo_models.VOCABULARY, special)).save_pretrained(folder)


def minigpt4(folder: Path) -> None:
    minigpt4_models.minigpt4().save_pretrained(folder)
    minigpt4_models.processor().save_pretrained(folder)


def mplug_owl(folder: Path) -> None:
    model = mplug_owl_models.owl()
    model.save_pretrained(folder)
    words = tokenizer(mplug_owl_models.VOCABULARY, {})
    rows = mplug_owl_models.ROWS
    MplugOwlProcessor(BlipImageProcessorPil(size=SIZE), words, rows_per_image=rows).save_pretrained(folder)


# In the order of the README's table.
SYSTEMS: dict[str, Callable[[Path], None]] = {
    "flamingo": flamingo,
    "minigpt4": minigpt4,
    "mplug_owl": mplug_owl,
    "idefics": idefics,
    "idefics2": idefics2,
    "mllama": mllama,
    "llava": llava,
    "blip2": blip2,
    "instructblip": instructblip,
    "instructblipvideo": instructblipvideo,
    "blip": blip,
}
if BEFORE_5_20:  # its processor is then loaded with torchvision only, which the tests do not install
    del SYSTEMS["idefics2"]

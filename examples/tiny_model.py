"""A LLaVA of a few thousand random weights with its processor, for examples that are given no model of your own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_TOKEN = 4
PATCHES = 4


def folder(given: str | None) -> str:
    """The model that was given, or a folder with the tiny one."""
    if given is not None:
        return given
    made = Path(tempfile.mkdtemp(prefix="mllm_fast_"))
    save(made)
    print(f"no --model was given: using {made}, whose random weights answer nonsense")
    return str(made)


def save(target: Path) -> None:
    """Write model and processor as `save_pretrained` writes them."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=PATCHES
    )
    LlavaForConditionalGeneration(config).save_pretrained(target)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", "USER:", "ASSISTANT:", "describe", "the", "image."]
    vocabulary = {word: i for i, word in enumerate(words + [f"word{i}" for i in range(len(words), 128)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = {"height": 28, "width": 28}
    LlavaProcessor(
        CLIPImageProcessor(do_resize=True, do_center_crop=False, size=size),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
            additional_special_tokens=["<image>"], padding_side="left",
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(target)  # fmt: skip

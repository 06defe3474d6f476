"""A tiny LLaVA and prompts for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from tests.families.builders import randomise

# Only the second GEMM of a vision layer's network contracts over 56, so these count the layers that ran.
TEXT, VISION, FFN, IMAGE_TOKEN, VISION_LAYERS = 40, 32, 56, 90, 4
PATCHES = 4  # an image's tokens


def model(seed: int = 0, *, tower: str = "clip", **options: Any) -> LlavaForConditionalGeneration:
    vision = {
        "hidden_size": VISION, "intermediate_size": FFN, "num_hidden_layers": VISION_LAYERS, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = LlamaConfig(
        vocab_size=100, hidden_size=TEXT, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision)
        if tower == "clip"
        else SiglipVisionConfig(vision_use_head=False, **vision),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        **options,
    )
    return randomise(LlavaForConditionalGeneration(config), seed).eval()


def inputs(*, left: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Two prompts, the first of two images (one in the middle) and the second of one, and `left` padding tokens there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (2, 14), generator=generator)
    ids[0, 1 : 1 + PATCHES], ids[0, 7 : 7 + PATCHES], ids[1, 5 : 5 + PATCHES] = (IMAGE_TOKEN,) * 3
    mask = torch.ones_like(ids)
    ids[1, :left], mask[1, :left] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 28, 28, generator=generator)}

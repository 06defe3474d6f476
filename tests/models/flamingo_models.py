"""A tiny FlamingoForConditionalGeneration over several kinds of language and vision models, with nothing left at rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BioGptConfig,
    Blip2VisionConfig,
    BlipVisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MetaClip2VisionConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from mllm_fast.models.flamingo_model import FlamingoForConditionalGeneration, FlamingoModelConfig
from tests.families.builders import randomise

# Widths and lengths that all differ; four patches an image.
VISION, TEXT, PAD, IMAGE, VOCABULARY = 24, 32, 0, 3, 40
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"num_hidden_layers": 4, "num_attention_heads": 4}
_VISION = {
    "hidden_size": VISION, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip

TEXTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(hidden_size=TEXT, intermediate_size=48, num_key_value_heads=2, **_SIZES, **_IDS),
    "gpt2": lambda: GPT2Config(n_embd=TEXT, n_layer=4, n_head=4, **_IDS),
    "opt": lambda: OPTConfig(hidden_size=TEXT, ffn_dim=48, word_embed_proj_dim=16, **_SIZES, **_IDS),
    "gpt_neox": lambda: GPTNeoXConfig(hidden_size=TEXT, intermediate_size=48, **_SIZES, **_IDS),
    "mpt": lambda: MptConfig(d_model=TEXT, n_layers=4, n_heads=4, expansion_ratio=2, **_IDS),
    "biogpt": lambda: BioGptConfig(hidden_size=TEXT, intermediate_size=48, **_SIZES, **_IDS),
}
VISIONS: dict[str, Callable[[], PreTrainedConfig]] = {
    "clip": lambda: CLIPVisionConfig(**_VISION),
    "siglip": lambda: SiglipVisionConfig(**_VISION),
    "vit": lambda: ViTConfig(**_VISION),
    "dinov2": lambda: Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **_VISION),
    "dinov2_plain": lambda: Dinov2Config(mlp_ratio=2, **_VISION),
    # AutoModel does not know these.
    "blip": lambda: BlipVisionConfig(**_VISION),
    "blip2": lambda: Blip2VisionConfig(**_VISION),
    "metaclip2": lambda: MetaClip2VisionConfig(**_VISION),
}


def config(text: str = "llama", vision: str = "clip", **changes: Any) -> FlamingoModelConfig:
    """Two blocks, three media tokens an image."""
    sizes = {
        "image_token_id": IMAGE, "every": 2, "latents": 3, "resampler_depth": 2, "resampler_heads": 2,
        "resampler_head_dim": 8, "heads": 2, "head_dim": 16,
    }  # fmt: skip
    return FlamingoModelConfig(VISIONS[vision](), TEXTS[text](), **{**sizes, **changes})


def flamingo(text: str = "llama", vision: str = "clip", *, seed: int = 0, **changes: Any) -> Any:
    """With every parameter drawn, in evaluation."""
    torch.manual_seed(seed)
    model = FlamingoForConditionalGeneration(config(text, vision, **changes)).eval()
    randomise(model, seed)
    return model


def prompts(seed: int = 0) -> dict[str, Tensor]:
    """Two images; one, padded left; none at all. Arguments of forward and generate."""
    ids = torch.tensor(
        [[IMAGE, 5, 6, 7, IMAGE, 8, 9], [PAD, PAD, 10, IMAGE, 11, 12, 13], [PAD, 14, 15, 16, 17, 18, 19]]
    )
    pixels = torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels, "image_mask": mask}


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample without padding of any kind."""
    kept, real = inputs["attention_mask"][row].bool(), inputs["image_mask"][row].bool()
    ids = inputs["input_ids"][row, kept][None]
    own = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return own | ({"pixel_values": inputs["pixel_values"][row, real][None]} if bool(real.any()) else {})


GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "suppress_tokens": [IMAGE],
    "eos_token_id": None,
    "pad_token_id": PAD,
}

"""Tiny multimodal models whose language models have widths that bitsandbytes serves on CPUs, too: multiples of 64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
)

from mllm_fast.quantization.selection import quantized_layers
from tests.families.builders import randomise
from tests.families.quantized_layers import exact_weight

WIDTH, FFN, IMAGE, LAYERS = 64, 128, 90, 4
_IDS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"num_hidden_layers": LAYERS, "num_attention_heads": 4}
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def llama(**options: Any) -> LlamaForCausalLM:
    return _drawn(LlamaForCausalLM(_llama(**options)))


def _llama(**options: Any) -> LlamaConfig:
    sizes = {"hidden_size": WIDTH, "intermediate_size": FFN, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**(sizes | _SIZES | _IDS | options))


def llava(**options: Any) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=_llama(**options),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return _drawn(LlavaForConditionalGeneration(config))


def blip2() -> Blip2ForConditionalGeneration:
    text = OPTConfig(
        hidden_size=WIDTH,
        ffn_dim=FFN,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=64,
        dropout=0.0,
        **_SIZES,
        **_IDS,
    )
    qformer = {
        "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
        "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    config = Blip2Config(
        vision_config=dict(_VISION),
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return _drawn(Blip2ForConditionalGeneration(config))


def idefics() -> IdeficsForVisionText2Text:
    config = IdeficsConfig(
        additional_vocab_size=0, hidden_size=WIDTH, intermediate_size=FFN, cross_layer_interval=2, alpha_type="vector",
        alpha_initializer="ones", qk_layer_norms=True, use_resampler=True, max_position_embeddings=64,
        vision_config={"embed_dim": 32, **{k: v for k, v in _VISION.items() if k != "hidden_size"}},
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
            "resampler_head_dim": 8, "qk_layer_norms_perceiver": True,
        },
        **_SIZES, **_IDS,
    )  # fmt: skip
    return _drawn(IdeficsForVisionText2Text(config))


def _drawn(model: nn.Module) -> Any:
    return randomise(model).eval()


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A prompt for two samples, the image first."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 80, (2, 10), generator=generator)
    pixels = torch.randn(2, 3, 28, 28, generator=generator).to(dtype)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "llama":
        return given
    if name == "idefics":
        return given | {"pixel_values": pixels[:, None], "image_attention_mask": torch.ones(2, 10, 1, dtype=torch.long)}
    ids[:, 1:5] = IMAGE
    return given | {"pixel_values": pixels}


SYSTEMS: dict[str, Callable[[], Any]] = {"blip2": blip2, "llava": llava, "idefics": idefics}


def dense(model: nn.Module) -> Any:
    """A copy whose quantised layers are plain linears over what they multiply with: the definition, in fp32."""
    twin = copy.deepcopy(model)
    for path, layer in quantized_layers(twin).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(exact_weight(layer, torch.float32), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        twin.set_submodule(path, plain)
    return twin.eval()

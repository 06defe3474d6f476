"""Parts of a model under LAVIS's names, written down from LAVIS's modules (Qformer.py, eva_vit.py) and not from our rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def tensors(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{p}": value for name, part in parts.items() for p, value in part.named_parameters()}


def norm(model: Any) -> dict[str, Tensor]:
    """The norm after a vision model."""
    return tensors({"ln_vision": model.post_layernorm})


def qformer(model: Any, layernorm: nn.Module, embeddings: Any = None) -> dict[str, Tensor]:
    """A Q-Former; without embeddings it has no text half. The buffer is there in any case."""
    bert = "Qformer.bert."
    parts: dict[str, nn.Module] = {f"{bert}embeddings.LayerNorm": layernorm}
    if embeddings is not None:
        parts |= {
            f"{bert}embeddings.{n}_embeddings": getattr(embeddings, f"{n}_embeddings") for n in ("word", "position")
        }
    for i, layer in enumerate(model.encoder.layer):
        at = f"{bert}encoder.layer.{i}."
        for name in ("attention", "crossattention") if layer.has_cross_attention else ("attention",):
            branch = getattr(layer, name)
            parts |= {f"{at}{name}.self.{p}": getattr(branch.attention, p) for p in ("query", "key", "value")}
            parts |= {f"{at}{name}.output.dense": branch.output.dense}
            parts |= {f"{at}{name}.output.LayerNorm": branch.output.LayerNorm}
        for suffix in ("_query",) if embeddings is None else ("", "_query"):
            up, down = getattr(layer, f"intermediate{suffix}"), getattr(layer, f"output{suffix}")
            parts |= {f"{at}intermediate{suffix}.dense": up.dense, f"{at}output{suffix}.dense": down.dense}
            parts[f"{at}output{suffix}.LayerNorm"] = down.LayerNorm
    return tensors(parts) | {f"{bert}embeddings.position_ids": torch.arange(64)[None]}


def vision(model: Any) -> dict[str, Tensor]:
    """A vision model without the norm after it. LAVIS's keys have no bias: those of `model` become zeros."""
    state = {
        "visual_encoder.cls_token": model.embeddings.class_embedding,
        "visual_encoder.pos_embed": model.embeddings.position_embedding,
    }
    parts: dict[str, nn.Module] = {"visual_encoder.patch_embed.proj": model.embeddings.patch_embedding}
    for i, layer in enumerate(model.encoder.layers):
        at = f"visual_encoder.blocks.{i}."
        q, k, v = layer.self_attn.qkv.bias.detach().chunk(3)
        k.zero_()
        state |= {f"{at}attn.qkv.weight": layer.self_attn.qkv.weight, f"{at}attn.q_bias": q, f"{at}attn.v_bias": v}
        parts |= {
            f"{at}attn.proj": layer.self_attn.projection,
            f"{at}mlp.fc1": layer.mlp.fc1,
            f"{at}mlp.fc2": layer.mlp.fc2,
        }
        parts |= {f"{at}norm1": layer.layer_norm1, f"{at}norm2": layer.layer_norm2}
    return state | tensors(parts)

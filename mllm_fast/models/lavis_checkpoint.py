"""Read the checkpoints of LAVIS, where BLIP-2 was trained first, into a `Blip2Stage1`.

LAVIS saves only what it trains: Q-Former, heads and the norm after the vision tower, and not the tower.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .blip2_stage1 import Blip2Stage1

# LAVIS's norm after the vision tower is a plain LayerNorm, transformers' has 1e-6.
LN_VISION_EPS = 1e-5

_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^query_tokens$", r"retrieval.query_tokens"),
        (r"^temp$", r"temperature"),
        (r"^(vision|text)_proj\.", r"retrieval.\1_projection."),
        (r"^itm_head\.", r"retrieval.itm_head."),
        (r"^ln_vision\.", r"retrieval.vision_model.post_layernorm."),
        (r"^Qformer\.bert\.embeddings\.LayerNorm\.", r"retrieval.qformer.layernorm."),
        (r"^Qformer\.bert\.embeddings\.", r"retrieval.embeddings."),
        (r"^Qformer\.bert\.(.*attention)\.self\.", r"retrieval.qformer.\1.attention."),
        (r"^Qformer\.bert\.", r"retrieval.qformer."),
        (r"^Qformer\.cls\.predictions\.transform\.dense\.", r"lm_head.dense."),
        (r"^Qformer\.cls\.predictions\.transform\.LayerNorm\.", r"lm_head.norm."),
        (r"^Qformer\.cls\.predictions\.bias$", r"lm_head.bias"),
        (r"^visual_encoder\.cls_token$", r"retrieval.vision_model.embeddings.class_embedding"),
        (r"^visual_encoder\.pos_embed$", r"retrieval.vision_model.embeddings.position_embedding"),
        (r"^visual_encoder\.patch_embed\.proj\.", r"retrieval.vision_model.embeddings.patch_embedding."),
        (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"retrieval.vision_model.encoder.layers.\1.layer_norm\2."),
        (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"retrieval.vision_model.encoder.layers.\1.self_attn.projection."),
        (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"retrieval.vision_model.encoder.layers.\1.self_attn."),
        (r"^visual_encoder\.blocks\.", r"retrieval.vision_model.encoder.layers."),
    )
)  # fmt: skip
# Tied to the word embeddings and to the bias, or no parameters.
_DROPPED = re.compile(r"position_ids$|^Qformer\.cls\.predictions\.decoder\.")


class LavisMismatchError(ValueError):
    """A LAVIS checkpoint does not fit the model; the message lists every difference."""


def convert_lavis(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LAVIS's parameters of stage 1 under the names of `Blip2Stage1`.

    Names that no rule knows are kept as they are, for the caller to complain about.
    """
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if _DROPPED.search(name):
            continue
        for pattern, replacement in _RULES:
            if pattern.match(name):
                converted[pattern.sub(replacement, name)] = value
                break
        else:
            converted[name] = value
    for name in [name for name in converted if name.endswith(".self_attn.q_bias")]:
        # The vision tower's keys have no bias, which transformers stores as zeros.
        q, v = converted.pop(name), converted.pop(name.replace("q_bias", "v_bias"))
        converted[name.replace("q_bias", "qkv.bias")] = torch.cat((q, torch.zeros_like(v), v))
    return converted


def load_lavis(model: Blip2Stage1, checkpoint: str | Path | Mapping[str, Tensor]) -> None:
    """Load a LAVIS stage-1 checkpoint, strictly: either everything fits, or nothing is changed.

    A checkpoint without a vision tower leaves the model's own as it is, except its last norm.

    Args:
        model: of the checkpoint's shapes; its vocabulary includes [DEC].
        checkpoint: a file as LAVIS writes it (`{"model": ...}`), or the mapping in it.

    Raises:
        LavisMismatchError: parameters are missing, unexpected or of another shape; all are listed.
    """
    state = checkpoint
    if isinstance(checkpoint, str | Path):
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    assert isinstance(state, Mapping)
    nested = state.get("model", state)
    converted, own = convert_lavis(nested), model.state_dict()
    tower = any(name.startswith("visual_encoder.") for name in nested)
    needed = {name for name in own if tower or not _in_tower(name)}
    problems = [f"missing: {name}" for name in sorted(needed - converted.keys())]
    problems += [f"unexpected: {name}" for name in sorted(converted.keys() - own.keys())]
    problems += [
        f"shape of {name}: the checkpoint has {tuple(converted[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in sorted(converted.keys() & own.keys())
        if converted[name].numel() != own[name].numel()
        or (converted[name].ndim > 0 < own[name].ndim and converted[name].shape != own[name].shape)
    ]
    if problems:
        raise LavisMismatchError("the LAVIS checkpoint does not fit this model:\n  " + "\n  ".join(problems))
    model.load_state_dict({name: value.reshape(own[name].shape) for name, value in converted.items()}, strict=False)
    model.retrieval.vision_model.post_layernorm.eps = LN_VISION_EPS


def _in_tower(name: str) -> bool:
    return name.startswith("retrieval.vision_model.") and ".post_layernorm." not in name

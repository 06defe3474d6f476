"""Read the checkpoints of LAVIS, where BLIP-2 was trained first, into a `Blip2Stage1`.

LAVIS saves only what it trains: Q-Former, heads and the norm after the vision tower, and not the tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .original_checkpoint import CheckpointMismatchError, KeyMap, load_strictly, read_checkpoint

if TYPE_CHECKING:
    from .blip2_stage1 import Blip2Stage1

# LAVIS's norm after the vision tower is a plain LayerNorm, transformers' has 1e-6.
LN_VISION_EPS = 1e-5

_NAMES = KeyMap.of(
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
    # Tied to the word embeddings and to the bias, or no parameters.
    dropped=r"position_ids$|^Qformer\.cls\.predictions\.decoder\.",
)  # fmt: skip


class LavisMismatchError(CheckpointMismatchError):
    """A LAVIS checkpoint does not fit the model; the message lists every difference."""


def convert_lavis(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LAVIS's parameters of stage 1 under the names of `Blip2Stage1`.

    Names that no rule knows are kept as they are, for the caller to complain about.
    """
    converted = _NAMES.rename(state)
    for name in [name for name in converted if name.endswith(".self_attn.q_bias")]:
        # The vision tower's keys have no bias, which transformers stores as zeros.
        if (other := name.replace("q_bias", "v_bias")) not in converted:
            continue
        q, v = converted.pop(name), converted.pop(other)
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
    state = read_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint.get("model", checkpoint)
    tower = any(name.startswith("visual_encoder.") for name in state)
    own = model.state_dict()
    converted = {
        # A single number, as the temperature is, may have a dimension or none.
        name: value.reshape(own[name].shape) if name in own and value.numel() == own[name].numel() == 1 else value
        for name, value in convert_lavis(state).items()
    }
    load_strictly(
        model,
        converted,
        "the LAVIS checkpoint",
        needed=lambda name: tower or not _in_tower(name),
        error=LavisMismatchError,
    )
    model.retrieval.vision_model.post_layernorm.eps = LN_VISION_EPS


def _in_tower(name: str) -> bool:
    return name.startswith("retrieval.vision_model.") and ".post_layernorm." not in name

"""The low-rank term that PEFT puts beside a linear layer, read where it is plain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.quantized_linear import Lora
from .children import hooked, readable_linear


def read_lora(layer: nn.Module, x: Tensor) -> Lora | None:
    """What a PEFT LoRA layer adds to its base layer for `x`; None where it has to be called.

    It is read while exactly one plain adapter is active and not merged: no DoRA or another variant, no bias of its own,
    no hooks, and dropout only of the standard kind.
    """
    found: Any = layer
    if found.disable_adapters or found.merged or len(found.active_adapters) != 1:
        return None
    name = found.active_adapters[0]
    if name not in found.lora_A or name in found.lora_variant:
        return None
    down, up, dropout = found.lora_A[name], found.lora_B[name], found.lora_dropout[name]
    if not (readable_linear(down) and readable_linear(up)) or down.bias is not None or up.bias is not None:
        return None
    if type(dropout) not in (nn.Identity, nn.Dropout) or hooked(dropout):
        return None
    if down.weight.dtype != up.weight.dtype or not (found.cast_input_dtype_enabled or x.dtype == down.weight.dtype):
        return None
    dropout_p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Lora(down.weight, up.weight, found.scaling[name], dropout_p)


def computes_in(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a layer that computes in `dtype` takes `x` as it is, under autocast too."""
    device = x.device.type
    return x.dtype == dtype and (not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == dtype)

"""Activations of feed-forward networks by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


# The function that `norm_linear` applies to its GEMM; for the gated ones (GLUs), the function it applies to their gate.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # with erf
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,  # CLIP, BLIP
    "relu": F.relu,
    "squared_relu": _squared_relu,  # the Flamingo paper (So et al. 2021)
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}
GATED_ACTIVATIONS = frozenset({"swiglu", "geglu"})

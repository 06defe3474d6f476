"""Seeds of in-kernel dropout: numbers for eager calls, tensors for traced ones, which must not look into them."""

from __future__ import annotations

import torch
from torch import Tensor

_SEEDS = 1 << 62


def drawn(dropout_p: float, seed: int | None) -> int:
    """The seed of an eager call: the given one, or one from torch's default CPU generator; 0 without dropout."""
    if dropout_p == 0.0:
        return 0
    return int(torch.randint(_SEEDS, ()).item()) if seed is None else seed


def drawn_traced(dropout_p: float, seed: int | None) -> Tensor:
    """The same as an int64 scalar on the CPU, drawn anew in each call of the compiled function."""
    if dropout_p > 0.0 and seed is None:
        return torch.randint(_SEEDS, ())
    return torch.full((), seed or 0, dtype=torch.int64)

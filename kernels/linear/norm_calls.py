"""The norm before a linear layer, and its gradient, where it is computed apart from the product."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm import triton_launch
from ..norm.triton_launch import Settings


def normalized(
    x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """norm(x) of x [..., D], contiguous, in `dtype`."""
    return triton_launch.forward(x, None, weight, bias, Settings(kind == "rms_norm", eps, dtype=dtype))[0]


def norm_backward(
    grad: Tensor,
    x: Tensor,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x [..., D] (contiguous), weight and bias from that of norm(x); the statistics are found again.

    Args:
        grad: [..., D].
        x, kind, weight, bias, eps: the norm.
        needs: which of the three are wanted.
    """
    wanted = [t.dtype if need and t is not None else None for need, t in zip(needs, (x, weight, bias), strict=True)]
    found = triton_launch.backward(
        grad, x, weight, None, Settings(kind == "rms_norm", eps), x_dtype=wanted[0], residual_dtype=wanted[0],
        weight_dtype=wanted[1], bias_dtype=wanted[2],
    )  # fmt: skip
    return found[1], found[2], found[3]

"""A linear layer over a frozen weight in 4 or 8 bits: what is kept beside it, and its computation over the ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.quantized_linear import Lora, Weight4bit, Weight8bit, quantized_linear
from .state import FusedState

Weight = Weight4bit | Weight8bit
Outliers = Literal["llm_int8"]


@dataclass(frozen=True)
class FrozenLinearSpec:
    """How the layer computes.

    Attributes:
        outliers: None multiplies the activations as they are with the dequantised int8 weight; "llm_int8" quantises
            them as well, but for the columns with an entry of at least `threshold`, as bitsandbytes does.
        threshold: see `outliers`; 0 means no such columns.
    """

    outliers: Outliers | None = None
    threshold: float = 0.0


@dataclass(eq=False)
class FrozenLinearState(FusedState):
    """The private state of a swapped layer.

    Attributes:
        weight: the layer's bytes, as the op takes them: views, made anew where the layer got other bytes.
    """

    weight: Weight | None = None

    def forget(self) -> None:
        """Drop what was made of the layer's bytes, so that it does not hold on to bytes that the layer gave up."""
        self.weight = None
        self.derived.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "weight": None}


def frozen_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
    spec: FrozenLinearSpec,
    lora: Lora | None = None,
) -> Tensor:
    """x W^T + b (+ the low-rank term).

    Args:
        x: [..., K], floating point.
        weight: [N, K]; it gets no gradient.
        bias: [N] or None.
        compute_dtype: of the product; `x` is cast to it.
        spec: see `FrozenLinearSpec`.
        lora: a trained low-rank term beside the weight.

    Returns:
        [..., N] in the dtype of `x`.
    """
    if spec.outliers is not None and bias is not None:
        bias = bias.to(x.dtype)  # as bitsandbytes adds it
    y = quantized_linear(x.to(compute_dtype), weight, bias, lora=lora, outliers=spec.outliers, threshold=spec.threshold)
    return y.to(x.dtype)

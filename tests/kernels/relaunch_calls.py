"""Eager inference calls of the ops that relaunch, each made of new tensors every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mllm_fast import ops
from mllm_fast.kernels.norm import Norm

Call = Callable[[], Tensor]
K, N = 64, 128


class Maker:
    """Makes the tensors of a call. `change` says what is different about them.

    Args:
        device, dtype: of the tensors.
        change: "", "unaligned" (x begins in the middle of 16 bytes), "expanded" (x has a batch of stride 0), "rows" (more of
            them).
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, change: str = "") -> None:
        self.device, self.dtype, self.change = device, dtype, change

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def rows(self, width: int) -> Tensor:
        """x [2, rows, width]."""
        number = 3 if self.change == "rows" else 1
        if self.change == "expanded":
            return self(1, number, width).expand(2, -1, -1)
        if self.change == "unaligned":
            return self(2 * number * width + 1)[1:].view(2, number, width)
        return self(2, number, width)

    def norm(self, kind: str = "layer_norm", width: int = K) -> Norm:
        return Norm(kind, self(width), self(width) if kind == "layer_norm" else None)  # type: ignore[arg-type]

    def integers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.device)

    def mask(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bool, device=self.device)


def _media(make: Maker) -> Tensor:
    q, k, v = make(2, 1, 4, 32), make(2, 48, 4, 32), make(2, 48, 4, 32)
    first = make.integers(2, 1)
    return ops.attention(q, k, v, mask=ops.Mask(media=ops.MediaRanges(first, first + 1, 3, 16, "mean")))


def _keys_of_one_projection(make: Maker) -> Tensor:
    k, v = make(2, 48, 2 * 4 * 32).unflatten(-1, (8, 32)).chunk(2, dim=2)
    return ops.attention(make(2, 1, 4, 32), k, v, mask=ops.Mask(key_padding=make.mask(2, 48)))


def _residual(make: Maker, **options: Any) -> Tensor:
    x = make.rows(K)
    return ops.linear_residual(x, make(N, K), make(N), residual=make(*x.shape[:-1], N), **options)


def _quantized(make: Maker, weight: ops.Weight4bit | ops.Weight8bit) -> Tensor:
    return ops.quantized_linear(make.rows(K), weight, make(N))


def _weight_4bit(make: Maker, blocksize: int = 64, nested: bool = False) -> ops.Weight4bit:
    """Codes of a map that runs from -1 to 1, with scales around 1."""
    packed = torch.randint(256, (N * K // 2,), dtype=torch.uint8, device=make.device)
    blocks = N * K // blocksize
    scales, inner = torch.rand(blocks, device=make.device) + 0.5, None
    if nested:
        scales = torch.randint(256, (blocks,), dtype=torch.uint8, device=make.device)
        rest = torch.ones(-(-blocks // 256), device=make.device), torch.tensor(0.5, device=make.device)
        inner = ops.Nested(torch.linspace(0, 1, 256, device=make.device), *rest)
    code = torch.linspace(-1, 1, 16, device=make.device)
    return ops.Weight4bit(packed, scales, code, blocksize, (N, K), inner)


def _weight_8bit(make: Maker) -> ops.Weight8bit:
    values = torch.randint(-127, 127, (N, K), dtype=torch.int8, device=make.device)
    return ops.Weight8bit(values, torch.rand(N, device=make.device))


CALLS: dict[str, Callable[[Maker], Tensor]] = {
    "linear": lambda make: ops.norm_linear(make.rows(K), make(N, K)),
    "norm and activation": lambda make: ops.norm_linear(
        make.rows(K), make(N, K), make(N), norm=make.norm(), activation="gelu"
    ),
    "GLU": lambda make: ops.norm_linear(
        make.rows(K), make(N, K), norm=make.norm("rms_norm"), activation="swiglu", gate_weight=make(N, K)
    ),
    "heads": lambda make: ops.norm_linear(make.rows(K), make(N, K), head_norm=make.norm("rms_norm", 32)),
    "residual": _residual,
    "gate": lambda make: _residual(make, gate=make(1), row_mask=make.mask(*make.rows(K).shape[:-1])),
    "gate of no dimension": lambda make: _residual(make, gate=make()),
    "pending norm": lambda make: _residual(make, residual_norm=make.norm(width=N)),
    "post-norm": lambda make: _residual(make, norm=make.norm(width=N)),
    "split K": lambda make: ops.norm_linear(make(1, 16384), make(32, 16384), make(32), activation="gelu"),
    "split K, GLU": lambda make: ops.norm_linear(
        make(1, 16384), make(32, 16384), activation="geglu", gate_weight=make(32, 16384)
    ),
    "layer norm": lambda make: ops.layer_norm(make.rows(K), make(K), make(K), residual=make.rows(K)),
    "RMS norm": lambda make: ops.rms_norm(make.rows(K), make(K), 1e-5),
    "gated residual": lambda make: ops.gated_residual(make.rows(K), make.rows(K), make(K)),
    "attention, media": _media,
    "4 bit": lambda make: _quantized(make, _weight_4bit(make)),
    "4 bit, other blocks": lambda make: _quantized(make, _weight_4bit(make, 32)),
    "4 bit, nested": lambda make: _quantized(make, _weight_4bit(make, nested=True)),
    "8 bit": lambda make: _quantized(make, _weight_8bit(make)),
    "attention, parts of one tensor": _keys_of_one_projection,
}
# Ways in which the tensors of a call may differ from those of another with the same constants.
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unaligned": {"change": "unaligned"},
    "expanded": {"change": "expanded"},
    "rows": {"change": "rows"},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
}

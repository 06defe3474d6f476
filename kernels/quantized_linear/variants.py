"""Every configuration in which the quantised kernels may be launched, for the audit: the launchers on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from .. import target
from ..launch import Architecture, Variant, recording
from . import triton_launch
from .lowrank import LowRank
from .weights import Nested, Weight, Weight4bit, Weight8bit

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call, forward and backward: sizes as LLaMA-7B has them.

    Attributes:
        rows: of x.
        bits, block, nested: of the weight.
        bias, rank, dropout: what stands beside it.
        width, columns: N and K.
    """

    rows: int
    bits: int = 4
    block: int = 64
    nested: bool = False
    bias: bool = False
    rank: int = 0
    dropout: bool = False
    width: int = 4096
    columns: int = 4096

    @property
    def label(self) -> str:
        """For people."""
        parts = [f"{self.rows} rows", "int8" if self.bits == 8 else f"4 bit in {self.block}"]
        parts += [name for name in ("nested", "bias", "dropout") if getattr(self, name)]
        if self.rank:
            parts.append(f"LoRA {self.rank}")
        if self.width * self.columns != 4096 * 4096:
            parts.append(f"{self.width} x {self.columns}")
        return ", ".join(parts)


ROWS = (1, 32, 64, 256)
# Of a weight so wide that sums are not split, and the epilogue is in the kernel itself.
WIDE = 40960
TILES = tuple(Case(rows, bits) for bits in (4, 8) for rows in ROWS)
FEATURES = (
    *(Case(rows, nested=True) for rows in ROWS),
    *(Case(rows, block=32) for rows in ROWS),
    *(Case(rows, bits, bias=True, rank=16, dropout=True, width=WIDE, columns=WIDE) for bits in (4, 8) for rows in ROWS),
    Case(256, bias=True, rank=64, width=WIDE, columns=WIDE),
    Case(16, nested=True, bias=True, rank=8),
    Case(16, block=128, width=11008),
    Case(16, block=4096),
    Case(16, bits=8, width=100, columns=200),
    Case(16, bits=8, width=1, columns=1, rank=1),
    Case(16, width=100, columns=192),
    Case(2048, columns=11008),
    Case(2048, bits=8),
    Case(16, block=64, width=33, columns=96),
)
GROUPS = ((BF16, TILES + FEATURES), (FP16, TILES), (FP32, TILES))


def variants(architecture: Architecture) -> Iterator[Variant]:
    """All launches of all cases."""
    nearest = architecture.name if architecture.name in target.ARCHITECTURES else "sm_80"
    for dtype, cases in GROUPS:
        for case in cases:
            # The launchers ask the device what it is; a meta tensor has no answer.
            with recording(architecture) as launches, mock.patch.object(triton_launch, "arch_of", return_value=nearest):
                _call(case, dtype)
            name = str(dtype).removeprefix("torch.")
            for launch in launches:
                c = launch.constexprs
                loops = "LOOKUP" in c and "BK" in c
                tile = f", {c['BM']}x{c['BN']}x{c['BK']}" if loops else ""
                yield replace(
                    launch,
                    label=f"{name}, {case.label}{tile}",
                    elements=c["BN"] * c["BK"] if loops else None,
                )


def _call(case: Case, dtype: torch.dtype) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = _weight(case)
    bias = empty(case.width) if case.bias else None
    p = 0.1 if case.dropout else 0.0
    x, grad = empty(case.rows, case.columns), empty(case.rows, case.width)
    a, b = empty(case.rank, case.columns, dtype=FP32), empty(case.width, case.rank, dtype=FP32)
    down = empty(case.rows, case.rank, dtype=FP32)
    triton_launch.dropout(x, p, 1 << 40)
    triton_launch.product(x, weight, bias, LowRank(down, b) if case.rank else None)
    triton_launch.input_gradient(grad, weight, LowRank(down, a.mT, p, 1 << 40) if case.rank else None)


def _weight(case: Case) -> Weight:
    def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    elements = case.width * case.columns
    if case.bits == 8:
        return Weight8bit(empty(case.width, case.columns, dtype=torch.int8), empty(case.width))
    blocks = -(-elements // case.block)
    nested = Nested(empty(256), empty(-(-blocks // 256)), empty()) if case.nested else None
    absmax = empty(blocks, dtype=FP32 if nested is None else torch.uint8)
    packed = empty((elements + 1) // 2, dtype=torch.uint8)
    return Weight4bit(packed, absmax, empty(16), case.block, (case.width, case.columns), nested)

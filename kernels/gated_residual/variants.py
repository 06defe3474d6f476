"""Every configuration in which the kernels of gated_residual may be launched, for the audit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from .. import target
from ..launch import Architecture, Variant, recording
from . import triton_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# OpenFlamingo on MPT-1B, IDEFICS-9B, and a row that does not fill its block.
WIDTHS = (2048, 4096, 600)


def variants(architecture: Architecture) -> Iterator[Variant]:
    """Forward and backward, scalar and vector gates, with and without a row mask."""
    nearest = architecture.name if architecture.name in target.ARCHITECTURES else "sm_80"
    for dtype in (BF16, FP16, FP32):
        for width in WIDTHS if dtype == BF16 else WIDTHS[:1]:
            for scalar in (True, False):
                for masked in (False, True):
                    with (
                        recording(architecture) as launches,
                        mock.patch.object(target, "arch_of", return_value=nearest),
                    ):
                        _call(dtype, width, scalar, masked)
                    kind = f"{'scalar' if scalar else 'vector'} gate{', masked rows' if masked else ''}"
                    for launch in launches:
                        c = launch.constexprs
                        yield replace(
                            launch,
                            label=f"{str(dtype).removeprefix('torch.')}, {kind}, D {width}",
                            elements=c["BM"] * c["BD"] if "BD" in c else None,
                        )


def _call(dtype: torch.dtype, width: int, scalar: bool, masked: bool) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, gate = empty(4, 500, width), empty(1 if scalar else width)
    mask = empty(4, 500, dtype=torch.bool) if masked else None
    out = triton_launch.forward(x, x, gate, mask)
    triton_launch.backward(out, x, gate, mask, branch_dtype=dtype)
    triton_launch.backward(out, None, gate, mask, branch_dtype=dtype)

"""Every configuration in which the norm kernels may be launched, for the audit: the launchers on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from .. import target
from ..launch import Architecture, Variant, recording
from . import triton_launch
from .triton_launch import Settings

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# A row length for each configuration, from the models that have it: heads, Q-Former, OpenFlamingo, LLaMA, Llama 70B.
WIDTHS = (128, 768, 2048, 4096, 8192)
# (label, residual, weight, bias, RMS, dropout)
PLAIN = ("layer norm", False, True, True, False, False)
POST = ("post-norm with dropout", True, True, True, False, True)
RMS = ("RMS norm", False, True, False, True, False)
KINDS = (PLAIN, POST, RMS, ("layer norm, no affine", False, False, False, False, False))


def variants(architecture: Architecture) -> Iterator[Variant]:
    """Forward with and without what backward needs, and backward."""
    nearest = architecture.name if architecture.name in target.ARCHITECTURES else "sm_80"
    for dtype in (BF16, FP16, FP32):
        # fp16 compiles as bf16 does: one width is enough to see that it compiles.
        for width in (768,) if dtype == FP16 else WIDTHS:
            for label, residual, weight, bias, rms, dropout in KINDS if width == 768 else (POST, RMS):
                settings = Settings(rms, 1e-5, 0.1 if dropout else 0.0, 1 << 40)
                with recording(architecture) as launches, mock.patch.object(target, "arch_of", return_value=nearest):
                    _call(dtype, width, residual, weight, bias, settings)
                for launch in launches:
                    c = launch.constexprs
                    step = {"norm_rows": "forward", "norm_rows_backward": "backward"}.get(
                        launch.kernel.fn.__name__, "sums"
                    )
                    yield replace(
                        launch,
                        label=f"{str(dtype).removeprefix('torch.')}, {label}, D {width}, {step}",
                        elements=c["BM"] * c["BD"] if step == "backward" else None,
                    )


def _call(dtype: torch.dtype, width: int, residual: bool, weight: bool, bias: bool, settings: Settings) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(64, 32, width)
    given = (x, x if residual else None, empty(width) if weight else None, empty(width) if bias else None)
    triton_launch.forward(*given, settings)
    out, total, stats = triton_launch.forward(*given, settings, saving=True)
    triton_launch.backward(
        out,
        x if total is None else total,
        given[2],
        stats,
        settings,
        x_dtype=dtype,
        residual_dtype=dtype if residual else None,
        weight_dtype=dtype if weight else None,
        bias_dtype=dtype if bias else None,
    )

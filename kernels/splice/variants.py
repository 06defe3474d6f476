"""Every configuration in which the kernels of `splice_rows` may be launched, for the audit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..launch import Architecture, Variant, recording
from . import triton_launch

# (label, width): LLaVA-7B, a row that is no power of two, and one that a warp moves.
WIDTHS = (("LLaVA-7B", 4096), ("OPT-2.7b", 2560), ("narrow", 200))


def variants(architecture: Architecture) -> Iterator[Variant]:
    """Forward from embeddings and from the table, and both gradients."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for label, width in WIDTHS:
            for table in (False, True):
                with recording(architecture) as launches:
                    _call(dtype, width, table)
                name = str(dtype).removeprefix("torch.")
                for launch in launches:
                    step = "from the table" if table else "from embeddings"
                    if launch.constexprs.get("p_features", 0) is None:
                        step = "gradient of embeddings"
                    if launch.kernel.fn.__name__ == "sum_rows":
                        step = "gradient"
                    yield replace(launch, label=f"{name}, {label}, {step}", elements=launch.constexprs["BD"])


def _call(dtype: torch.dtype, width: int, table: bool) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    index, rows = empty(2, 600, dtype=torch.int64), empty(576, width)
    ids = empty(2, 600, dtype=torch.int64) if table else None
    text = empty(32000, width) if table else empty(2, 600, width)
    out = triton_launch.forward(text, rows, index, ids)
    triton_launch.backward(out, index, ids, 576, 32000 if table else 0, text=True, spliced=True)

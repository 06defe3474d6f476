"""The launches of `cross_entropy_rows`, for the audit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..launch import Architecture, Variant, recording
from . import triton_rows


def variants(architecture: Architecture) -> Iterator[Variant]:
    """Each dtype, with and without gradient and soft cap, at LLaMA's and OPT's vocabularies."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (32000, 50272):
            for smoothing, softcap, gradient in ((0.0, None, True), (0.1, None, False), (0.1, 30.0, True)):
                with recording(architecture) as launches:
                    logits = torch.empty(256, size, dtype=dtype, device="meta")
                    targets = torch.empty(256, dtype=torch.int64, device="meta")
                    triton_rows.chunk_loss(logits, targets, smoothing, softcap, gradient)
                name = str(dtype).removeprefix("torch.")
                label = f"{name}, {size}{', gradient' if gradient else ''}{', soft cap' if softcap else ''}"
                for launch in launches:
                    yield replace(launch, label=label, elements=launch.constexprs["BV"])

"""What the tests of attention's Triton kernels share: calls on the kernels, and the exact results beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.attention import attention
from tests.kernels.attention_dense import dense_attention, gradients
from tests.kernels.triton_device import DEVICE


def on_triton(leaves: list[Tensor], **settings: Any) -> Tensor:
    """attention(*leaves) by the kernels; leaves 3 and 4 are the second source."""
    if len(leaves) > 3:
        settings = settings | {"extra_k": leaves[3], "extra_v": leaves[4]}
    if "kv_index" in settings:
        settings["kv_index"] = settings["kv_index"].to(DEVICE)
    with runtime.backend("triton"):
        return attention(*leaves[:3], **settings)


def exact(leaves: list[Tensor], **settings: Any) -> Tensor:
    """The same by definition, in fp64."""
    if len(leaves) > 3:
        settings = settings | {"extra_k": leaves[3], "extra_v": leaves[4]}
    return dense_attention(*leaves[:3], **settings)


def moved(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Leaves of the same values and strides on the device; their gradients do not reach `leaves`."""
    return [x.detach().to(DEVICE, dtype).requires_grad_() for x in leaves]


def check(leaves: list[Tensor], batch: int | None = None, **settings: Any) -> None:
    """Output and all gradients in fp32 equal the exact ones; the first of `leaves` is expanded to `batch` rows."""
    mine, theirs = moved(leaves, torch.float32), [x.detach().double().requires_grad_() for x in leaves]
    results = []
    grad: Tensor | None = None
    for run, inputs in ((on_triton, mine), (exact, theirs)):
        q = inputs[0] if batch is None else inputs[0].expand(batch, -1, -1, -1)
        out = run([q, *inputs[1:]], **settings)
        grad = torch.randn(out.shape) if grad is None else grad
        results.append([out, *gradients(out, inputs, grad.to(out))])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=1e-4, atol=2e-5)


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def qkv(batch: int, queries: int, keys: int, heads: int = 2, size: int = 8, key_heads: int = 2) -> list[Tensor]:
    return random((batch, queries, heads, size), *((batch, keys, key_heads, size),) * 2)

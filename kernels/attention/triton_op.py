"""`attention` on the Triton kernels, for eager calls; traced ones go through `registered`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_launch
from .settings import Settings


class Attention(torch.autograd.Function):
    """Attention with a backward of its own. Saved: the inputs, the output, its logsumexp, the masks and the seed."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None
    ) -> Tensor:
        """The output."""
        out, lse = triton_launch.forward(q, k, v, extra_k, extra_v, settings)
        ctx.save_for_backward(q, k, v, extra_k, extra_v, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors, and None for the settings."""
        return None, *triton_launch.backward(grad, *ctx.saved_tensors, ctx.settings)


def run(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, settings: Settings) -> Tensor:
    """The output [B, Lq, H, D] of an eager call."""
    given = (q, k, v, extra_k, extra_v)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        result: Tensor = Attention.apply(settings, *given)
        return result
    return triton_launch.forward(*given, settings)[0]

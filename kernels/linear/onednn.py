"""GEMMs of the CPU implementation that call oneDNN themselves, where torch's own choice is slow.

torch sends fp32 GEMMs to MKL. On AMD processors that runs at about half the speed of oneDNN, which torch ships too and
uses for 16-bit types: 12.6 against 5.6 ms for [256, 768] x [3072, 768], 69 against 32 ms for [257, 1408] x [9216, 1408],
and the same for both gradients (EPYC with AVX-512, one thread, torch 2.13).

bf16 GEMMs do go to oneDNN, but the bias is first spread over the result, to be added to: a pass over memory that oneDNN
does not need (9 of 330 ms in a Q-Former that matches 16 texts). That is avoided where no gradient is wanted.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Multiply-adds below which the call is not worth choosing about.
SMALLEST = 1 << 20


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether this machine's MKL is the slow one: an AMD processor, and a torch with both libraries."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")[:4096]
    except OSError:
        return False


@functools.cache
def _has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` should compute x [M, K] with weight [N, K] here."""
    return (
        x.device.type == "cpu"
        and x.dim() == 2
        and x.dtype == weight.dtype
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and bias is not None))
        and x.numel() * weight.shape[0] >= SMALLEST
        and (bias is None or bias.dtype == x.dtype)
        and all(type(t) in (Tensor, nn.Parameter) for t in (x, weight, bias) if t is not None)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_mkldnn_enabled()
        and (_mkl_is_slow() if x.dtype == torch.float32 else _has_bf16() and not _needs_graph(x, weight, bias))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [M, K] and weight [N, K] that `serves` accepts; differentiable any number of times."""
    if _needs_graph(x, weight, bias):
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return _gemm(x, weight, bias)


def _needs_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """x where oneDNN can read it as it lies: rows or columns side by side."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """x y by the faster library; in the backward pass of a backward pass it is differentiated in turn."""
    return linear(x, y.t(), None) if serves(x, y.t(), None) else x @ y


class _Linear(torch.autograd.Function):
    """x W^T + b. Saved for backward: x where W needs a gradient, W where x does; nothing of a frozen layer's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return _gemm(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _matmul(grad, weight) if for_x else None,
            _matmul(grad.t(), x) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )

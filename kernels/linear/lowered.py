"""A linear layer whose trained fp32 weight is multiplied in 16 bits, as autocast asks for on a CPU.

Autocast itself makes a 16-bit copy of the whole weight, which lives until backward, and a whole gradient in 16 bits before
that in fp32: with a large trained bridge that is more memory than all activations, and a third of a training step's time.
Here both exist a panel at a time, small enough for the cache, and the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

# Elements of a panel, and those of the smallest weight that is worth panels.
PANEL = 1 << 22
LEAST = 1 << 18


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast lowers this product x W^T of a trained weight on a CPU, and the copy is worth avoiding."""
    return (
        weight.dtype == torch.float32
        and weight.requires_grad
        and weight.numel() >= LEAST
        and weight.is_cpu
        and x.dtype != torch.float64
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and type(weight) in (Tensor, torch.nn.Parameter)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in autocast's dtype: x [M, K], weight [N, K] fp32, bias [N] or None. Saved: x in that dtype, the weight."""
    dtype = torch.get_autocast_dtype("cpu")
    y: Tensor = _Lowered.apply(x.to(dtype), weight, None if bias is None else bias.to(dtype))
    return y


class _Lowered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y, room = x.new_empty(x.shape[0], weight.shape[0]), _room(weight, x.dtype)
        for first, last in _panels(weight.shape[0], weight.shape[1]):
            panel, part = _lowered(weight[first:last], room).mT, y[:, first:last]
            if bias is None:
                torch.mm(x, panel, out=part)
            else:
                torch.addmm(bias[first:last], x, panel, out=part)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows, columns = weight.shape
        room, dx, dw = _room(weight, x.dtype), None, None
        with torch.autocast("cpu", enabled=False):
            if need_weight:
                dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
                for first, last in _panels(rows, columns):
                    panel = room[: (last - first) * columns].view(last - first, columns)
                    dw[first:last] = torch.mm(grad[:, first:last].mT, x, out=panel)
            if need_x:
                dx = torch.empty_like(x)
                for first, last in _panels(columns, rows):
                    torch.mm(grad, _lowered(weight[:, first:last], room), out=dx[:, first:last])
        return dx, dw, grad.sum(0) if need_bias else None


def _panels(length: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, PANEL // max(width, 1))
    for first in range(0, length, step):
        yield first, min(first + step, length)


def _room(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for one panel."""
    rows, columns = weight.shape
    return torch.empty(min(max(PANEL, rows, columns), weight.numel()), dtype=dtype)


def _lowered(part: Tensor, room: Tensor) -> Tensor:
    return room[: part.numel()].view(part.shape).copy_(part)

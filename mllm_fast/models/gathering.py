"""What the processes of a training run share: rows of each, with gradients. Without a process group there is one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def processes() -> tuple[int, int]:
    """(rank of this process, number of processes) of the default group; (0, 1) without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks.

    A collective: every process calls it, and calls backward through it or none does. The gradient of a row is the sum of
    what the processes found for it. So where each process has a loss of its own and gradients are averaged over the
    processes, as `DistributedDataParallel` does, the result is the gradient of the mean of the losses.

    Args:
        x: [N, ...], of one shape and dtype on all processes.

    Returns:
        [processes * N, ...]; x itself where there is one process.
    """
    if processes()[1] == 1:
        return x
    result: Tensor = _Gather.apply(x)
    return result


def gathered_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """The numbers of all processes, in the order of their ranks. The host waits for them."""
    if processes()[1] == 1:
        return [list(numbers)]
    rows: list[list[int]] = gathered(torch.tensor([numbers], device=device)).tolist()
    return rows


class _Gather(torch.autograd.Function):
    """All-gather whose backward is a reduce-scatter. Saved: nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts = list(grad.contiguous().chunk(dist.get_world_size()))
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own

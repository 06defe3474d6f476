"""Tensors as rows: where the kernels that work row by row find each row, without a copy where the strides allow it."""

from __future__ import annotations

import itertools
import math

from torch import Tensor

# The stride between outer blocks of rows, and that between the rows of one.
Strides = tuple[int, int]


def as_rows(*tensors: Tensor | None) -> tuple[list[Tensor | None], int, list[Strides]]:
    """Tensors [..., D] of equal leading dimensions as rows, which lie in blocks of `inner`.

    Row r of a tensor begins at r // inner * outer stride + r % inner * inner stride: that covers slices ([B, :n, D]),
    batches of stride 0, and heads ([B, L, :h, D]). A tensor whose last dimension is not contiguous, or whose rows lie
    otherwise, is copied.

    Args:
        tensors: at least one; None stays None.

    Returns:
        the tensors, or their contiguous copies; inner; for each tensor its two strides, (0, 0) for None.
    """
    found = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    shape = next(x.shape[:-1] for x in found if x is not None)
    inner = math.prod(shape)
    given = [x for x in found if x is not None]
    if all(x.is_contiguous() for x in given):
        return found, inner, _of_contiguous(found)
    for split in range(len(shape)):
        strides = [None if x is None else _split(shape, x.stride(), split) for x in found]
        if all(x is None or s is not None for x, s in zip(found, strides, strict=True)):
            return found, math.prod(shape[split:]), [s or (0, 0) for s in strides]
    found = [None if x is None else x.contiguous() for x in found]
    return found, inner, _of_contiguous(found)


def _of_contiguous(tensors: list[Tensor | None]) -> list[Strides]:
    return [(0, 0) if x is None else (0, x.shape[-1]) for x in tensors]


def _split(shape: tuple[int, ...], stride: tuple[int, ...], split: int) -> Strides | None:
    """The stride of dimensions 0 to split - 1 as one, and that of the others as one; None where they are not."""
    outer, inner = _merged(shape[:split], stride[:split]), _merged(shape[split:], stride[split : len(shape)])
    return None if outer is None or inner is None else (outer, inner)


def _merged(shape: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """The stride of some dimensions as one, 0 for none; None where they do not lie evenly."""
    steps = [(size, step) for size, step in zip(shape, stride, strict=True) if size != 1]
    for (_, before), (size, step) in itertools.pairwise(steps):
        if before != size * step:
            return None
    return steps[-1][1] if steps else 0

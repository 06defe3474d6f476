"""quantized_linear in plain PyTorch: the definition, and the CPU implementation.

The weight is dequantised panel by panel into one small workspace, and multiplied while it is in the cache. So a call
never takes memory for the whole weight in 16 bit. On a CPU that is most of the time, too: memory for 4096 x 4096 bf16
comes from the kernel in pages that it has to zero, on every call (6 of 8 ms).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norm.reference import dropout as dropout
from .decode import Panels4bit
from .decode import scales as scales
from .lowrank import LowRank
from .weights import Weight, Weight4bit, Weight8bit

# The reciprocal of 127 as bitsandbytes writes it.
INV_127 = 7.874015718698502e-3

# Elements of a panel, at most; of a small weight it is an eighth, down to the least that is worth a matrix product.
PANEL = 1 << 21
LEAST_PANEL = 1 << 16
# Up to so many rows, the input gradient is a sum over panels of whole rows, which decode faster than panels of columns.
FEW_ROWS = 128
# Up to so many rows, torch's product of bf16 with int8 is the faster one.
INT8_ROWS = 32


class _Panels8bit:
    """Parts of an int8 weight, without the scales."""

    decoder = None

    def __init__(self, weight: Weight8bit, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def rows(self, first: int, last: int) -> Tensor:
        return self._scaled(self.weight.values[first:last], self.weight.scale[first:last])

    def columns(self, first: int, last: int) -> Tensor:
        return self._scaled(self.weight.values[:, first:last], self.weight.scale)

    def _scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        return values.to(self.dtype)


class _Scaled8bit(_Panels8bit):
    """Parts of an int8 weight with the scales.

    For fp16, in which products with the bare integers may be too large or too small, and for fp64, where the result is to
    be that of the fp32 numbers of `dequantize`.
    """

    def _scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        return (values * scale[:, None] * INV_127).to(self.dtype)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K]: the product of code and scale in fp32, rounded to `dtype` once."""
    rows, columns = weight.shape
    if isinstance(weight, Weight4bit):
        return Panels4bit(weight, dtype, rows * columns).rows(0, rows)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for first, last in _ranges(rows, max(1, LEAST_PANEL // max(columns, 1))):
        out[first:last] = _Scaled8bit(weight, dtype).rows(first, last)
    return out


def product(x: Tensor, weight: Weight, bias: Tensor | None, term: LowRank | None) -> Tensor:
    """x W^T + bias + term: [M, K] -> [M, N]."""
    rows = weight.shape[0]
    panels, scale = _panels(weight, x.dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    if scale is not None and isinstance(weight, Weight8bit) and _has_int8_product(x, weight):
        ones = torch.ones(rows, dtype=x.dtype)
        out = _scaled(torch._weight_int8pack_mm(x.contiguous(), weight.values, ones), scale, bias)
    else:
        out = x.new_empty(x.shape[0], rows)
        for first, last in _ranges(rows, _row_step(weight)):
            some = None if bias is None else bias[first:last]
            if scale is None:
                panel, part = panels.rows(first, last).mT, out[:, first:last]
                if some is None:
                    torch.mm(x, panel, out=part)
                else:
                    torch.addmm(some, x, panel, out=part)
            else:
                out[:, first:last] = _scaled(F.linear(x, panels.rows(first, last)), scale[first:last], some)
    return out if term is None else out.add_(dense(term, out.dtype))


def _has_int8_product(x: Tensor, weight: Weight8bit) -> bool:
    """Whether torch's product of bf16 with int8 serves: it reads rows in whole vectors, beyond their end if need be, and
    crashes where vectors of 16 numbers do not start at multiples of their size, as in a mapped checkpoint they may not.
    """
    if not x.is_cpu or x.dtype != torch.bfloat16 or x.shape[0] > INT8_ROWS or weight.shape[1] % 64:
        return False
    return weight.values.data_ptr() % 16 == 0 and (not x.is_contiguous() or x.data_ptr() % 32 == 0)


def dense(term: LowRank, dtype: torch.dtype) -> Tensor:
    """The term as a tensor [M, width] in `dtype`, that of x."""
    # In the dtype of x before dropout, as in the forward: another might draw another pattern.
    return dropout((term.down @ term.up.mT).to(dtype), term.dropout_p, term.seed)


def _scaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y * scale + bias, rounded to the dtype of y once."""
    scaled = y * scale
    return (scaled if bias is None else scaled.add_(bias)).to(y.dtype)


def input_gradient(grad: Tensor, weight: Weight, term: LowRank | None, into: Tensor | None = None) -> Tensor:
    """dY W + term: [M, N] -> [M, K]; added to `into`, and that returned, where it is given."""
    rows, columns = weight.shape
    panels, scale = _panels(weight, grad.dtype)
    if scale is not None:
        grad = (grad * scale).to(grad.dtype)
    step, out = _row_step(weight), into
    if step >= rows:
        whole = panels.rows(0, rows)
        out = grad @ whole if out is None else out.addmm_(grad, whole)
    elif grad.shape[0] > FEW_ROWS and weight.aligned:
        out = grad.new_empty(grad.shape[0], columns) if into is None else into
        for first, last in _ranges(columns, _column_step(weight)):
            panel, part = panels.columns(first, last), out[:, first:last]
            if into is None:
                torch.mm(grad, panel, out=part)
            else:
                part.addmm_(grad, panel)
    else:
        # Sums in 16 bit would be rounded once a panel.
        total = grad.new_zeros(grad.shape[0], columns, dtype=torch.promote_types(grad.dtype, torch.float32))
        for first, last in _ranges(rows, step):
            total += grad[:, first:last] @ panels.rows(first, last)
        out = total.to(grad.dtype) if out is None else out.add_(total)
    return out if term is None else out.add_(dense(term, out.dtype))


def _panels(weight: Weight, dtype: torch.dtype) -> tuple[Panels4bit | _Panels8bit, Tensor | None]:
    """(what gives parts of the weight, what the rows of these still have to be multiplied with)."""
    if isinstance(weight, Weight4bit):
        rows, columns = weight.shape
        most = max(_row_step(weight) * columns, _column_step(weight) * rows if weight.aligned else 0)
        return Panels4bit(weight, dtype, min(most, rows * columns)), None
    if dtype in (torch.float16, torch.float64):
        return _Scaled8bit(weight, dtype), None
    return _Panels8bit(weight, dtype), weight.scale * INV_127


def _panel(weight: Weight) -> int:
    """How many elements a panel should have."""
    return min(PANEL, max(LEAST_PANEL, weight.shape[0] * weight.shape[1] // 8))


def _row_step(weight: Weight) -> int:
    """Rows of a panel of whole rows: a panel starts a block, so that unaligned weights have a least number of rows."""
    columns = max(weight.shape[1], 1)
    unit = weight.blocksize // math.gcd(columns, weight.blocksize) if isinstance(weight, Weight4bit) else 1
    return max(unit, _panel(weight) // columns // unit * unit)


def _column_step(weight: Weight) -> int:
    """Columns of a panel of columns: whole blocks."""
    unit = weight.blocksize if isinstance(weight, Weight4bit) else 1
    return max(unit, _panel(weight) // max(weight.shape[0], 1) // unit * unit)


def _ranges(length: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, step):
        yield first, min(first + step, length)

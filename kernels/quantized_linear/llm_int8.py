"""LLM.int8 as bitsandbytes computes it (Dettmers et al. 2022, arXiv 2208.07339, section 3), step by step the same.

Activations are quantised, too: to int8, with a scale a row, and without the outliers, whose columns are multiplied in
the dtype of x. Everything in between is in fp32, in bitsandbytes' order, so that the result has bitsandbytes' bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import Weight8bit

# 1 / 127^2, as bitsandbytes writes it; and its 1 / 127.
_INV_127_SQUARED = 6.200124e-05
_INV_127 = 7.874015718698502e-3


def product(x: Tensor, weight: Weight8bit, bias: Tensor | None, threshold: float) -> Tensor:
    """x W^T + bias: [M, K] -> [M, N] in the dtype of x; entries of x from `threshold` on are outliers (0: none are)."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    values, scale, columns = _quantize(x.half(), threshold)
    sums = _int8_matmul(values, weight.values)
    out = sums * (scale[:, None] * weight.scale) * _INV_127_SQUARED
    if bias is not None:
        out += bias
    out = out.to(x.dtype)
    if columns is not None and columns.numel():
        outliers = weight.values[:, columns] * weight.scale[:, None] * _INV_127
        out = out.addmm(x[:, columns], outliers.to(x.dtype).t())
    return out


def _quantize(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """(int8 [M, K], the largest magnitude of each row, the columns with outliers, which are 0 in the first)."""
    columns = None
    if threshold > 0.0:
        outliers = x.abs() >= threshold
        columns = outliers.any(0).nonzero().view(-1)
        x = x.masked_fill(outliers, 0.0)
    scale = x.abs().amax(1).float()
    values = (x * (127.0 / scale[:, None])).round()
    # A row of zeros has no scale to divide by.
    values = values.masked_fill((scale == 0.0)[:, None], 0.0).to(torch.int8)
    if columns is not None and x.shape[0] > 1:
        values[:, columns] = 0
    return values, scale, columns


def _int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in int32: [M, K], [N, K] -> [M, N]."""
    if a.device.type != "cuda":
        return torch._int_mm(a, b.t())
    # cuBLAS wants more than 16 rows, and multiples of 8 of the rest.
    rows, columns = a.shape[0], b.shape[0]
    a = F.pad(a, (0, -a.shape[1] % 8, 0, max(32 - rows, 0)))
    b = F.pad(b, (0, -b.shape[1] % 8, 0, -columns % 8))
    return torch._int_mm(a, b.t())[:rows, :columns]

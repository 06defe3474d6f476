"""The second stage of gradients that are sums over rows: each program of the first left a row of partial sums in fp32.

They are added in order, by one program a column, so that equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv, next_power_of_2
from .target import on_device
from .tile import tanh

# Of a tile, which 4 warps share: 16 each.
_ELEMENTS = 2048


@triton.jit(do_not_specialize=("parts",))
def column_sums_kernel(
    PARTS,  # [parts, N] fp32
    GATE,  # [N], or None
    OUT,  # [N]
    parts,
    N,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums of columns, times the derivative of tanh at GATE; grid: (column tiles)."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_p = tl.arange(0, BP)
    m_n = o_n < N
    b_sum = tl.zeros([BP, BN], tl.float32)
    for i in range(0, parts, BP):
        p_part = PARTS + (i + o_p).to(tl.int64)[:, None] * N + o_n[None, :]
        b_sum += tl.load(p_part, mask=(i + o_p < parts)[:, None] & m_n[None, :], other=0.0)
    b_out = tl.sum(b_sum, 0)
    if GATE is not None:
        b_t = tanh(tl.load(GATE + o_n, mask=m_n, other=0.0).to(tl.float32))
        b_out = b_out * (1.0 - b_t * b_t)
    tl.store(OUT + o_n, b_out.to(OUT.dtype.element_ty), mask=m_n)


def column_sums(parts: Tensor, shape: torch.Size, dtype: torch.dtype, gate: Tensor | None = None) -> Tensor:
    """The sums of the columns of `parts` [P, N] in fp32, with `gate` times 1 - tanh(gate)^2.

    Args:
        parts: contiguous.
        shape: of the result, N elements.
        dtype: of the result.
        gate: N elements, contiguous.
    """
    out = torch.empty(shape, dtype=dtype, device=parts.device)
    number, columns = parts.shape
    BP, BN = _blocks(number, columns)
    with on_device(parts):
        column_sums_kernel[(cdiv(columns, BN),)](parts, gate, out, number, columns, BP=BP, BN=BN, num_warps=4)
    return out


def _blocks(parts: int, columns: int) -> tuple[int, int]:
    """Parts and columns of a tile: few steps over many parts, and no idle lanes where there are few of either."""
    BP = 4 if parts <= 4 else 16 if parts <= 16 else 64
    BN = min(_ELEMENTS // BP, next_power_of_2(columns))
    return max(BP, _ELEMENTS // BN) if parts > 16 else BP, BN

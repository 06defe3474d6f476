"""Tile maths that the Triton kernels of several ops share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def split_width(width: int) -> tuple[int, int]:
    """(first, second) block widths that cover `width`: powers of two of at least 16, second 0 where one block will do.

    tl.dot takes powers of two. A head dimension of 80 is then 64 + 16 columns instead of 128.
    """
    if width <= 16:
        return 16, 0
    first = 1 << (width.bit_length() - 1)
    if first == width:
        return first, 0
    second = max(16, 1 << (width - first - 1).bit_length())
    return (2 * first, 0) if second >= first else (first, second)


@triton.jit
def load_rows(p_base, o_rows, m_rows, START: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Columns START to START + WIDTH (0 from LIMIT on) of the rows at offsets o_rows; 0 where not m_rows (None: all)."""
    o_d = START + tl.arange(0, WIDTH)
    p_block = p_base + o_rows[:, None] + o_d[None, :]
    if START + WIDTH > LIMIT:
        if m_rows is None:
            b_block = tl.load(p_block, mask=(o_d < LIMIT)[None, :], other=0.0)
        else:
            b_block = tl.load(p_block, mask=m_rows[:, None] & (o_d < LIMIT)[None, :], other=0.0)
    else:
        if m_rows is None:
            b_block = tl.load(p_block)
        else:
            b_block = tl.load(p_block, mask=m_rows[:, None], other=0.0)
    return b_block  # [rows, WIDTH]


@triton.jit
def store_rows(p_base, o_rows, m_rows, b_block, START: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """The reverse of `load_rows`, rounded to the dtype of the pointer."""
    o_d = START + tl.arange(0, WIDTH)
    p_block = p_base + o_rows[:, None] + o_d[None, :]
    b_block = b_block.to(p_base.dtype.element_ty)
    if START + WIDTH > LIMIT:
        tl.store(p_block, b_block, mask=m_rows[:, None] & (o_d < LIMIT)[None, :])
    else:
        tl.store(p_block, b_block, mask=m_rows[:, None])


@triton.jit
def bits_below(n):
    """int64 with the bits 0 to n - 1 set; none for n <= 0, all for n >= 64."""
    n = n.to(tl.int64)
    b_shift = tl.minimum(tl.maximum(n, 0), 63)
    b_some = (tl.full(n.shape, 1, tl.int64) << b_shift) - 1
    return tl.where(n >= 64, -1, b_some)


@triton.jit
def lowest_bit(word):
    """The place of the lowest set bit of an int64 scalar that is not 0."""
    # A power of two is exact in fp32, so that its exponent is the place; bit 63 gives -2^63, the same but for the sign.
    power = (word & -word).to(tl.float32)
    return ((power.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def kept(seed, dropout_p, o_first, o_second):
    """[len(first), len(second)] bool: True with probability 1 - dropout_p, a function of the seed and the two numbers.

    Philox-4x32 with 7 rounds, the fewest that pass TestU01's BigCrush (Salmon et al., SC 2011, table 2).
    """
    b_zero = o_first[:, None] * 0 + o_second[None, :] * 0
    b_random, _, _, _ = tl.philox(seed, o_first[:, None] + b_zero, o_second[None, :] + b_zero, b_zero, b_zero, 7)
    return tl.uint_to_uniform_float(b_random) >= dropout_p

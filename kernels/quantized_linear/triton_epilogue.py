"""What follows a product: bias, low-rank term, and the second pass over the parts of a split sum."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import kept

# Arguments on whose value no code may depend, because it changes from call to call.
UNSPECIALIZED = ("rows", "rank", "seed")


@triton.jit
def _low_rank(
    FIRST, SECOND, o_first, m_first, o_second, m_second, rank, s_first, r_first, s_second, r_second,
    R: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """FIRST SECOND^T [o_first, o_second] in fp32, of factors [., rank] with strides s_ and r_; rounded to DTYPE before."""
    b_sum = tl.zeros([o_first.shape[0], o_second.shape[0]], tl.float32)
    o_r = tl.arange(0, R)
    for start in range(0, rank, R):
        m_r = start + o_r < rank
        p_first = FIRST + o_first.to(tl.int64)[:, None] * s_first + (start + o_r)[None, :] * r_first
        p_second = SECOND + o_second.to(tl.int64)[None, :] * s_second + (start + o_r)[:, None] * r_second
        b_first = tl.load(p_first, mask=m_first[:, None] & m_r[None, :], other=0.0).to(DTYPE)  # [first, R]
        b_second = tl.load(p_second, mask=m_second[None, :] & m_r[:, None], other=0.0).to(DTYPE)  # [R, second]
        b_sum = tl.dot(b_first, b_second, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def finish(
    b_y,  # [width, rows] where FLIPPED, else [rows, width]; fp32
    o_row,
    m_row,
    o_col,
    m_col,
    BIAS,  # [width] or None
    DOWN,  # [rows, rank], contiguous, or None
    UP,  # [width, rank]
    OUT,  # [rows, width], contiguous
    width,
    rank,
    s_up,
    r_up,
    dropout_p,
    keep_scale,
    seed,
    FLIPPED: tl.constexpr,
    DROPOUT: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add bias and low-rank term, the second with dropout on its elements, and store."""
    DTYPE: tl.constexpr = OUT.dtype.element_ty
    if BIAS is not None:
        b_bias = tl.load(BIAS + o_col, mask=m_col, other=0.0).to(tl.float32)
        if FLIPPED:
            b_y += b_bias[:, None]
        else:
            b_y += b_bias[None, :]
    if DOWN is not None:
        if FLIPPED:
            b_term = _low_rank(UP, DOWN, o_col, m_col, o_row, m_row, rank, s_up, r_up, rank, 1, R, DTYPE, PRECISION)
            if DROPOUT:
                b_keep = tl.trans(kept(seed, dropout_p, o_row, o_col))
                b_term = tl.where(b_keep, b_term * keep_scale, 0.0)
        else:
            b_term = _low_rank(DOWN, UP, o_row, m_row, o_col, m_col, rank, rank, 1, s_up, r_up, R, DTYPE, PRECISION)
            if DROPOUT:
                b_term = tl.where(kept(seed, dropout_p, o_row, o_col), b_term * keep_scale, 0.0)
        b_y += b_term
    store_tile(b_y, OUT, o_row, m_row, o_col, m_col, width, FLIPPED)


@triton.jit
def store_tile(b_y, OUT, o_row, m_row, o_col, m_col, width, FLIPPED: tl.constexpr):
    """Store a tile of OUT [rows, width], rounded to its dtype."""
    b_y = b_y.to(OUT.dtype.element_ty)
    if FLIPPED:
        p_out = OUT + o_row.to(tl.int64)[None, :] * width + o_col[:, None]
        tl.store(p_out, b_y, mask=m_row[None, :] & m_col[:, None])
    else:
        p_out = OUT + o_row.to(tl.int64)[:, None] * width + o_col[None, :]
        tl.store(p_out, b_y, mask=m_row[:, None] & m_col[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_parts(
    PARTS,  # [SPLITS, rows, width] fp32
    BIAS,
    DOWN,
    UP,
    OUT,
    rows,
    width,
    rank,
    s_up,
    r_up,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sum of the parts, always in the same order, and the epilogue; grid: (column tiles * row tiles)."""
    tiles = tl.cdiv(width, BN)
    o_row = (tl.program_id(0) // tiles) * BM + tl.arange(0, BM)
    o_col = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    m_row, m_col = o_row < rows, o_col < width
    b_y = tl.zeros([BM, BN], tl.float32)
    for i in tl.static_range(SPLITS):
        o_part = (i * rows.to(tl.int64) + o_row)[:, None] * width + o_col[None, :]
        b_y += tl.load(PARTS + o_part, mask=m_row[:, None] & m_col[None, :], other=0.0)
    finish(b_y, o_row, m_row, o_col, m_col, BIAS, DOWN, UP, OUT, width, rank, s_up, r_up, dropout_p, keep_scale, seed,
           False, DROPOUT, R, PRECISION)  # fmt: skip

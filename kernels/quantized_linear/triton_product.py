"""The forward kernel: x W^T + bias + low-rank term, with W as the left operand.

The result is computed flipped, W x^T: few rows of x pad to 16 and not to 64, and decoded weights become the operand that
tensor cores of sm_90 take from registers. (Triton passes them through shared memory once, into the layout of the operand.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_codes import INV_127, block_scales, code_table, decode, load
from .triton_epilogue import UNSPECIALIZED, finish, store_tile


@triton.jit(do_not_specialize=UNSPECIALIZED)
def product_tiles(
    X,  # [rows, K]
    DATA,  # BITS 4: [N, K / 8] int32; 8: [N, K] int8
    SCALE,  # BITS 4: [N, K / BLOCK] fp32, or uint8 where nested; 8: [N] fp32
    CODE,  # [16] fp32; None for BITS 8
    NESTED_CODE,  # [256] fp32 or None
    NESTED_ABSMAX,
    NESTED_OFFSET,  # [1]
    BIAS,  # [N] or None
    DOWN,  # [rows, rank] or None
    UP,  # [N, rank]
    OUT,  # [rows, N]
    PARTS,  # [SPLITS, rows, N] fp32, in place of OUT, where K is split
    rows,
    N,
    K,
    rank,
    s_x,
    s_w,
    s_up,
    r_up,
    seed: tl.int64,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_RESULT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    LOOKUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile; grid: (row tiles * splits * column tiles), neighbours reading the same part of W.

    BITS 4: a step of BK lies within one block of each row of W. SCALE_RESULT multiplies the product of the bare codes
    with the scale, [BN, BM] numbers a step; else the codes are multiplied, [BN, BK] numbers.
    """
    DTYPE: tl.constexpr = X.dtype.element_ty
    tiles = tl.cdiv(rows, BM)
    i_p = tl.program_id(0)
    i_split = (i_p // tiles) % SPLITS
    o_row = (i_p % tiles) * BM + tl.arange(0, BM)
    o_n = (i_p // (tiles * SPLITS)) * BN + tl.arange(0, BN)
    m_row, m_n = o_row < rows, o_n < N
    m_w = m_n[:, None]
    if EVEN_N:
        m_w = None
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    start = i_split * share
    end = tl.minimum(start + share, K)
    o_k = tl.arange(0, BK)
    p_x = X + o_row.to(tl.int64)[None, :] * s_x + (start + o_k)[:, None]
    b_y = tl.zeros([BN, BM], tl.float32)
    if BITS == 4:
        table = code_table(CODE, DTYPE, LOOKUP)
        offset = 0.0
        if NESTED_CODE is not None:
            offset = tl.load(NESTED_OFFSET)
        p_w = DATA + o_n.to(tl.int64)[:, None] * s_w + (start // 8 + tl.arange(0, BK // 8))[None, :]
        o_block = o_n * (K // BLOCK)
        m_s = m_n
        if EVEN_N:
            m_s = None
        last = tl.maximum(K - BK, 0)
        b_scale = block_scales(
            SCALE, NESTED_CODE, NESTED_ABSMAX, offset, o_block + tl.minimum(start, last) // BLOCK, m_s
        )
        for k in range(start, end, BK):
            b_words = load(p_w, m_w)
            b_x = tl.load(p_x, mask=m_row[None, :], other=0.0)  # [BK, BM]
            if SCALE_RESULT:
                # Triton loads ahead what a dot reads. This is read after it, and has to be asked for a step earlier.
                o_next = o_block + tl.minimum(k + BK, last) // BLOCK
                b_next = block_scales(SCALE, NESTED_CODE, NESTED_ABSMAX, offset, o_next, m_s)
                b_w = decode(table, b_words, None, BN, BK, DTYPE, LOOKUP)
                b_y += tl.dot(b_w, b_x, input_precision=PRECISION) * b_scale[:, None]
                b_scale = b_next
            else:
                b_scale = block_scales(SCALE, NESTED_CODE, NESTED_ABSMAX, offset, o_block + k // BLOCK, m_s)
                b_w = decode(table, b_words, b_scale[:, None], BN, BK, DTYPE, LOOKUP)
                b_y = tl.dot(b_w, b_x, b_y, input_precision=PRECISION)
            p_w += BK // 8
            p_x += BK
    else:
        p_v = DATA + o_n.to(tl.int64)[:, None] * s_w + (start + o_k)[None, :]
        for k in range(start, end, BK):
            if EVEN_K:
                b_v = load(p_v, m_w)
                b_x = tl.load(p_x, mask=m_row[None, :], other=0.0)
            else:
                m_k = k + o_k < K
                b_v = tl.load(p_v, mask=m_n[:, None] & m_k[None, :], other=0)
                b_x = tl.load(p_x, mask=m_row[None, :] & m_k[:, None], other=0.0)
            b_y = tl.dot(b_v.to(DTYPE), b_x, b_y, input_precision=PRECISION)
            p_v += BK
            p_x += BK
        b_y *= (tl.load(SCALE + o_n, mask=m_n, other=0.0) * INV_127)[:, None]
    if SPLITS > 1:
        store_tile(b_y, PARTS + i_split.to(tl.int64) * rows * N, o_row, m_row, o_n, m_n, N, True)
    else:
        finish(b_y, o_row, m_row, o_n, m_n, BIAS, DOWN, UP, OUT, N, rank, s_up, r_up, 0.0, 1.0, seed,
               True, False, R, PRECISION)  # fmt: skip

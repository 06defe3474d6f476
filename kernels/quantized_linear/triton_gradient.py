"""The kernel of the input gradient, dY W + low-rank term: W is decoded tile by tile, and never held in 16 bit."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_codes import INV_127, block_scales, code_table, decode, load
from .triton_epilogue import UNSPECIALIZED, finish, store_tile


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_tiles(
    GRAD,  # [rows, N]
    DATA,  # BITS 4: [N, K / 8] int32; 8: [N, K] int8
    SCALE,  # BITS 4: [N, K / BLOCK] fp32, or uint8 where nested; 8: [N] fp32
    CODE,  # [16] fp32; None for BITS 8
    NESTED_CODE,  # [256] fp32 or None
    NESTED_ABSMAX,
    NESTED_OFFSET,  # [1]
    DOWN,  # [rows, rank] or None
    UP,  # [K, rank]
    OUT,  # [rows, K]
    PARTS,  # [SPLITS, rows, K] fp32, in place of OUT, where N is split
    rows,
    N,
    K,
    rank,
    s_grad,
    s_w,
    s_up,
    r_up,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
    FLIPPED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    LOOKUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile; grid: (row tiles * splits * column tiles), neighbours reading the same part of W.

    SCALE_GRAD multiplies dY with the scales (BITS 4: a tile of BK columns lies within one block of each row), [BM, BN]
    numbers a step; else W is multiplied, [BN, BK] numbers. FLIPPED computes W^T dY^T, for few rows.
    """
    DTYPE: tl.constexpr = GRAD.dtype.element_ty
    tiles = tl.cdiv(rows, BM)
    i_p = tl.program_id(0)
    i_split = (i_p // tiles) % SPLITS
    i_k = i_p // (tiles * SPLITS)
    o_row = (i_p % tiles) * BM + tl.arange(0, BM)
    o_k = i_k * BK + tl.arange(0, BK)
    m_row, m_k = o_row < rows, o_k < K
    share = tl.cdiv(tl.cdiv(N, BN), SPLITS) * BN
    start = i_split * share
    end = tl.minimum(start + share, N)
    o_step = tl.arange(0, BN)
    step_w = tl.full([], BN, tl.int64) * s_w
    if FLIPPED:
        b_dx = tl.zeros([BK, BM], tl.float32)
        p_grad = GRAD + o_row.to(tl.int64)[None, :] * s_grad + (start + o_step)[:, None]
    else:
        b_dx = tl.zeros([BM, BK], tl.float32)
        p_grad = GRAD + o_row.to(tl.int64)[:, None] * s_grad + (start + o_step)[None, :]
    table = 0
    offset = 0.0
    if BITS == 4:
        table = code_table(CODE, DTYPE, LOOKUP)
        if NESTED_CODE is not None:
            offset = tl.load(NESTED_OFFSET)
        o_word = tl.arange(0, BK // 8)
        m_word = i_k * (BK // 8) + o_word < K // 8
        p_w = DATA + (start + o_step).to(tl.int64)[:, None] * s_w + (i_k * (BK // 8) + o_word)[None, :]
        # The block of the whole tile, or of each word of its rows.
        o_block = (i_k * BK) // BLOCK
        if BLOCK % BK != 0:
            o_block = (i_k * BK + o_word * 8) // BLOCK
    else:
        p_w = DATA + (start + o_step).to(tl.int64)[:, None] * s_w + o_k[None, :]
    for n in range(start, end, BN):
        o_n = n + o_step
        m_n = o_n < N
        if FLIPPED:
            m_grad = m_row[None, :] & m_n[:, None]
            if EVEN_N:
                m_grad = m_row[None, :]
        else:
            m_grad = m_row[:, None] & m_n[None, :]
            if EVEN_N:
                m_grad = m_row[:, None]
        b_grad = tl.load(p_grad, mask=m_grad, other=0.0)
        if BITS == 4:
            m_w = m_n[:, None] & m_word[None, :]
            if EVEN_K:
                m_w = m_n[:, None]
                if EVEN_N:
                    m_w = None
            b_words = load(p_w, m_w)
            if BLOCK % BK != 0:
                o_scale = o_n[:, None] * (K // BLOCK) + o_block[None, :]
                b_scale = block_scales(SCALE, NESTED_CODE, NESTED_ABSMAX, offset, o_scale, m_w)  # [BN, BK / 8]
            else:
                m_s = m_n
                if EVEN_N:
                    m_s = None
                o_scale = o_n * (K // BLOCK) + o_block
                b_scale = block_scales(SCALE, NESTED_CODE, NESTED_ABSMAX, offset, o_scale, m_s)[:, None]
            if SCALE_GRAD:
                b_w = decode(table, b_words, None, BN, BK, DTYPE, LOOKUP)
            else:
                b_w = decode(table, b_words, b_scale, BN, BK, DTYPE, LOOKUP)
        else:
            m_w = m_n[:, None] & m_k[None, :]
            if EVEN_K and EVEN_N:
                m_w = None
            b_v = load(p_w, m_w)
            b_scale = (tl.load(SCALE + o_n, mask=m_n, other=0.0) * INV_127)[:, None]
            if SCALE_GRAD:
                b_w = b_v.to(DTYPE)
            else:
                b_w = (b_v.to(tl.float32) * b_scale).to(DTYPE)
        if SCALE_GRAD:
            if FLIPPED:
                b_grad = (b_grad * b_scale).to(DTYPE)
            else:
                b_grad = (b_grad * tl.trans(b_scale)).to(DTYPE)
        if FLIPPED:
            b_dx = tl.dot(tl.trans(b_w), b_grad, b_dx, input_precision=PRECISION)
        else:
            b_dx = tl.dot(b_grad, b_w, b_dx, input_precision=PRECISION)
        p_grad += BN
        p_w += step_w
    if SPLITS > 1:
        store_tile(b_dx, PARTS + i_split.to(tl.int64) * rows * K, o_row, m_row, o_k, m_k, K, FLIPPED)
    else:
        finish(b_dx, o_row, m_row, o_k, m_k, None, DOWN, UP, OUT, K, rank, s_up, r_up, dropout_p, keep_scale, seed,
               FLIPPED, DROPOUT, R, PRECISION)  # fmt: skip

"""The parts of the linear kernels: one tile of norm(x) W^T in fp32, and everything that a block does with it.

A program computes BM rows by BN output features. A prologue finds mean and rstd of its rows of x, which are in the L2
cache; the loop over K then normalises each tile of x as it is loaded and rounds it to the dtype of W, as a norm of its
own would. The epilogue works on the fp32 sums: bias, activation or norm of heads, dropout, row mask, gate, residual.

Few rows: with SLICES > 1 the warps of a program share out K, each with sums of its own, and W is the first operand of the
product, whose tiles are 16 features by 8 rows. So 16 features by 8 rows keep four warps busy, without idle rows, and every
warp streams its part of W. With SPLITS > 1 K is shared out over programs too; `linear_merge` adds their sums in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import activate, kept, row_offsets, row_statistics, tanh

# Lanes that row_statistics keeps for all rows of a tile together: with more, it takes too many registers.
STATISTICS_LANES: tl.constexpr = tl.constexpr(4096)


@triton.jit
def _column(b_rows, SLICES: tl.constexpr):
    """One value a row, for tiles [rows, BK], or [SLICES, rows, BK]."""
    if SLICES > 1:
        b_rows = b_rows[None, :, None]
    else:
        b_rows = b_rows[:, None]
    return b_rows


@triton.jit
def _load(p_block, m_rows, m_k):
    """A tile of rows, 0 where there is none; a mask may be None."""
    if m_rows is None and m_k is None:
        b_block = tl.load(p_block)
    elif m_rows is None:
        b_block = tl.load(p_block, mask=m_k, other=0.0)
    elif m_k is None:
        b_block = tl.load(p_block, mask=m_rows, other=0.0)
    else:
        b_block = tl.load(p_block, mask=m_rows & m_k, other=0.0)
    return b_block


@triton.jit
def _dot(b_x, b_w, b_sum, SLICES: tl.constexpr, PRECISION: tl.constexpr):
    if SLICES > 1:
        b_sum = tl.dot(b_w, b_x, b_sum, input_precision=PRECISION)  # [SLICES, BN, BM]
    else:
        b_sum = tl.dot(b_x, tl.trans(b_w), b_sum, input_precision=PRECISION)  # [BM, BN]
    return b_sum


@triton.jit
def sums(
    p_x,
    o_x,
    m_x,
    p_w,
    o_w,
    m_w,
    p_gw,
    o_gw,
    p_nw,
    p_nb,
    b_mean,
    b_rstd,
    start,
    end,
    NORMED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns start to end of norm(x) W^T and of norm(x) Wg^T, [BM, BN] each (the second only with p_gw)."""
    o_k = tl.arange(0, BK)
    if SLICES > 1:
        o_k = (tl.arange(0, SLICES)[:, None] * BK + o_k[None, :])[:, None, :]  # [SLICES, 1, BK]
        b_y = tl.zeros([SLICES, BN, BM], tl.float32)
    else:
        o_k = o_k[None, :]  # [1, BK]
        b_y = tl.zeros([BM, BN], tl.float32)
    o_x, m_x, o_w = _column(o_x, SLICES), _column(m_x, SLICES), _column(o_w, SLICES)
    if m_w is not None:
        m_w = _column(m_w, SLICES)
    if p_gw is not None:
        o_gw = _column(o_gw, SLICES)
    if NORMED:
        b_mean, b_rstd = _column(b_mean, SLICES), _column(b_rstd, SLICES)
    b_e = b_y
    p_x = p_x + o_x + o_k
    p_w = p_w + o_w + o_k
    if p_gw is not None:
        p_gw = p_gw + o_gw + o_k
    for k in range(start, end, SLICES * BK):
        if EVEN_K:
            m_k = None
        else:
            m_k = k + o_k < end
        b_x = _load(p_x + k, m_x, m_k)
        b_w = _load(p_w + k, m_w, m_k)
        if NORMED:
            b_x = (b_x.to(tl.float32) - b_mean) * b_rstd
            if p_nw is not None:
                b_x = b_x * _load(p_nw + k + o_k, None, m_k).to(tl.float32)
            if p_nb is not None:
                b_x = b_x + _load(p_nb + k + o_k, None, m_k).to(tl.float32)
        b_x = b_x.to(b_w.dtype)
        if SLICES > 1:
            b_x = tl.permute(b_x, (0, 2, 1))  # [SLICES, BK, BM]
        b_y = _dot(b_x, b_w, b_y, SLICES, PRECISION)
        if p_gw is not None:
            b_e = _dot(b_x, _load(p_gw + k, m_w, m_k), b_e, SLICES, PRECISION)
    if SLICES > 1:
        b_y = tl.trans(tl.sum(b_y, 0))
        if p_gw is not None:
            b_e = tl.trans(tl.sum(b_e, 0))
    return b_y, b_e


@triton.jit
def finish(
    b_y,
    b_e,
    o_row,
    m_row,
    o_n,
    m_n,
    p_bias,
    p_gate_bias,
    p_head,
    p_residual,
    o_residual,
    p_rnw,
    p_rnb,
    b_rmean,
    b_rrstd,
    p_gate,
    b_mask,
    p_out,
    o_out,
    p_pre,
    p_pre_gate,
    N,
    head_eps,
    dropout_p,
    keep_scale,
    seed,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    HEAD: tl.constexpr,
    RESIDUAL_NORMED: tl.constexpr,
    GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """From the sums [BM, BN] to the output; o_row are flat rows, o_residual and o_out where theirs begin.

    What backward needs is stored on the way: the sums before the activation (or norm of heads, or dropout).
    """
    m_tile = m_row[:, None] & m_n[None, :]
    o_flat = o_row.to(tl.int64)[:, None] * N + o_n[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if p_pre is not None:
        tl.store(p_pre + o_flat, b_y.to(p_pre.dtype.element_ty), mask=m_tile)
    if GLU:
        if p_gate_bias is not None:
            b_e += tl.load(p_gate_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if p_pre_gate is not None:
            tl.store(p_pre_gate + o_flat, b_e.to(p_pre_gate.dtype.element_ty), mask=m_tile)
        b_y = activate(b_e, ACTIVATION) * b_y
    else:
        b_y = activate(b_y, ACTIVATION)
    if HEAD > 0:
        # HEADS whole heads, or one head and idle columns after it.
        HEADS: tl.constexpr = BN // HEAD if BN % HEAD == 0 else 1
        b_y = tl.where(m_tile, b_y, 0.0)
        b_h = tl.reshape(b_y * b_y, (BM, HEADS, BN // HEADS))
        b_rstd = tl.rsqrt(tl.sum(b_h, 2) / HEAD + head_eps)  # [BM, HEADS]
        b_wide = tl.broadcast_to(b_rstd[:, :, None], (BM, HEADS, BN // HEADS))
        b_y = b_y * tl.reshape(b_wide, (BM, BN)) * tl.load(p_head + o_n % HEAD).to(tl.float32)[None, :]
    if p_residual is not None:
        if DROPOUT:
            b_y = tl.where(kept(seed, dropout_p, o_row, o_n), b_y * keep_scale, 0.0)
        if b_mask is not None:
            b_y = tl.where(b_mask[:, None], b_y, 0.0)
        if GATE == "scalar":
            b_y = b_y * tanh(tl.load(p_gate).to(tl.float32))
        if GATE == "vector":
            b_y = b_y * tanh(tl.load(p_gate + o_n, mask=m_n, other=0.0).to(tl.float32))[None, :]
        b_r = tl.load(p_residual + o_residual[:, None] + o_n[None, :], mask=m_tile, other=0.0).to(tl.float32)
        if RESIDUAL_NORMED:
            b_r = (b_r - b_rmean[:, None]) * b_rrstd[:, None]
            if p_rnw is not None:
                b_r = b_r * tl.load(p_rnw + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
            if p_rnb is not None:
                b_r = b_r + tl.load(p_rnb + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_y = b_r + b_y
    tl.store(p_out + o_out[:, None] + o_n[None, :], b_y.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def columns(i_n, N, BN: tl.constexpr, HEAD: tl.constexpr):
    """The features of a column tile and which of them there are; heads that do not fill a tile have one each."""
    STEP: tl.constexpr = HEAD if (HEAD > 0 and BN % HEAD != 0) else BN
    o_n = tl.arange(0, BN)
    m_n = (o_n < STEP) & (i_n * STEP + o_n < N)
    return i_n * STEP + o_n, m_n


@triton.jit
def statistics(p_base, o_rows, m_rows, width, eps, NORM: tl.constexpr, BM: tl.constexpr):
    """Mean and rstd of rows, [BM] each."""
    BC: tl.constexpr = STATISTICS_LANES // BM if BM >= 8 else 512
    return row_statistics(p_base, o_rows, m_rows, width, eps, NORM == "rms_norm", BM, BC, 3)


@triton.jit
def epilogue(
    b_y,
    b_e,
    o_row,
    m_row,
    o_n,
    m_n,
    BIAS,
    GATE_BIAS,
    HEAD_W,
    RESIDUAL,
    RNORM_W,
    RNORM_B,
    GATE_VALUES,
    ROW_MASK,
    OUT,
    PRE,
    PRE_GATE,
    s_ro,
    s_ri,
    rows,
    inner,
    N,
    reps,
    head_eps,
    dropout_p,
    keep_scale,
    seed,
    RNORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    HEAD: tl.constexpr,
    GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`finish` for rows of one kind, into OUT [rows, N]."""
    o_r, b_mask, b_rmean, b_rrstd = o_row, None, o_row, o_row
    if RESIDUAL is not None:
        o_r = row_offsets(o_row, inner, s_ro, s_ri)
    if ROW_MASK is not None:
        b_mask = tl.load(ROW_MASK + o_row, mask=m_row, other=0) != 0
    if RNORM != "":
        b_rmean, b_rrstd = statistics(RESIDUAL, o_r, m_row, N, reps, RNORM, BM)
    finish(
        b_y, b_e, o_row, m_row, o_n, m_n, BIAS, GATE_BIAS, HEAD_W, RESIDUAL, o_r, RNORM_W, RNORM_B, b_rmean, b_rrstd,
        GATE_VALUES, b_mask, OUT, o_row.to(tl.int64) * N, PRE, PRE_GATE, N, head_eps, dropout_p, keep_scale,
        seed, ACTIVATION, GLU, HEAD, RNORM != "", GATE, DROPOUT, BM, BN,
    )  # fmt: skip

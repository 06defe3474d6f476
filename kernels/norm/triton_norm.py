"""The kernels of layer_norm and rms_norm: whole rows in registers, several rows a program where they are short."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import kept, row_offsets

# Arguments on whose value no code may depend, because it changes from call to call.
UNSPECIALIZED = ("rows", "inner", "seed")


@triton.jit
def _statistics(b_x, m_d, eps, RMS: tl.constexpr, D: tl.constexpr):
    """(mean, rstd) of the rows of b_x [BM, BD] in fp32, [BM, 1] each; columns that are not m_d are 0. RMS: mean 0."""
    if RMS:
        b_mean = tl.zeros_like(tl.sum(b_x, 1, keep_dims=True))
        b_square = tl.sum(b_x * b_x, 1, keep_dims=True) / D
    else:
        b_mean = tl.sum(b_x, 1, keep_dims=True) / D
        # From the deviations, not from the squares: the row is at hand, and nothing cancels.
        b_deviation = tl.where(m_d, b_x - b_mean, 0.0)
        b_square = tl.sum(b_deviation * b_deviation, 1, keep_dims=True) / D
    return b_mean, tl.rsqrt(b_square + eps)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def norm_rows(
    X,  # rows [outer, inner, D]
    RESIDUAL,  # rows [outer, inner, D], or None
    WEIGHT,  # [D] or None
    BIAS,  # [D] or None
    OUT,  # [rows, D]
    SUM,  # [rows, D] residual + dropout(X), or None: not needed
    STATS,  # [2, rows] fp32 mean and rstd, or None: not needed
    s_xo,
    s_xi,
    s_ro,
    s_ri,
    rows,
    inner,
    eps,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    RMS: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """norm(residual + dropout(x)) of BM rows; grid: (row tiles)."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    m_row = o_row < rows
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    m_tile = m_row[:, None] & m_d
    b_x = tl.load(X + row_offsets(o_row, inner, s_xo, s_xi)[:, None] + o_d[None, :], mask=m_tile, other=0.0)
    b_x = b_x.to(tl.float32)  # [BM, BD]
    if DROPOUT:
        b_x = tl.where(kept(seed, dropout_p, o_row, o_d), b_x * keep_scale, 0.0)
    if RESIDUAL is not None:
        p_r = RESIDUAL + row_offsets(o_row, inner, s_ro, s_ri)[:, None] + o_d[None, :]
        b_x += tl.load(p_r, mask=m_tile, other=0.0).to(tl.float32)
    o_flat = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    if SUM is not None:
        tl.store(SUM + o_flat, b_x.to(SUM.dtype.element_ty), mask=m_tile)
    b_mean, b_rstd = _statistics(b_x, m_d, eps, RMS, D)
    if STATS is not None:
        o_stats = o_row[:, None]
        tl.store(STATS + o_stats, b_mean, mask=m_row[:, None])
        tl.store(STATS + rows + o_stats, b_rstd, mask=m_row[:, None])
    b_y = (b_x - b_mean) * b_rstd
    if WEIGHT is not None:
        b_y = b_y * tl.load(WEIGHT + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if BIAS is not None:
        b_y = b_y + tl.load(BIAS + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + o_flat, b_y.to(OUT.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "s_stats"))
def norm_rows_backward(
    GRAD,  # rows [outer, inner, D]
    SUM,  # rows [outer, inner, D]
    WEIGHT,  # [D] or None
    STATS,  # [2, rows] fp32, or None: found again
    D_SUM,  # [rows, D], or None: not needed
    D_X,  # [rows, D] the gradient of what dropout zeroes, or None: not needed
    WEIGHT_PARTS,  # [programs, D] fp32, or None: not needed
    BIAS_PARTS,  # [programs, D] fp32, or None: not needed
    s_go,
    s_gi,
    s_so,
    s_si,
    s_stats,  # from the means to the rstds
    rows,
    inner,
    eps,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    RMS: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """Row tiles i, i + programs, ...; grid: (programs). Gradients of weight and bias: the sums over a program's rows."""
    i_p = tl.program_id(0)
    programs = tl.num_programs(0)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    if WEIGHT is not None:
        b_w = tl.load(WEIGHT + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if WEIGHT_PARTS is not None:
        b_dw = tl.zeros([BM, BD], tl.float32)
    if BIAS_PARTS is not None:
        b_db = tl.zeros([BM, BD], tl.float32)
    for i in range(i_p, tl.cdiv(rows, BM), programs):
        o_row = i * BM + tl.arange(0, BM)
        m_row = o_row < rows
        m_tile = m_row[:, None] & m_d
        b_g = tl.load(GRAD + row_offsets(o_row, inner, s_go, s_gi)[:, None] + o_d[None, :], mask=m_tile, other=0.0)
        b_s = tl.load(SUM + row_offsets(o_row, inner, s_so, s_si)[:, None] + o_d[None, :], mask=m_tile, other=0.0)
        b_g, b_s = b_g.to(tl.float32), b_s.to(tl.float32)
        if STATS is not None:
            o_stats = o_row[:, None]
            b_mean = tl.load(STATS + o_stats, mask=m_row[:, None], other=0.0)
            b_rstd = tl.load(STATS + s_stats + o_stats, mask=m_row[:, None], other=0.0)
        else:
            b_mean, b_rstd = _statistics(b_s, m_d, eps, RMS, D)
        b_hat = tl.where(m_tile, (b_s - b_mean) * b_rstd, 0.0)
        if WEIGHT_PARTS is not None:
            b_dw += b_g * b_hat
        if BIAS_PARTS is not None:
            b_db += b_g
        if WEIGHT is not None:
            b_g = b_g * b_w
        b_d = b_g - b_hat * (tl.sum(b_g * b_hat, 1, keep_dims=True) / D)
        if not RMS:
            b_d -= tl.sum(b_g, 1, keep_dims=True) / D
        b_d = b_d * b_rstd
        o_flat = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
        if D_SUM is not None:
            tl.store(D_SUM + o_flat, b_d.to(D_SUM.dtype.element_ty), mask=m_tile)
        if D_X is not None:
            if DROPOUT:
                b_d = tl.where(kept(seed, dropout_p, o_row, o_d), b_d * keep_scale, 0.0)
            tl.store(D_X + o_flat, b_d.to(D_X.dtype.element_ty), mask=m_tile)
    o_part = i_p.to(tl.int64) * D + o_d
    if WEIGHT_PARTS is not None:
        tl.store(WEIGHT_PARTS + o_part, tl.sum(b_dw, 0), mask=o_d < D)
    if BIAS_PARTS is not None:
        tl.store(BIAS_PARTS + o_part, tl.sum(b_db, 0), mask=o_d < D)

"""The kernels of the linear ops: `linear_tiles` for one weight, `grouped_tiles` for two groups of rows with one each."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import row_offsets
from .triton_tiles import columns, epilogue, finish, statistics, sums

# Arguments on whose value no code may depend, because it changes from call to call.
UNSPECIALIZED = ("rows", "inner", "seed")
GROUPED_UNSPECIALIZED = ("rows", "inner", "base", "rows1", "inner1", "base1", "seed")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_tiles(
    X,  # rows [outer, inner, K]
    W,  # [N, K]
    GATE_W,  # [N, K]
    BIAS,
    GATE_BIAS,
    NORM_W,
    NORM_B,
    HEAD_W,  # [HEAD]
    RESIDUAL,  # rows [outer, inner, N]
    RNORM_W,
    RNORM_B,
    GATE_VALUES,  # [1] or [N]
    ROW_MASK,  # [rows] bytes
    OUT,  # [rows, N]
    PARTS,  # [SPLITS, rows, N] fp32, in place of the outputs, where K is split
    GATE_PARTS,  # the same for GATE_W
    PRE,  # [rows, N]
    PRE_GATE,  # [rows, N]
    s_xo,
    s_xi,
    s_w,
    s_gw,
    s_ro,
    s_ri,
    rows,
    inner,
    N,
    K,
    eps,
    reps,
    head_eps,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    NORM: tl.constexpr,
    RNORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEAD: tl.constexpr,
    GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile; grid: (row tiles * column tiles * splits), neighbours reading the same part of W."""
    tiles = tl.cdiv(rows, BM)
    i_p = tl.program_id(0)
    i_split = i_p % SPLITS
    i_m = (i_p // SPLITS) % tiles
    i_n = i_p // (SPLITS * tiles)
    o_row = i_m * BM + tl.arange(0, BM)
    m_row = o_row < rows
    o_n, m_n = columns(i_n, N, BN, HEAD)
    o_x = row_offsets(o_row, inner, s_xo, s_xi)
    b_mean, b_rstd = o_row, o_row
    if NORM != "":
        b_mean, b_rstd = statistics(X, o_x, m_row, K, eps, NORM, BM)
    start, end = 0, K
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(K, SLICES * BK), SPLITS) * SLICES * BK
        start = i_split * share
        end = tl.minimum(start + share, K)
    m_w = m_n
    if EVEN_N:
        m_w = None
    b_y, b_e = sums(
        X, o_x, m_row, W, o_n.to(tl.int64) * s_w, m_w, GATE_W, o_n.to(tl.int64) * s_gw, NORM_W, NORM_B,
        b_mean, b_rstd, start, end, NORM != "", EVEN_K, BM, BN, BK, SLICES, PRECISION,
    )  # fmt: skip
    if SPLITS > 1:
        o_part = (i_split.to(tl.int64) * rows + o_row)[:, None] * N + o_n[None, :]
        m_part = m_row[:, None] & m_n[None, :]
        tl.store(PARTS + o_part, b_y, mask=m_part)
        if GATE_W is not None:
            tl.store(GATE_PARTS + o_part, b_e, mask=m_part)
    else:
        epilogue(
            b_y, b_e, o_row, m_row, o_n, m_n, BIAS, GATE_BIAS, HEAD_W, RESIDUAL, RNORM_W, RNORM_B, GATE_VALUES, ROW_MASK,
            OUT, PRE, PRE_GATE, s_ro, s_ri, rows, inner, N, reps, head_eps,
            dropout_p, keep_scale, seed, RNORM, ACTIVATION, GATE_W is not None, HEAD, GATE, DROPOUT, BM, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_merge(
    PARTS,  # [SPLITS, rows, N] fp32; with one split, the result of another GEMM in any dtype
    GATE_PARTS,  # the same of the gate's weight, or None
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
    seed: tl.int64,
    RNORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEAD: tl.constexpr,
    GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The epilogue alone, over sums that splits of `linear_tiles` or another GEMM made; grid: (row tiles * column tiles)."""
    tiles = tl.cdiv(rows, BM)
    i_p = tl.program_id(0)
    o_row = (i_p % tiles) * BM + tl.arange(0, BM)
    m_row = o_row < rows
    o_n, m_n = columns(i_p // tiles, N, BN, HEAD)
    m_part = m_row[:, None] & m_n[None, :]
    b_y = tl.zeros([BM, BN], tl.float32)
    b_e = b_y
    for i in tl.static_range(SPLITS):
        o_part = (i * rows.to(tl.int64) + o_row)[:, None] * N + o_n[None, :]
        b_y += tl.load(PARTS + o_part, mask=m_part, other=0.0).to(tl.float32)
        if GATE_PARTS is not None:
            b_e += tl.load(GATE_PARTS + o_part, mask=m_part, other=0.0).to(tl.float32)
    epilogue(
        b_y, b_e, o_row, m_row, o_n, m_n, BIAS, GATE_BIAS, HEAD_W, RESIDUAL, RNORM_W, RNORM_B, GATE_VALUES, ROW_MASK,
        OUT, PRE, PRE_GATE, s_ro, s_ri, rows, inner, N, reps, head_eps,
        dropout_p, keep_scale, seed, RNORM, ACTIVATION, GATE_PARTS is not None, HEAD, GATE, DROPOUT, BM, BN,
    )  # fmt: skip


@triton.jit
def _either(second, b_second, b_first):
    """b_second or b_first; None where both are."""
    chosen = None
    if b_first is not None:
        chosen = tl.where(second, b_second, b_first)
    return chosen


@triton.jit(do_not_specialize=GROUPED_UNSPECIALIZED)
def grouped_tiles(
    X,  # rows [outer, inner, K]
    W,
    BIAS,
    NORM_W,
    NORM_B,
    RESIDUAL,
    RNORM_W,
    RNORM_B,
    OUT,  # rows [outer, inner, N]
    X1,  # the same of the second group, rows [outer, inner1, ...]
    W1,
    BIAS1,
    NORM_W1,
    NORM_B1,
    RESIDUAL1,
    RNORM_W1,
    RNORM_B1,
    OUT1,
    PRE,  # [rows of all groups, N]
    s_xo,
    s_xi,
    s_w,
    s_ro,
    s_ri,
    s_oo,
    s_oi,
    rows,
    inner,
    base,  # the flat row of the group's first row, among those of all groups
    s_xo1,
    s_xi1,
    s_w1,
    s_ro1,
    s_ri1,
    s_oo1,
    s_oi1,
    rows1,
    inner1,
    base1,
    N,
    K,
    eps,
    reps,
    eps1,
    reps1,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    NORM: tl.constexpr,
    RNORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one of two groups of rows, which have weights of their own; grid: (row tiles of both * column tiles)."""
    tiles = tl.cdiv(rows, BM)
    both = tiles + tl.cdiv(rows1, BM)
    i_p = tl.program_id(0)
    i_m = i_p % both
    i_n = i_p // both
    second = i_m >= tiles
    i_m = _either(second, i_m - tiles, i_m)
    X, W, OUT = _either(second, X1, X), _either(second, W1, W), _either(second, OUT1, OUT)
    # One by one: Triton 3.6 has no tuples with None in them.
    BIAS = _either(second, BIAS1, BIAS)
    NORM_W = _either(second, NORM_W1, NORM_W)
    NORM_B = _either(second, NORM_B1, NORM_B)
    RNORM_W = _either(second, RNORM_W1, RNORM_W)
    RNORM_B = _either(second, RNORM_B1, RNORM_B)
    RESIDUAL = _either(second, RESIDUAL1, RESIDUAL)
    s_xo, s_xi, s_w = _either(second, s_xo1, s_xo), _either(second, s_xi1, s_xi), _either(second, s_w1, s_w)
    s_ro, s_ri = _either(second, s_ro1, s_ro), _either(second, s_ri1, s_ri)
    s_oo, s_oi = _either(second, s_oo1, s_oo), _either(second, s_oi1, s_oi)
    rows, inner, base = _either(second, rows1, rows), _either(second, inner1, inner), _either(second, base1, base)
    eps, reps = _either(second, eps1, eps), _either(second, reps1, reps)
    o_row = i_m * BM + tl.arange(0, BM)
    m_row = o_row < rows
    o_n, m_n = columns(i_n, N, BN, 0)
    o_x = row_offsets(o_row, inner, s_xo, s_xi)
    b_mean, b_rstd, b_rmean, b_rrstd, o_r = o_row, o_row, o_row, o_row, o_row
    if NORM != "":
        b_mean, b_rstd = statistics(X, o_x, m_row, K, eps, NORM, BM)
    m_w = m_n
    if EVEN_N:
        m_w = None
    b_y, b_e = sums(
        X, o_x, m_row, W, o_n.to(tl.int64) * s_w, m_w, None, None, NORM_W, NORM_B,
        b_mean, b_rstd, 0, K, NORM != "", EVEN_K, BM, BN, BK, SLICES, PRECISION,
    )  # fmt: skip
    if RESIDUAL is not None:
        o_r = row_offsets(o_row, inner, s_ro, s_ri)
    if RNORM != "":
        b_rmean, b_rrstd = statistics(RESIDUAL, o_r, m_row, N, reps, RNORM, BM)
    finish(
        b_y, b_e, base + o_row, m_row, o_n, m_n, BIAS, None, None, RESIDUAL, o_r, RNORM_W, RNORM_B, b_rmean, b_rrstd,
        None, None, OUT, row_offsets(o_row, inner, s_oo, s_oi), PRE, None, N, 0.0, dropout_p, keep_scale, seed,
        ACTIVATION, False, 0, RNORM != "", "", DROPOUT, BM, BN,
    )  # fmt: skip

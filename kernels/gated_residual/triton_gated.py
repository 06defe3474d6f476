"""The kernels of gated_residual: tiles of rows and columns, whose masked rows are not read."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import row_offsets, tanh

# Arguments on whose value no code may depend, because it changes from call to call.
UNSPECIALIZED = ("rows", "inner")


@triton.jit
def _tanh_of_gate(GATE, o_d, m_d, SCALAR: tl.constexpr):
    """tanh(gate) in fp32: a scalar, or [1, BD]."""
    if SCALAR:
        b_t = tanh(tl.load(GATE).to(tl.float32))
    else:
        b_t = tanh(tl.load(GATE + o_d, mask=m_d, other=0.0).to(tl.float32))[None, :]
    return b_t


@triton.jit
def _seen(ROW_MASK, o_row, m_row, inner, s_mo, s_mi):
    """The rows whose branch counts."""
    if ROW_MASK is not None:
        m_row = m_row & (tl.load(ROW_MASK + row_offsets(o_row, inner, s_mo, s_mi), mask=m_row, other=0) != 0)
    return m_row


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gated_rows(
    RESIDUAL,  # rows [outer, inner, D]
    BRANCH,  # rows [outer, inner, D]
    GATE,  # [1] or [D]
    ROW_MASK,  # [outer, inner] bytes, or None
    OUT,  # [rows, D]
    s_ro,
    s_ri,
    s_bo,
    s_bi,
    s_mo,
    s_mi,
    rows,
    inner,
    D,
    SCALAR: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """Residual + tanh(gate) * branch of BM rows and BD columns; grid: (row tiles * column tiles)."""
    tiles = tl.cdiv(D, BD)
    i_p = tl.program_id(0)
    o_row = i_p // tiles * BM + tl.arange(0, BM)
    m_row = o_row < rows
    o_d = i_p % tiles * BD + tl.arange(0, BD)
    m_d = o_d < D
    m_tile = m_row[:, None] & m_d[None, :]
    p_r = RESIDUAL + row_offsets(o_row, inner, s_ro, s_ri)[:, None] + o_d[None, :]
    p_b = BRANCH + row_offsets(o_row, inner, s_bo, s_bi)[:, None] + o_d[None, :]
    m_seen = _seen(ROW_MASK, o_row, m_row, inner, s_mo, s_mi)
    b_r = tl.load(p_r, mask=m_tile, other=0.0).to(tl.float32)
    b_b = tl.load(p_b, mask=m_seen[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_y = b_r + _tanh_of_gate(GATE, o_d, m_d, SCALAR) * b_b
    o_flat = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(OUT + o_flat, b_y.to(OUT.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gated_rows_backward(
    GRAD,  # rows [outer, inner, D]
    BRANCH,  # rows [outer, inner, D]
    GATE,  # [1] or [D]
    ROW_MASK,  # [outer, inner] bytes, or None
    D_BRANCH,  # [rows, D], or None: not needed
    GATE_PARTS,  # [programs of a column, D] fp32, with a scalar gate [all programs]; None: not needed
    s_go,
    s_gi,
    s_bo,
    s_bi,
    s_mo,
    s_mi,
    rows,
    inner,
    D,
    SCALAR: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """Row tiles i, i + programs, ... of BD columns; grid: (programs, column tiles)."""
    i_p = tl.program_id(0)
    programs = tl.num_programs(0)
    i_d = tl.program_id(1)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_t = _tanh_of_gate(GATE, o_d, m_d, SCALAR)
    if GATE_PARTS is not None:
        b_sum = tl.zeros([BM, BD], tl.float32)
    for i in range(i_p, tl.cdiv(rows, BM), programs):
        o_row = i * BM + tl.arange(0, BM)
        m_row = o_row < rows
        m_seen = _seen(ROW_MASK, o_row, m_row, inner, s_mo, s_mi)
        m_read = m_seen[:, None] & m_d[None, :]
        p_g = GRAD + row_offsets(o_row, inner, s_go, s_gi)[:, None] + o_d[None, :]
        b_g = tl.load(p_g, mask=m_read, other=0.0).to(tl.float32)
        if GATE_PARTS is not None:
            p_b = BRANCH + row_offsets(o_row, inner, s_bo, s_bi)[:, None] + o_d[None, :]
            b_sum += b_g * tl.load(p_b, mask=m_read, other=0.0).to(tl.float32)
        if D_BRANCH is not None:
            o_flat = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
            tl.store(D_BRANCH + o_flat, (b_g * b_t).to(D_BRANCH.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])
    if GATE_PARTS is not None:
        if SCALAR:
            tl.store(GATE_PARTS + i_p * tl.num_programs(1) + i_d, tl.sum(tl.sum(b_sum, 1), 0))
        else:
            tl.store(GATE_PARTS + i_p.to(tl.int64) * D + o_d, tl.sum(b_sum, 0), mask=m_d)

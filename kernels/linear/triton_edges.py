"""The backward of what follows the product in a linear kernel: from dY to the gradient of x W^T + b, and column sums.

Bias and gate gradients are sums over all rows: each program adds up its own, and `kernels.sums` the programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import activate, activation_gradient, kept, row_offsets, tanh

UNSPECIALIZED = ("rows", "inner", "base", "seed")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def edge_backward(
    GRAD,  # rows [outer, inner, N]
    PRE,  # [total, N] before the activation, or dropout, mask and gate; None: not needed
    PRE_GATE,  # [total, N] with a gated activation
    GATE_VALUES,  # [1] or [N]
    ROW_MASK,  # [rows] bytes
    D_Y,  # [rows, N] the gradient of x W^T + b
    D_E,  # [rows, N] of x Wg^T + bg
    BIAS_PARTS,  # [programs of a column, N] fp32, column sums of D_Y; None: not needed
    GATE_BIAS_PARTS,  # of D_E
    GATE_PARTS,  # of dY * dropout(x W^T + b), masked; for a scalar gate [programs, 1] of all programs
    s_go,
    s_gi,
    rows,
    inner,
    base,  # the flat row of the first row, among those of all groups
    N,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Row tiles i, i + programs, ... of a tile of columns; grid: (programs, column tiles)."""
    i_p = tl.program_id(0)
    programs = tl.num_programs(0)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_bias = tl.zeros([BN], tl.float32)
    b_gate_bias = b_bias
    b_gate_sum = b_bias
    if GATE == "scalar":
        b_tanh = tanh(tl.load(GATE_VALUES).to(tl.float32))
    if GATE == "vector":
        b_tanh = tanh(tl.load(GATE_VALUES + o_n, mask=m_n, other=0.0).to(tl.float32))[None, :]
    for i in range(i_p, tl.cdiv(rows, BM), programs):
        o_row = i * BM + tl.arange(0, BM)
        m_row = o_row < rows
        m_tile = m_row[:, None] & m_n[None, :]
        o_flat = o_row.to(tl.int64)[:, None] * N + o_n[None, :]
        o_pre = o_flat + base.to(tl.int64) * N
        p_grad = GRAD + row_offsets(o_row, inner, s_go, s_gi)[:, None] + o_n[None, :]
        b_d = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
        if ACTIVATION != "":
            b_pre = tl.load(PRE + o_pre, mask=m_tile, other=0.0).to(tl.float32)
            if PRE_GATE is not None:
                b_e = tl.load(PRE_GATE + o_pre, mask=m_tile, other=0.0).to(tl.float32)
                b_de = b_d * b_pre * activation_gradient(b_e, ACTIVATION)
                tl.store(D_E + o_flat, b_de.to(D_E.dtype.element_ty), mask=m_tile)
                if GATE_BIAS_PARTS is not None:
                    b_gate_bias += tl.sum(b_de, 0)
                b_d = b_d * activate(b_e, ACTIVATION)
            else:
                b_d = b_d * activation_gradient(b_pre, ACTIVATION)
        else:
            if ROW_MASK is not None:
                b_mask = tl.load(ROW_MASK + o_row, mask=m_row, other=0) != 0
                b_d = tl.where(b_mask[:, None], b_d, 0.0)
            if DROPOUT:
                b_d = tl.where(kept(seed, dropout_p, base + o_row, o_n), b_d * keep_scale, 0.0)
            if GATE_PARTS is not None:
                b_pre = tl.load(PRE + o_pre, mask=m_tile, other=0.0).to(tl.float32)
                # The branch of a masked row may be NaN; its gradient is exactly 0.
                b_gate_sum += tl.sum(tl.where(b_d == 0.0, 0.0, b_d * b_pre), 0)
            if GATE != "":
                b_d = b_d * b_tanh
        tl.store(D_Y + o_flat, b_d.to(D_Y.dtype.element_ty), mask=m_tile)
        if BIAS_PARTS is not None:
            b_bias += tl.sum(b_d, 0)
    o_part = i_p.to(tl.int64) * N + o_n
    if BIAS_PARTS is not None:
        tl.store(BIAS_PARTS + o_part, b_bias, mask=m_n)
    if GATE_BIAS_PARTS is not None:
        tl.store(GATE_BIAS_PARTS + o_part, b_gate_bias, mask=m_n)
    if GATE_PARTS is not None:
        if GATE == "scalar":
            tl.store(GATE_PARTS + i_p * tl.num_programs(1) + tl.program_id(1), tl.sum(b_gate_sum, 0))
        else:
            tl.store(GATE_PARTS + o_part, b_gate_sum, mask=m_n)

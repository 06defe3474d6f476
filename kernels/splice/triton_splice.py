"""The kernels of `splice_rows`: a gather from two sources, and the sums that are its gradients.

One program moves BD columns of one row, so that a load is 16 bytes a thread and the branch on the row's source costs
nothing: the lanes of the source that is not read are masked off.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_rows(
    p_text, p_ids, p_features, p_index, p_out,
    stride_text, stride_features, width,
    BD: tl.constexpr,
):  # fmt: skip
    """out[r] = features[index[r]] where index[r] >= 0, else text[ids[r]] (text[r] without ids; 0 without text).

    Args:
        p_text: [rows or V, D], rows `stride_text` apart, or None.
        p_ids: [rows], or None.
        p_features: [N, D], rows `stride_features` apart, or None: spliced rows give 0.
        p_index: [rows].
        p_out: [rows, D], contiguous.
        stride_text, stride_features: in elements.
        width: D.
        BD: columns of one program.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < width
    i_feature = tl.load(p_index + i_row).to(tl.int64)
    spliced = i_feature >= 0
    b_row = tl.zeros([BD], dtype=p_out.dtype.element_ty)
    if p_text is not None:
        i_text = i_row
        if p_ids is not None:
            i_text = tl.load(p_ids + i_row, mask=i_feature < 0, other=0).to(tl.int64)
        b_row = tl.load(p_text + i_text * stride_text + o_d, mask=m_d & (i_feature < 0), other=0.0)  # [BD]
    if p_features is not None:
        b_feature = tl.load(p_features + i_feature * stride_features + o_d, mask=m_d & spliced, other=0.0)  # [BD]
        b_row = tl.where(spliced, b_feature, b_row)
    tl.store(p_out + i_row * width + o_d, b_row, mask=m_d)


@triton.jit
def sum_rows(
    p_grad, p_order, p_ends, p_out,
    stride_grad, width,
    BD: tl.constexpr,
):  # fmt: skip
    """out[n] = sum of grad[order[j]] for j from ends[n] to ends[n + 1], in that order and in fp32.

    Args:
        p_grad: [rows, D], rows `stride_grad` apart.
        p_order: [rows] int64, the rows sorted by what they read.
        p_ends: [N + 1] int64, where the readers of each n begin.
        p_out: [N, D], contiguous.
        stride_grad: in elements.
        width: D.
        BD: columns of one program.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < width
    start = tl.load(p_ends + i_n)
    end = tl.load(p_ends + i_n + 1)
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for j in range(start, end):
        i_row = tl.load(p_order + j)
        b_sum += tl.load(p_grad + i_row * stride_grad + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    tl.store(p_out + i_n * width + o_d, b_sum.to(p_out.dtype.element_ty), mask=m_d)

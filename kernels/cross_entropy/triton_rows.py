"""One kernel: the loss of each row of logits, and the gradient in place of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..target import on_device
from ..tile import tanh, to_base_2, to_base_e

# Elements of a row at a time. A row is read twice, the second time from the L2 cache.
BLOCK = 4096
WARPS = 8


@triton.jit
def _capped(b_x, softcap, SOFTCAP: tl.constexpr):
    """(z, dz/dx) of softcap * tanh(x / softcap), or of x."""
    b_slope = tl.full(b_x.shape, 1.0, tl.float32)
    if SOFTCAP:
        b_t = tanh(b_x / softcap)
        b_x = b_t * softcap
        b_slope = 1.0 - b_t * b_t
    return b_x, b_slope


@triton.jit
def cross_entropy_rows(
    p_logits, p_targets, p_losses, stride, size, label_smoothing, softcap,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a row: online logsumexp and mean over the vocabulary, then the gradient over the same row."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * stride
    target = tl.load(p_targets + i_row)
    o_v = tl.arange(0, BV)
    # Every lane has its own maximum and sum: one reduction at the end instead of one a block.
    b_max = tl.full([BV], float("-inf"), tl.float32)
    b_sum = tl.zeros([BV], tl.float32)
    b_total = tl.zeros([BV], tl.float32)
    for v in tl.range(0, size, BV):
        m_v = v + o_v < size
        b_x = tl.load(p_row + v + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_z, _ = _capped(b_x, softcap, SOFTCAP)
        if SMOOTHING:
            b_total += tl.where(m_v, b_z, 0.0)
        b_z = tl.where(m_v, to_base_2(b_z), float("-inf"))
        b_new = tl.maximum(b_max, b_z)
        # A lane that has seen nothing keeps -inf, and -inf - -inf must not become NaN.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_base) + tl.exp2(b_z - b_base)
        b_max = b_new
    top = tl.max(b_max, 0)
    lse = top + tl.log2(tl.sum(b_sum * tl.exp2(b_max - top), 0))  # in base 2
    picked, _ = _capped(tl.load(p_row + target).to(tl.float32), softcap, SOFTCAP)
    loss = to_base_e(lse) - picked
    if SMOOTHING:
        loss += label_smoothing * (picked - tl.sum(b_total, 0) / size)
    tl.store(p_losses + i_row, loss)
    if GRADIENT:
        # Before a thread overwrites the target's logit, every thread has read it.
        tl.debug_barrier()
        for v in tl.range(0, size, BV):
            m_v = v + o_v < size
            b_x = tl.load(p_row + v + o_v, mask=m_v, other=0.0).to(tl.float32)
            b_z, b_slope = _capped(b_x, softcap, SOFTCAP)
            b_d = tl.exp2(to_base_2(b_z) - lse) - label_smoothing / size
            b_d = tl.where(v + o_v == target, b_d - (1.0 - label_smoothing), b_d) * b_slope
            tl.store(p_row + v + o_v, b_d.to(p_logits.dtype.element_ty), mask=m_v)


def chunk_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`reference.chunk_loss` on a GPU, for fp32, bf16 and fp16: the gradient takes the place of the logits."""
    rows, size = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        cross_entropy_rows[(rows,)](
            logits, targets, losses, logits.stride(0), size, label_smoothing, softcap or 1.0,
            SOFTCAP=softcap is not None, SMOOTHING=label_smoothing > 0, GRADIENT=gradient,
            BV=min(BLOCK, triton.next_power_of_2(size)), num_warps=WARPS,
        )  # fmt: skip
    return losses.sum(), logits if gradient else None

"""The definition of `attention` in PyTorch: a plan's segments run one after another, and their pieces merged.

No tensor here has a size of queries x keys beyond the bounded blocks of `dense`: neither the mask nor the scores, and
the two key sources are never concatenated. On a CPU each piece is one call of torch's flash kernel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dense
from .dense import Dropout, compute_dtype
from .plan import Piece, Plan, Segment

Source = tuple[Tensor, Tensor]  # k, v


def run(
    plan: Plan,
    q: Tensor,
    sources: tuple[Source, ...],
    scale: float,
    dropout_p: float,
    seed: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The output [B, Lq, H, D] in `dtype`, and the logsumexp [B, Lq, H] in fp32 (fp64 for fp64).

    The logsumexp of rows that see nothing is -inf; it is None where no row sees anything.
    """
    dropout = Dropout.start(dropout_p, seed, q.device)
    wide = compute_dtype(q.dtype)
    sources = _widen_reread(plan, sources, wide)
    if len(plan.segments) == 1 and plan.covers:
        out, lse = _run_segment(plan.segments[0], q, sources, scale, wide, dropout)
        return out.to(dtype), lse
    # Rows of no segment see nothing.
    total = q.new_empty(q.shape, dtype=dtype) if plan.covers else q.new_zeros(q.shape, dtype=dtype)
    total_lse = q.new_full(q.shape[:-1], -math.inf, dtype=wide) if plan.segments else None
    for segment in plan.segments:
        out, lse = _run_segment(segment, q, sources, scale, wide, dropout)
        segment.rows.write(total, out)
        if total_lse is not None:
            segment.rows.write(total_lse, lse)
    return total, total_lse


def infer(plan: Plan, q: Tensor, sources: tuple[Source, ...], scale: float, dropout_p: float, seed: int) -> Tensor:
    """The output alone, where no backward pass will want the logsumexp."""
    if dropout_p == 0.0 and len(plan.segments) == 1 and plan.covers:
        pieces = plan.segments[0].pieces
        if not any(piece.causal or piece.uniform for piece in pieces):
            taken = [(piece.keys.take(k), piece.keys.take(v)) for piece in pieces for k, v in [sources[piece.source]]]
            out = dense.inference(q, taken, scale)
            if out is not None:
                return out
    return run(plan, q, sources, scale, dropout_p, seed, q.dtype)[0]


def _run_segment(
    segment: Segment, q: Tensor, sources: tuple[Source, ...], scale: float, wide: torch.dtype, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    rows = segment.rows.take(q).to(wide)
    merged: tuple[Tensor, Tensor] | None = None
    for piece in segment.pieces:
        k, v = _read(piece, sources, wide)
        part = dense.forward(rows, k, v, 0.0 if piece.uniform else scale, piece.causal, dropout)
        merged = part if merged is None else dense.merge(*merged, *part)
    assert merged is not None, "a segment has at least one piece"
    return merged


def _read(piece: Piece, sources: tuple[Source, ...], wide: torch.dtype) -> Source:
    k, v = sources[piece.source]
    v = piece.keys.take(v).to(wide)
    # Scores that are a constant come of no key, which may then be anything, NaN included.
    return (v if piece.uniform else piece.keys.take(k).to(wide)), v


def _widen_reread(plan: Plan, sources: tuple[Source, ...], wide: torch.dtype) -> tuple[Source, ...]:
    """Widen a source that is read more than once as a whole, once; any other is widened piece by piece."""
    return tuple(
        (k.to(wide), v.to(wide)) if again else (k, v) for (k, v), again in zip(sources, plan.rereads, strict=False)
    )


def forward(
    plan: Plan, q: Tensor, sources: tuple[Source, ...], scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(output in q's dtype, what rounding it to 16 bits lost, logsumexp): what the backward pass needs.

    That pass subtracts rowsum(grad * output) from the gradient of every score. With a rounded output the scores'
    gradients no longer sum to 0 in a row, and what all keys have in common (their bias, their mean) is multiplied by the
    difference.
    """
    exact, lse = run(plan, q, sources, scale, dropout_p, seed, compute_dtype(q.dtype))
    out = exact.to(q.dtype)
    return out, None if out.dtype == exact.dtype else (exact - out).to(q.dtype), lse


def backward(
    plan: Plan,
    grad: Tensor,
    q: Tensor,
    sources: tuple[Source, ...],
    out: Tensor,
    lost: Tensor | None,
    lse: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, list[Tensor]]:
    """dq, and (dk, dv) of each source one after another; each in the dtype of what it is the gradient of."""
    if lost is not None:
        out = out.to(compute_dtype(q.dtype)) + lost
    dropout = Dropout.start(dropout_p, seed, q.device)
    wide = compute_dtype(q.dtype)
    dq = q.new_empty(q.shape) if plan.covers else q.new_zeros(q.shape)
    totals = []
    for number, (k, v) in enumerate(sources):
        # Pieces that touch the same keys are summed in the compute dtype and rounded once.
        dtype = k.dtype if plan.alone(number, k.shape[0], k.shape[1]) else wide
        totals.append((k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)))
    sources = _widen_reread(plan, sources, wide)
    for segment in plan.segments:
        assert lse is not None
        rows, rows_grad, rows_out = (segment.rows.take(x).to(wide) for x in (q, grad, out))
        rows_lse = segment.rows.take(lse)
        rows_dq: Tensor | None = None
        for piece in segment.pieces:
            k, v = _read(piece, sources, wide)
            piece_scale = 0.0 if piece.uniform else scale
            part, dk, dv = dense.backward(rows_grad, rows, k, v, rows_out, rows_lse, piece_scale, piece.causal, dropout)
            rows_dq = part if rows_dq is None else rows_dq + part
            if not piece.uniform:
                piece.keys.add(totals[piece.source][0], dk)
            piece.keys.add(totals[piece.source][1], dv)
        assert rows_dq is not None
        segment.rows.write(dq, rows_dq)
    return dq, [total.to(q.dtype) for pair in totals for total in pair]


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context without autocast: the inputs have their dtype already, and what follows is wide on purpose."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class Attention(torch.autograd.Function):
    """Attention with a backward of its own. Saved: the inputs, what `forward` returns, and the dropout seed."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, scale: float, dropout_p: float, seed: int, q: Tensor, *flat: Tensor) -> Tensor:
        """The output; `flat` is k, v and, where there is a second source, extra_k, extra_v."""
        with without_autocast(q.device.type):
            out, lost, lse = forward(plan, q, pairs(flat), scale, dropout_p, seed)
        ctx.save_for_backward(q, *flat, out, lost, lse)
        ctx.settings = plan, scale, dropout_p, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors, and None for the rest."""
        q, *flat, out, lost, lse = ctx.saved_tensors
        plan, *settings = ctx.settings
        with without_autocast(q.device.type):
            dq, rest = backward(plan, grad, q, pairs(flat), out, lost, lse, *settings)
        return None, None, None, None, dq, *rest


def pairs(flat: Sequence[Tensor]) -> tuple[Source, ...]:
    """k, v, extra_k, extra_v as sources."""
    return tuple(zip(flat[::2], flat[1::2], strict=True))

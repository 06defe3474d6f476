"""Training through a frozen pre-norm decoder layer, LLaMA's or OPT's, keeping the least for backward.

Per token of width h, with f the MLP's: the layer's input and the stream between its halves (2 h), queries and keys,
turned where positions are rotary, values and the attention's result (4 h with as many key heads as query heads), gate
and up of a gated MLP (2 f), or what the activation of another one is given (f; a ReLU's result tells it). That is what
an autograd graph of such a layer cannot do without unless it computes projections again; everything else is computed
anew in backward, elementwise: both norms, the MLP's hidden activations, dropout patterns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..kernels.norm import Norm
from ..kernels.norm.reference import dropout
from ..kernels.quantized_linear import Projection

Rotation = tuple[Tensor, Tensor]  # cos and sin
Activation = Literal["swiglu", "relu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm whose parameters are not trained."""

    norm: Norm

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """norm(x) in `dtype`."""
        return ops.normalize(x, self.norm).to(dtype)

    def again(self, x: Tensor, dtype: torch.dtype, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """x as a leaf, and its norm with the graph to that leaf, where there is to be a gradient."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(gradient)
            return leaf, self(leaf, dtype)


@dataclass(frozen=True, eq=False)
class Call:
    """What a function here needs besides tensors that may get gradients.

    Attributes:
        dtype: in which the linear layers compute.
        projections: the linear layers.
        norm: of the input; None: there is none.
        rotation: cos and sin [B or 1, S, D], by which results are turned; how many, counted from the first, says `turned`.
        turned: see `rotation`.
        activation: of an MLP.
        dropout_p, seed: of the last projection's result, before a residual is added.
    """

    dtype: torch.dtype
    projections: tuple[Projection, ...]
    norm: FrozenNorm | None = None
    rotation: Rotation | None = None
    turned: int = 0
    activation: Activation = "swiglu"
    dropout_p: float = 0.0
    seed: int = 0

    def dropped(self, y: Tensor) -> Tensor:
        """y [M, N] after dropout; what it zeroes is a function of the seed, hence the same in backward."""
        return dropout(y, self.dropout_p, self.seed)


def norm_projections(x: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Every projection of norm(x), the first `turned` of them with rotary positions (arXiv 2104.09864, eq. 34).

    Args:
        x: [B, S, K].

    Returns:
        [B, S, N] each, in `call.dtype`.

    Saved for backward: x, and of each low-rank term its matrices and dropout(norm(x)) a^T.
    """
    found: tuple[Tensor, ...] = _NormProjections.apply(call, x, *_adapters(call))
    return found


def projection_residual(x: Tensor, residual: Tensor, call: Call) -> Tensor:
    """residual + dropout(projection(x)), in the dtype of `residual` [B, S, N], with the one of `call.projections`.

    Saved for backward: nothing; with a low-rank term x [B, S, K] where its first matrix is trained, and what
    `norm_projections` saves of it.
    """
    y: Tensor = _ProjectionResidual.apply(call, x, residual, *_adapters(call))
    return y


def mlp_residual(x: Tensor, call: Call) -> Tensor:
    """x + dropout(down(act(up(norm(x))))), with `call.projections` up and down and the activation `call.activation`.

    "swiglu" is silu(gate(norm(x))) * up(norm(x)) in its place (arXiv 2002.05202, eq. 6), of projections gate, up, down.

    Args:
        x: [B, S, K].

    Returns:
        [B, S, K] in the dtype of x.

    Saved for backward: x; gate and up [B, S, f], or up alone, after a ReLU, before another activation; and what
    `norm_projections` saves of low-rank terms.
    """
    y: Tensor = _MlpResidual.apply(call, x, *_adapters(call))
    return y


def _adapters(call: Call) -> list[Tensor | None]:
    """The matrices of the low-rank terms, two a projection; under autocast in the dtype that it wants."""
    return [
        t.to(call.dtype) if t is not None and torch.is_autocast_enabled(t.device.type) else t
        for projection in call.projections
        for t in ((None, None) if projection.lora is None else (projection.lora.a, projection.lora.b))
    ]


def _pairs(flat: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _plainly(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Without autocast, which would cast what these functions have cast already."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _rotate(heads: Tensor, rotation: Rotation, *, back: bool) -> Tensor:
    """heads [B, S, H, D] turned by their position's angles, or back: out_1 = x_1 cos - x_2 sin, out_2 = x_2 cos + x_1 sin."""
    cos, sin = (t.unsqueeze(2) for t in rotation)
    half = heads.shape[-1] // 2
    out = heads * cos
    sign = 1 if back else -1
    # A turn back multiplies each half's sine with the other half's gradient.
    low, high = (sin[..., half:], sin[..., :half]) if back else (sin[..., :half], sin[..., half:])
    out[..., :half].addcmul_(heads[..., half:], low, value=sign)
    out[..., half:].addcmul_(heads[..., :half], high, value=-sign)
    return out


def _turned(rows: Tensor, shape: torch.Size, rotation: Rotation | None, *, back: bool = False) -> Tensor:
    """Rows [M, H * D] of a batch [B, S] after `_rotate`."""
    if rotation is None:
        return rows
    heads = rows.view(*shape[:2], -1, rotation[0].shape[-1])
    return _rotate(heads, rotation, back=back).view(rows.shape)


class _NormProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *adapters: Tensor | None) -> tuple[Tensor, ...]:
        assert call.norm is not None
        with _plainly(x.device.type):
            rows = call.norm(x, call.dtype).view(-1, x.shape[-1])
            outs, downs = [], []
            for i, (projection, adapter) in enumerate(zip(call.projections, _pairs(adapters), strict=True)):
                y, down = projection.forward(rows, adapter)
                outs.append(_turned(y, x.shape, call.rotation if i < call.turned else None).view(*x.shape[:-1], -1))
                downs.append(down)
        ctx.call = call
        ctx.save_for_backward(x, *downs, *adapters)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad
        count = len(call.projections)
        x, *rest = ctx.saved_tensors
        downs, adapters = rest[:count], _pairs(rest[count:])
        with _plainly(x.device.type):
            leaf, normed = call.norm.again(x, call.dtype, gradient=needs[1])
            rows, total, found = normed.detach().view(-1, x.shape[-1]), None, []
            for i, projection in enumerate(call.projections):
                grad = grads[i].reshape(rows.shape[0], -1)
                grad = _turned(grad, x.shape, call.rotation if i < call.turned else None, back=True)
                wanted = (needs[1], *needs[2 + 2 * i : 4 + 2 * i])
                dx, da, db = projection.backward(grad, rows, adapters[i], downs[i], wanted, total)
                total = dx if total is None else total
                found += [da, db]
            dx = torch.autograd.grad(normed, leaf, total.view(x.shape))[0] if total is not None else None
        return None, dx, *found


class _ProjectionResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, residual: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        (projection,) = call.projections
        with _plainly(x.device.type):
            y, down = projection.forward(x.reshape(-1, x.shape[-1]), (a, b))
            y = call.dropped(y)
        ctx.call, ctx.shape = call, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, down, a, b)
        return _added(residual, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (projection,) = ctx.call.projections
        _, need_x, need_residual, need_a, need_b = ctx.needs_input_grad
        x, down, a, b = ctx.saved_tensors
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        with _plainly(grad.device.type):
            dy = ctx.call.dropped(_rows(grad, ctx.call.dtype))
            dx, da, db = projection.backward(dy, rows, (a, b), down, (need_x, need_a, need_b))
        return None, None if dx is None else dx.view(ctx.shape), grad if need_residual else None, da, db


class _MlpResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *adapters: Tensor | None) -> Tensor:
        assert call.norm is not None
        (*ups, last), (*pairs, last_pair) = call.projections, _pairs(adapters)
        with _plainly(x.device.type):
            rows = call.norm(x, call.dtype).view(-1, x.shape[-1])
            found = [up.forward(rows, pair) for up, pair in zip(ups, pairs, strict=True)]
            kept, downs = [y for y, _ in found], [down for _, down in found]
            if call.activation == "relu":
                kept[0].relu_()
            y, down = last.forward(_hidden(kept, call.activation), last_pair)
            y = call.dropped(y)
        ctx.call = call
        ctx.save_for_backward(x, *kept, *downs, down, *adapters)
        return _added(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad
        *ups, last = call.projections
        x, *rest = ctx.saved_tensors
        kept, rest = rest[: len(ups)], rest[len(ups) :]
        (*downs, down), (*pairs, last_pair) = rest[: len(ups) + 1], _pairs(rest[len(ups) + 1 :])
        with _plainly(x.device.type):
            hidden = _hidden(kept, call.activation) if needs[-2] else None
            dy = call.dropped(_rows(grad, call.dtype))
            dh, *d_last = last.backward(dy, hidden, last_pair, down, (any(needs[1:-2]), *needs[-2:]))
            del hidden, dy
            if dh is None:
                return None, grad if needs[1] else None, *[None] * (2 * len(ups)), *d_last
            leaf, normed = call.norm.again(x, call.dtype, gradient=needs[1])
            rows, total, d_ups = normed.detach().view(-1, x.shape[-1]), None, []
            d_hidden = _hidden_backward(dh, kept, call.activation)
            del dh  # its memory is the first of them, and free once that is used
            for i, d_up in enumerate(d_hidden):
                wanted = (needs[1], *needs[2 + 2 * i : 4 + 2 * i])
                dx, *d_ab = ups[i].backward(d_up, rows, pairs[i], downs[i], wanted, total)
                total = dx if total is None else total
                d_ups += d_ab
                del d_up
            if total is not None:
                total = _added(grad, torch.autograd.grad(normed, leaf, total.view(x.shape))[0])
        return None, total, *d_ups, *d_last


def _hidden(kept: Sequence[Tensor], activation: Activation) -> Tensor:
    """What an MLP's last projection is given, from what is kept."""
    if activation == "swiglu":
        return F.silu(kept[0]).mul_(kept[1])
    if activation == "relu":
        return kept[0]
    return F.gelu(kept[0], approximate=_APPROXIMATE[activation])


def _hidden_backward(dh: Tensor, kept: Sequence[Tensor], activation: Activation) -> Iterator[Tensor]:
    """The gradients of the other projections' results, one after the other; the memory of dh is used."""
    if activation == "swiglu":
        gate, up = kept
        d_up = F.silu(gate).mul_(dh)
        dh.mul_(up)
        yield torch.ops.aten.silu_backward.grad_input(dh, gate, grad_input=dh)
        del dh
        yield d_up
    elif activation == "relu":
        yield torch.ops.aten.threshold_backward.grad_input(dh, kept[0], 0, grad_input=dh)
    else:
        approximate = _APPROXIMATE[activation]
        yield torch.ops.aten.gelu_backward.grad_input(dh, kept[0], approximate=approximate, grad_input=dh)


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def _rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).to(dtype)


def _added(residual: Tensor, y: Tensor) -> Tensor:
    """residual [B, S, N] + y [M, N] in the residual's dtype; y's memory is used where that is its own."""
    y = y.view(residual.shape)
    return y.add_(residual) if y.dtype == residual.dtype else residual + y

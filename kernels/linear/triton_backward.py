"""Launches the backward of the linear kernels: the epilogue's, the vendor's GEMMs for dX and dW, and the norms'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import target
from ..rows import as_rows
from ..sizes import cdiv
from ..sums import column_sums
from ..target import keep_scale, on_device
from . import configs
from .call import Extras, Group, Numbers, Saved, unflatten
from .norm_calls import norm_backward, normalized
from .triton_edges import edge_backward


class _Edge(NamedTuple):
    """The gradients of what a group's GEMMs gave, [rows, N], and of what was added to that or multiplied with it."""

    y: Tensor
    e: Tensor | None = None
    bias: Tensor | None = None
    extras: Extras = Extras()


def backward(
    grad: Tensor,
    inners: Sequence[int],
    groups: Sequence[Group],
    extras: Extras,
    numbers: Numbers,
    saved: Saved,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of all tensors of the groups, and of the extras, one after the other; None where not needed.

    Args:
        grad: dY [..., N].
        inners: of several groups, how many rows each has along the second last dimension.
        groups, extras, numbers, saved: of forward; only what `kept` keeps.
        needs: for each tensor of the groups and of the extras, whether its gradient is wanted.

    Returns:
        Each in the shape of its tensor. That of a residual may be (a view of) `grad`, in its dtype.
    """
    parts = grad.split(list(inners), -2) if len(groups) > 1 else (grad,)
    needing, extras_need = unflatten(needs)
    results: list[Tensor | None] = []
    of_extras, base = Extras(), 0
    with on_device(grad):
        for i, (part, group, need) in enumerate(zip(parts, groups, needing, strict=True)):
            if part.numel() == 0:
                results += _zeros(part, group, need)
            else:
                found, of_extras = _group(part, group, extras, numbers, saved, i, base, need, extras_need)
                results += found
            base += part.shape[:-1].numel()
    if grad.numel() == 0:
        of_extras = Extras(*(None if t is None else torch.zeros_like(t) for t in extras))
    return *results, *(t if n else None for t, n in zip(of_extras, extras_need, strict=True))


def _zeros(grad: Tensor, g: Group, need: Group) -> list[Tensor | None]:
    """The gradients of a group without rows, or without features."""
    x = grad.new_zeros((*grad.shape[:-1], g.weight.shape[1]), dtype=g.weight.dtype) if g.x is None else g.x
    g = g._replace(x=x, residual=grad if g.residual is None else g.residual)
    return [torch.zeros_like(t) if n and t is not None else None for t, n in zip(g, need, strict=True)]


def _group(
    grad: Tensor,
    g: Group,
    extras: Extras,
    n: Numbers,
    saved: Saved,
    i: int,
    base: int,
    need: Group,
    extras_need: Extras,
) -> tuple[list[Tensor | None], Extras]:
    """The gradients of the i-th group, whose rows begin at `base` among those of all, and of the extras."""
    of_residual: Sequence[Tensor | None] = (grad if need.residual else None, None, None)
    if n.rnorm and any(need[5:]):
        assert g.residual is not None
        wanted = (bool(need.residual), bool(need.rnorm_weight), bool(need.rnorm_bias))
        of_residual = norm_backward(grad, g.residual, n.rnorm, g.rnorm_weight, g.rnorm_bias, n.reps[i], wanted)
    if not any(need[:5]) and not any(extras_need):
        return [*[None] * 5, *of_residual], Extras()
    edge = _edge(grad, g, extras, n, saved, base, bool(need.bias), extras_need)
    of_weight = of_gate_weight = None
    of_x: Sequence[Tensor | None] = (None, None, None)
    if need.x or need.norm_weight or need.norm_bias:
        dx = edge.y @ g.weight
        if edge.e is not None and extras.gate_weight is not None:
            dx.addmm_(edge.e, extras.gate_weight)
        dx = dx.view(*grad.shape[:-1], g.weight.shape[1])
        of_x = (dx, None, None)
        if n.norm:
            wanted = (bool(need.x), bool(need.norm_weight), bool(need.norm_bias))
            of_x = norm_backward(dx, g.x, n.norm, g.norm_weight, g.norm_bias, n.eps[i], wanted)
    if need.weight or extras_need.gate_weight:
        x = g.x
        if n.norm:
            x = normalized(x, n.norm, g.norm_weight, g.norm_bias, n.eps[i], g.weight.dtype)
        x = x.reshape(-1, x.shape[-1])
        if need.weight:
            of_weight = edge.y.t() @ x
        if extras_need.gate_weight:
            assert edge.e is not None
            of_gate_weight = edge.e.t() @ x
    return [of_x[0], of_weight, edge.bias, *of_x[1:], *of_residual], edge.extras._replace(gate_weight=of_gate_weight)


def _edge(
    grad: Tensor, g: Group, extras: Extras, n: Numbers, saved: Saved, base: int, need_bias: bool, extras_need: Extras
) -> _Edge:
    """Backward through what follows the GEMMs of a group."""
    features, dtype = g.weight.shape[0], g.weight.dtype
    rows = grad.shape[:-1].numel()
    if extras.head:
        assert saved.pre is not None
        shape = (rows, features // extras.head, extras.head)
        wanted = (True, bool(extras_need.head_weight), False)
        of_heads, head_weight, _ = norm_backward(
            grad.reshape(shape), saved.pre.view(shape), "rms_norm", extras.head_weight, None, n.head_eps, wanted
        )
        assert of_heads is not None
        y = of_heads.view(rows, features)
        return _Edge(y, None, y.sum(0) if need_bias else None, Extras(head_weight=head_weight))
    if not n.activation and not extras.gate_kind and extras.row_mask is None and not n.dropout_p:
        y = grad.reshape(rows, features).to(dtype)
        return _Edge(y, None, y.sum(0, dtype=None if g.bias is None else g.bias.dtype) if need_bias else None)
    config = configs.edge_config(features)
    columns = cdiv(features, config.BN)
    programs = cdiv(rows, config.BM)
    if need_bias or extras_need.gate_bias or extras_need.gate:
        programs = min(programs, configs.summing_programs(target.arch_of(grad.device), columns))

    def parts(needed: object, shape: tuple[int, int] = (programs, features)) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=grad.device) if needed else None

    y = torch.empty(rows, features, dtype=dtype, device=grad.device)
    e = None if extras.gate_weight is None else torch.empty_like(y)
    bias, gate_bias = parts(need_bias), parts(extras_need.gate_bias)
    gate = parts(extras_need.gate, (programs * columns, 1) if extras.gate_kind == "scalar" else (programs, features))
    (grad_rows,), inner, strides = as_rows(grad)
    edge_backward[(programs, columns)](
        grad_rows, saved.pre, saved.pre_gate, extras.gate, extras.mask_bytes, y, e, bias, gate_bias, gate,
        *strides[0], rows, inner, base, features, n.dropout_p, keep_scale(n.dropout_p), n.seed,
        ACTIVATION=n.activation, GATE=extras.gate_kind, DROPOUT=n.dropout_p > 0, BM=config.BM, BN=config.BN,
        **config.options,
    )  # fmt: skip
    of_extras = Extras(gate_bias=_sums(gate_bias, extras.gate_bias), gate=_sums(gate, extras.gate, extras.gate))
    return _Edge(y, e, _sums(bias, g.bias), of_extras)


def _sums(parts: Tensor | None, like: Tensor | None, gate: Tensor | None = None) -> Tensor | None:
    """The gradient of a bias, or of a gate, from its parts."""
    if parts is None or like is None:
        return None
    return column_sums(parts, like.shape, like.dtype, gate)

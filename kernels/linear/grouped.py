"""grouped_linear: neighbouring groups of rows, each through a linear layer of its own.

A Q-Former layer sends its query rows and its text rows through two feed-forward networks (arXiv 2301.12597, section 3.1;
`Blip2QFormerLayer` in transformers slices, computes twice, and concatenates).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import runtime
from ..norm.op import Norm, check_dropout, check_norm
from . import reference
from .activations import ACTIVATIONS, GATED_ACTIVATIONS
from .call import Group
from .op import check_linear

runtime.register_op(
    "grouped_linear", "groups of rows through a linear layer each: the two FFNs of a Q-Former layer", has_triton=True
)


def _reference(
    groups: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    residuals: Sequence[Tensor] | None,
    norms: Sequence[Norm | None],
    dropout_p: float,
    seed: int | None,
    input_norms: Sequence[Norm | None],
    residual_norms: Sequence[Norm | None],
) -> list[Tensor]:
    """Each group's act(x W^T + b) or norm(residual + dropout(x W^T + b)), one GEMM a group."""
    outputs = []
    for i, (x, weight, bias) in enumerate(zip(groups, weights, biases, strict=True)):
        if residuals is None:
            outputs.append(reference.norm_linear(x, weight, bias, input_norms[i], activation, None, None))
            continue
        x = reference.normalize(x, input_norms[i])
        group_seed = None if seed is None else seed + i
        outputs.append(
            reference.linear_residual(
                x, weight, bias, residuals[i], None, None, norms[i], dropout_p, group_seed, residual_norms[i]
            )
        )
    return outputs


def grouped_linear(
    x: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    sizes: Sequence[int] | None = None,
    activation: str | None = None,
    residual: Tensor | Sequence[Tensor] | None = None,
    norms: Sequence[Norm | None] | None = None,
    input_norms: Sequence[Norm | None] | None = None,
    residual_norms: Sequence[Norm | None] | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    joined: bool = True,
) -> Tensor | tuple[Tensor, ...]:
    """For each group g of rows: act(x_g W_g^T + b_g), or norm_g(residual_g + dropout(x_g W_g^T + b_g)).

    The two halves of the feed-forward networks of a Q-Former layer (`feed_forward_chunk_query` and `feed_forward_chunk`
    of `Blip2QFormerLayer`): `activation` makes the first half, `residual` with `norms` the second. Groups stand side by
    side along the second last dimension. A post-norm can also be left to those who read its rows, as in `linear_residual`:
    to `input_norms` of the next linear layer, and `residual_norms` of the next sum.

    Args:
        x: [..., S, K] with `sizes`, or the groups one by one, each [..., S_g, K] with equal leading dimensions (they need
            not lie in one tensor). Floating point, any strides; a group may have no rows.
        weights: W_g [N, K], as `torch.nn.Linear` keeps it, in the dtype of `x` (under autocast any).
        biases: b_g [N] or None for each; None if no group has one.
        sizes: rows of each group in a single tensor `x`, adding up to S.
        activation: None or an ungated name of `ACTIVATIONS`; excludes `residual`.
        residual: in the form of `x` (one tensor, or one a group) with N in place of K.
        norms: with `residual`, applied to each group's sum; None, or None for a group, applies none.
        input_norms: applied to each group's x first, in the same form.
        residual_norms: with `residual`, applied to each group's residual first, in the same form.
        dropout_p: with `residual`, probability with which elements of x W^T + b are zeroed, in [0, 1].
        seed: the dropout pattern is a function of the seed and the backend; None draws from torch's default generator.
        joined: False returns the groups one by one, for a second `grouped_linear` to read.

    Returns:
        [..., sum of sizes, N]; or a tuple of [..., S_g, N] for each group. Dtypes and rounding are those of `norm_linear`
        and `linear_residual`.

    Saved for backward: what `norm_linear` and `linear_residual` save, for each group.

    Raises:
        BackendUnavailableError: Triton is forced, and cannot serve this call.
        ValueError: shapes or counts that do not fit, an unknown or gated activation, an activation with a residual, or
            norms or dropout without one.
    """
    groups = _groups("x", x, sizes)
    count = len(groups)
    biases = [None] * count if biases is None else biases
    norms, input_norms, residual_norms = (
        [None] * count if given is None else given for given in (norms, input_norms, residual_norms)
    )
    if not count == len(weights) == len(biases) == len(norms) == len(input_norms) == len(residual_norms):
        raise ValueError(
            f"x has {count} groups, but there are {len(weights)} weights, {len(biases)} biases, {len(norms)} norms, "
            f"{len(input_norms)} input_norms and {len(residual_norms)} residual_norms; expected one of each (or None) for "
            f"each group"
        )
    for i, (rows, weight, bias) in enumerate(zip(groups, weights, biases, strict=True)):
        check_linear(rows, weight, bias, f"group {i}: ")
        _check_group_norm(input_norms[i], rows, f"group {i}: x")
        if weight.shape[0] != weights[0].shape[0] or rows.shape[:-2] != groups[0].shape[:-2]:
            raise ValueError(
                f"group {i} has x {tuple(rows.shape)} and weight {tuple(weight.shape)}, but group 0 has x "
                f"{tuple(groups[0].shape)} and weight {tuple(weights[0].shape)}: all groups need the same leading "
                f"dimensions and the same number of output features"
            )
    residuals = None if residual is None else _groups("residual", residual, sizes)
    if residuals is None:
        _check_activation(activation)
        if dropout_p or any(norm is not None for norm in (*norms, *residual_norms)):
            raise ValueError(
                "norms, residual_norms and dropout_p belong to a residual, but residual is None; pass it too"
            )
    else:
        if activation is not None:
            raise ValueError(f"activation {activation!r} excludes residual; apply one of the two in a call")
        _check_residuals(groups, weights, residuals, norms, residual_norms)
        check_dropout(dropout_p)
    if runtime.chosen("grouped_linear", groups[0].device.type) == "triton":
        from . import triton_op

        given = [
            Group(rows, weight, bias, residual=None if residuals is None else residuals[i])
            for i, (rows, weight, bias) in enumerate(zip(groups, weights, biases, strict=True))
        ]
        out = triton_op.grouped_linear(given, input_norms, residual_norms, norms, activation, dropout_p, seed)
        if out is not None:
            return out if joined else out.split([rows.shape[-2] for rows in groups], -2)
    outputs = _reference(
        groups, weights, biases, activation, residuals, norms, dropout_p, seed, input_norms, residual_norms
    )
    return torch.cat(outputs, dim=-2) if joined else tuple(outputs)


def _groups(name: str, x: Tensor | Sequence[Tensor], sizes: Sequence[int] | None) -> Sequence[Tensor]:
    """The groups of rows, as views.

    Raises:
        ValueError: no groups, too few dimensions, or `sizes` that do not fit.
    """
    if not isinstance(x, Tensor):
        if sizes is not None and [rows.shape[-2] for rows in x] != list(sizes):
            raise ValueError(
                f"the groups of {name} have {[rows.shape[-2] for rows in x]} rows, but sizes is {list(sizes)}"
            )
        if not x or any(rows.dim() < 2 for rows in x):
            raise ValueError(
                f"{name} has the shapes {[tuple(rows.shape) for rows in x]}; expected [..., rows, K] a group"
            )
        return x
    if sizes is None:
        raise ValueError(f"{name} is one tensor {tuple(x.shape)}; say with sizes how many rows each group has")
    if x.dim() < 2 or sum(sizes) != x.shape[-2] or any(size < 0 for size in sizes):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but sizes is {list(sizes)}: expected [..., {sum(sizes)}, K], and no "
            f"negative size"
        )
    return x.split(list(sizes), dim=-2)


def _check_activation(activation: str | None) -> None:
    if activation is not None and (activation not in ACTIVATIONS or activation in GATED_ACTIVATIONS):
        known = ", ".join(repr(name) for name in ACTIVATIONS if name not in GATED_ACTIVATIONS)
        raise ValueError(f"activation is {activation!r}; expected None or one of {known}")


def _check_group_norm(norm: Norm | None, rows: Tensor, name: str) -> None:
    if norm is not None:
        check_norm(rows, norm.weight, norm.bias, name)


def _check_residuals(
    groups: Sequence[Tensor],
    weights: Sequence[Tensor],
    residuals: Sequence[Tensor],
    norms: Sequence[Norm | None],
    residual_norms: Sequence[Norm | None],
) -> None:
    if len(residuals) != len(groups):
        raise ValueError(f"x has {len(groups)} groups, but residual has {len(residuals)}; expected as many")
    for i, (rows, weight, residual) in enumerate(zip(groups, weights, residuals, strict=True)):
        if residual.shape != (*rows.shape[:-1], weight.shape[0]):
            raise ValueError(
                f"group {i}: residual has shape {tuple(residual.shape)}, but x {tuple(rows.shape)} and weight "
                f"{tuple(weight.shape)} give {(*rows.shape[:-1], weight.shape[0])}; the two must be equal (expand a "
                f"residual that is shared)"
            )
        for norm in (norms[i], residual_norms[i]):
            _check_group_norm(norm, residual, f"group {i}: residual")

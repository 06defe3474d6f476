"""A call of a linear op in flat form, as the kernels' launchers, the autograd.Function and the registered op take it.

Flat is the tensors of each group and then the extras, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Rows x [..., K] and what they meet: a weight, norms, a residual [..., N] that is added and normalised first."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    residual: Tensor | None = None
    rnorm_weight: Tensor | None = None
    rnorm_bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.x.shape[:-1].numel()


class Extras(NamedTuple):
    """What only calls with one group have. gate has 1 element or N; row_mask [...] is bool."""

    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    head_weight: Tensor | None = None
    gate: Tensor | None = None
    row_mask: Tensor | None = None

    @property
    def head(self) -> int:
        """The size of heads that are normalised, or 0."""
        return 0 if self.head_weight is None else self.head_weight.shape[0]

    @property
    def gate_kind(self) -> str:
        """The gate as the kernels know it: "scalar", "vector", or "" for none."""
        if self.gate is None:
            return ""
        return "scalar" if self.gate.numel() == 1 else "vector"

    @property
    def mask_bytes(self) -> Tensor | None:
        """The row mask as the kernels take it: contiguous bytes."""
        return None if self.row_mask is None else self.row_mask.contiguous().view(torch.uint8)


class Numbers(NamedTuple):
    """The rest of a call: norms are "", "layer_norm" or "rms_norm", with an eps for each group."""

    norm: str = ""
    eps: tuple[float, ...] = (0.0, 0.0)
    rnorm: str = ""
    reps: tuple[float, ...] = (0.0, 0.0)
    activation: str = ""
    head_eps: float = 0.0
    dropout_p: float = 0.0
    seed: int = 0


class Saved(NamedTuple):
    """What backward needs besides the inputs: x W^T + b [rows, N] of all groups, group by group, and x Wg^T + bg.

    They are what an activation, a norm of heads, or dropout, row mask and gate were applied to.
    """

    pre: Tensor | None = None
    pre_gate: Tensor | None = None


NOTHING_SAVED, NO_EXTRAS = Saved(), Extras()
_GROUP, _EXTRAS = len(Group._fields), len(Extras._fields)


def flatten(groups: Sequence[Group], extras: Extras) -> tuple[Tensor | None, ...]:
    """All tensors of a call."""
    return *(t for group in groups for t in group), *extras


def unflatten(flat: Sequence[Any]) -> tuple[tuple[Group, ...], Extras]:
    """The groups and the extras; or, of one bool a tensor, the same with bools for tensors."""
    count = (len(flat) - _EXTRAS) // _GROUP
    groups = tuple(Group(*flat[i * _GROUP : (i + 1) * _GROUP]) for i in range(count))
    return groups, Extras(*flat[len(flat) - _EXTRAS :])


def kept(groups: Sequence[Group], extras: Extras, numbers: Numbers, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The tensors of a call that its backward reads, the others None.

    Args:
        groups, extras, numbers: the call.
        needs: for each tensor, whether its gradient is wanted.
    """
    needing, extras_needing = unflatten(needs)
    found = []
    for group, need in zip(groups, needing, strict=True):
        # Of x only its norm and the weights' gradients know; of a residual only its norm.
        if not (numbers.norm or need.weight or extras_needing.gate_weight):
            group = group._replace(x=None)  # type: ignore[arg-type]
        if not numbers.rnorm:
            group = group._replace(residual=None)
        found.append(group)
    return flatten(found, extras)


def outputs_for(
    groups: Sequence[Group],
    extras: Extras,
    numbers: Numbers,
    *,
    saving: bool,
    saving_branch: bool = False,
    with_pre: bool = True,
) -> tuple[Tensor, Saved]:
    """The output [..., N], groups side by side along the second last dimension, and `Saved` of a call; empty.

    The arguments are those of `forward`; without `with_pre`, nothing is saved.
    """
    first = groups[0]
    features, dtype = first.weight.shape[0], first.weight.dtype
    out_dtype = dtype if first.residual is None else torch.promote_types(first.residual.dtype, dtype)
    shape: tuple[int, ...] = first.x.shape[:-1]
    if len(groups) > 1:
        shape = (*shape[:-1], sum(group.x.shape[-2] for group in groups))
    out = first.x.new_empty((*shape, features), dtype=out_dtype)
    if not (saving and with_pre):
        return out, NOTHING_SAVED
    rows = sum(group.rows for group in groups)

    def sums(needed: object) -> Tensor | None:
        return first.x.new_empty((rows, features), dtype=dtype) if needed else None

    bent = numbers.activation or extras.head or (extras.gate is not None and saving_branch)
    return out, Saved(sums(bent), sums(extras.gate_weight is not None))

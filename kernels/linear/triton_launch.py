"""Launches the linear kernels forward: from a call in flat form to the output and what backward needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import target
from ..relaunch import launch
from ..rows import as_rows
from ..sizes import cdiv
from ..target import Arch, keep_scale, on_device
from . import configs
from .call import NO_EXTRAS, NOTHING_SAVED, Extras, Group, Numbers, Saved, outputs_for
from .configs import Config, Problem
from .norm_calls import normalized
from .triton_linear import grouped_tiles, linear_merge, linear_tiles


def forward(
    groups: tuple[Group, ...],
    extras: Extras,
    numbers: Numbers,
    *,
    saving: bool = False,
    saving_branch: bool = False,
    plan: str | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Saved]:
    """The output [..., N], groups side by side along the second last dimension, and what backward needs if `saving`.

    Args:
        groups: one, or several with the same leading dimensions, K, N, dtypes and norm kinds, and the same parts None.
        extras: for one group only.
        numbers: the rest.
        saving: whether there will be a backward.
        saving_branch: whether that needs what the gate is multiplied with, for its own gradient.
        plan, config: instead of the chosen ones.
    """
    first = groups[0]
    saves = {"saving": saving, "saving_branch": saving_branch}
    rows = tuple(group.rows for group in groups)
    if first.weight.shape[0] == 0 or not any(rows):
        return outputs_for(groups, extras, numbers, **saves)
    arch, problem = target.arch_of(first.x.device), _problem(rows, first, extras, numbers)
    if plan is None:
        plan = configs.plan(arch, problem)
    with on_device(first.x):
        if plan != "fused" and numbers.norm:
            x = normalized(
                first.x, numbers.norm, first.norm_weight, first.norm_bias, numbers.eps[0], first.weight.dtype
            )
            groups = (first._replace(x=x, norm_weight=None, norm_bias=None),)
            numbers = numbers._replace(norm="")
            problem = problem._replace(normed=False, itemsize_x=problem.itemsize)
        if plan == "vendor":
            return _vendor(groups[0], extras, numbers, saves)
        out, saved = outputs_for(groups, extras, numbers, **saves)
        if len(groups) == 1:
            _launch_one(groups[0], extras, numbers, out, saved, arch, config or configs.config_for(arch, problem))
        else:
            _launch_groups(groups, numbers, out, saved, arch, config)
    return out, saved


def _vendor(g: Group, extras: Extras, numbers: Numbers, saves: dict[str, bool]) -> tuple[Tensor, Saved]:
    """The vendor's GEMM, and an epilogue where one is needed; its result is what backward needs from before that."""
    x = g.x.reshape(-1, g.x.shape[-1]).to(g.weight.dtype)
    y = F.linear(x, g.weight, g.bias)
    if not numbers.activation and not extras.head and g.residual is None:
        return y.view(*g.x.shape[:-1], -1), NOTHING_SAVED
    e = None if extras.gate_weight is None else F.linear(x, extras.gate_weight, extras.gate_bias)
    out, saved = outputs_for((g,), extras, numbers, **saves, with_pre=False)
    merge(y[None], None if e is None else e[None], g, extras, numbers, out, saved, biased=True)
    needed = saves["saving"] and (g.residual is None or (extras.gate is not None and saves["saving_branch"]))
    return out, saved._replace(pre=y, pre_gate=e) if needed else saved


def _problem(rows: tuple[int, ...], group: Group, extras: Extras, numbers: Numbers) -> Problem:
    features, width = group.weight.shape
    head = extras.head
    bent = bool(numbers.activation) or head > 0 or group.residual is not None
    sizes = (group.weight.element_size(), group.x.element_size())
    return Problem(rows, features, width, *sizes, bool(numbers.norm), bent, extras.gate_weight is not None, head)


def _launch_one(
    g: Group, extras: Extras, numbers: Numbers, out: Tensor, saved: Saved, arch: Arch, config: Config
) -> None:
    n = numbers
    features, width = g.weight.shape
    (x, residual), inner, strides = as_rows(g.x, g.residual)
    rows, head = g.rows, extras.head
    parts = gate_parts = None
    if config.SPLITS > 1:
        count = 1 if extras.gate_weight is None else 2
        both = torch.empty(count, config.SPLITS, rows, features, dtype=torch.float32, device=out.device)
        parts, gate_parts = both[0], both[1] if count == 2 else None
    tiles = cdiv(rows, config.BM) * configs.column_tiles(features, config.BN, head)
    launch(
        linear_tiles, (tiles * config.SPLITS,),
        x, g.weight, extras.gate_weight, g.bias, extras.gate_bias, g.norm_weight, g.norm_bias, extras.head_weight,
        residual, g.rnorm_weight, g.rnorm_bias, extras.gate, extras.mask_bytes, out, parts, gate_parts,
        saved.pre, saved.pre_gate,
        *strides[0], g.weight.stride(0), 0 if extras.gate_weight is None else extras.gate_weight.stride(0), *strides[1],
        rows, inner, features, width, n.eps[0], n.reps[0], n.head_eps, n.dropout_p, keep_scale(n.dropout_p), n.seed,
        NORM=n.norm, RNORM=n.rnorm, ACTIVATION=n.activation, HEAD=head, GATE=extras.gate_kind, DROPOUT=n.dropout_p > 0,
        EVEN_N=features % config.BN == 0 and (head == 0 or config.BN % head == 0), EVEN_K=width % config.step == 0,
        BM=config.BM, BN=config.BN, BK=config.BK, SLICES=config.SLICES, SPLITS=config.SPLITS,
        PRECISION=target.precision(arch, g.weight.dtype), **config.options,
    )  # fmt: skip
    if parts is not None:
        merge(parts, gate_parts, g, extras, numbers, out, saved)


def merge(
    parts: Tensor,
    gate_parts: Tensor | None,
    g: Group,
    extras: Extras,
    numbers: Numbers,
    out: Tensor,
    saved: Saved,
    *,
    biased: bool = False,
) -> None:
    """The epilogue over sums: parts [SPLITS, rows, N]; `biased` where they hold the biases already."""
    n, features, head = numbers, g.weight.shape[0], extras.head
    config = configs.merge_config(features, head)
    (_, residual), inner, strides = as_rows(g.x, g.residual)
    launch(
        linear_merge, (cdiv(g.rows, config.BM) * configs.column_tiles(features, config.BN, head),),
        parts, gate_parts, None if biased else g.bias, None if biased else extras.gate_bias, extras.head_weight,
        residual, g.rnorm_weight, g.rnorm_bias, extras.gate, extras.mask_bytes, out, saved.pre, saved.pre_gate,
        *strides[1], g.rows, inner, features, n.reps[0], n.head_eps, n.dropout_p, keep_scale(n.dropout_p), n.seed,
        RNORM=n.rnorm, ACTIVATION=n.activation, HEAD=head, GATE=extras.gate_kind, DROPOUT=n.dropout_p > 0,
        BM=config.BM, BN=config.BN, SPLITS=parts.shape[0], **config.options,
    )  # fmt: skip


def _launch_groups(
    groups: Sequence[Group], numbers: Numbers, out: Tensor, saved: Saved, arch: Arch, config: Config | None
) -> None:
    """Two groups a launch; the last may be alone."""
    n = numbers
    outs = out.split([group.x.shape[-2] for group in groups], -2)
    bases = list(itertools.accumulate((group.rows for group in groups), initial=0))
    features, width = groups[0].weight.shape
    for i in range(0, len(groups), 2):
        j = min(i + 1, len(groups) - 1)
        g, h = groups[i], groups[j]
        rows = (g.rows, h.rows if j > i else 0)
        if not any(rows):
            continue
        chosen = config or configs.config_for(arch, _problem(rows, g, NO_EXTRAS, numbers))
        first, second = (_arguments(groups[k], outs[k], bases[k], rows[k - i]) for k in (i, j))
        tiles = sum(cdiv(count, chosen.BM) for count in rows)
        grouped_tiles[(tiles * cdiv(features, chosen.BN),)](
            *first[0], *second[0], saved.pre, *first[1], *second[1], features, width,
            n.eps[i], n.reps[i], n.eps[j], n.reps[j], n.dropout_p, keep_scale(n.dropout_p), n.seed,
            NORM=n.norm, RNORM=n.rnorm, ACTIVATION=n.activation, DROPOUT=n.dropout_p > 0,
            EVEN_N=features % chosen.BN == 0, EVEN_K=width % chosen.step == 0,
            BM=chosen.BM, BN=chosen.BN, BK=chosen.BK, SLICES=chosen.SLICES,
            PRECISION=target.precision(arch, g.weight.dtype), **chosen.options,
        )  # fmt: skip


def _arguments(g: Group, out: Tensor, base: int, rows: int) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """What `grouped_tiles` takes of a group: tensors, and numbers."""
    (x, residual, out_rows), inner, strides = as_rows(g.x, g.residual, out)
    if out_rows is not out:
        # Only the output must stay where it is, and contiguous rows go with any.
        given = (None if t is None else t.contiguous() for t in (g.x, g.residual))
        (x, residual, _), inner, strides = as_rows(*given, out)
    tensors = (x, *g[1:5], residual, *g[6:], out)
    return tensors, (*strides[0], g.weight.stride(0), *strides[1], *strides[2], rows, max(inner, 1), base)

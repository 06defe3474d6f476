"""The linear ops on the Triton kernels: what they can serve, and the autograd.Function of eager calls.

Traced calls go through `registered`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import runtime, seeds
from ..norm.configs import MAX_WIDTH
from ..norm.op import Norm, layer_norm, normalize, rms_norm
from ..target import autocasts
from . import registered, triton_backward, triton_launch
from .call import NO_EXTRAS, Extras, Group, Numbers, Saved, flatten, kept, unflatten
from .configs import MAX_HEAD, MAX_HEAD_FP32

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS = "the Triton kernels of linear layers"


def unsupported(groups: Sequence[Group], extras: Extras, numbers: Numbers) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    first = groups[0]
    index, x_dtype, dtype = first.x.get_device(), first.x.dtype, first.weight.dtype
    for t in flatten(groups, extras):
        if t is None:
            continue
        if t.get_device() != index:
            return f"{_KERNELS} take tensors of one device, not {t.device} beside {first.x.device}"
        if t.dtype not in _DTYPES and t is not extras.row_mask:
            return f"{_KERNELS} take fp32, bf16 and fp16, not {t.dtype}"
    for group in groups:
        if group.x.dtype != x_dtype or group.weight.dtype != dtype:
            return f"{_KERNELS} take groups of one dtype, not {group.x.dtype} beside {x_dtype}"
    gate_weight = extras.gate_weight
    if x_dtype != dtype and not (numbers.norm and autocasts(first.x.device.type)):
        return f"{_KERNELS} take one dtype outside autocast, not {x_dtype} beside {dtype}"
    if gate_weight is not None and gate_weight.dtype != dtype:
        return f"{_KERNELS} take one dtype outside autocast, not {gate_weight.dtype} beside {dtype}"
    features, width = first.weight.shape
    if width == 0:
        return f"{_KERNELS} need at least one input feature"
    # Backward and large calls normalise in a launch of their own.
    if (numbers.norm and width > MAX_WIDTH) or (numbers.rnorm and features > MAX_WIDTH):
        return f"{_KERNELS} normalise rows of up to {MAX_WIDTH}, not {width if numbers.norm else features}"
    if extras.head > (MAX_HEAD_FP32 if dtype == torch.float32 else MAX_HEAD):
        return f"{_KERNELS} normalise heads of up to {MAX_HEAD} elements, in fp32 {MAX_HEAD_FP32}, not {extras.head}"
    return None


def attempt(
    groups: Sequence[Group],
    extras: Extras = NO_EXTRAS,
    *,
    norms: Sequence[Norm | None],
    residual_norms: Sequence[Norm | None] = (None,),
    activation: str | None = None,
    head_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor | None:
    """The output, groups side by side along the second last dimension; None where the kernels cannot serve the call.

    Args:
        groups: the tensors as the public functions got them; the affine parts of the norms are put in here.
        extras: of one group.
        norms, residual_norms: of each group's x and residual.
        activation, head_norm, dropout_p, seed: as in the public functions.

    Raises:
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    device_type = groups[0].x.device.type
    low = torch.get_autocast_dtype(device_type) if autocasts(device_type) else None
    plain = tuple(map(functools.partial(_plain_group, low), groups, norms, residual_norms))
    if extras is not NO_EXTRAS or head_norm is not None:
        extras = _plain_extras(low, extras, head_norm)
    numbers = Numbers(
        _kind(norms[0]),
        tuple(map(_eps, norms)),
        _kind(residual_norms[0]),
        tuple(map(_eps, residual_norms)),
        activation or "",
        _eps(head_norm),
        dropout_p,
    )
    if not runtime.may_serve(unsupported(plain, extras, numbers)):
        return None
    return _run(plain, extras, numbers, seed)


def similar(groups: Sequence[Group], norms: Sequence[Norm | None], residual_norms: Sequence[Norm | None]) -> bool:
    """Whether groups can share a launch: the same dtypes, the same parts missing, and norms of one kind."""
    signs = {
        (
            _kind(norm),
            _kind(rnorm),
            *(None if t is None else t.dtype for t in group),
            *(t is None for n in (norm, rnorm) if n is not None for t in (n.weight, n.bias)),
        )
        for group, norm, rnorm in zip(groups, norms, residual_norms, strict=True)
    }
    return len(signs) == 1 and len({group.weight.shape for group in groups}) == 1


def _kind(norm: Norm | None) -> str:
    return "" if norm is None else norm.kind


def _eps(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm.eps


def _plain_group(low: torch.dtype | None, group: Group, norm: Norm | None, rnorm: Norm | None) -> Group:
    """The group as the kernels take it, its weight and bias in `low` if given, and x too if it has no norm."""
    x, weight, bias, _, _, residual, _, _ = group
    if low is not None:
        weight, bias = _lowered(weight, low), None if bias is None else _lowered(bias, low)
        x = _lowered(x, low) if norm is None else x
    return Group(
        x,
        _plain(weight),
        None if bias is None else _plain(bias),
        None if norm is None or norm.weight is None else _plain(norm.weight),
        None if norm is None or norm.bias is None else _plain(norm.bias),
        residual,
        None if rnorm is None or rnorm.weight is None else _plain(rnorm.weight),
        None if rnorm is None or rnorm.bias is None else _plain(rnorm.bias),
    )


def _plain_extras(low: torch.dtype | None, extras: Extras, head_norm: Norm | None) -> Extras:
    weight, bias, _, gate, row_mask = extras
    if low is not None:
        weight, bias = (None if t is None else _lowered(t, low) for t in (weight, bias))
    return Extras(
        None if weight is None else _plain(weight),
        None if bias is None else _plain(bias),
        None if head_norm is None or head_norm.weight is None else _plain(head_norm.weight),
        None if gate is None else _plain(gate if gate.dim() == 1 else gate.reshape(-1)),
        row_mask,
    )


def _lowered(t: Tensor, low: torch.dtype) -> Tensor:
    """As autocast gives it to a linear layer."""
    return t if t.dtype == torch.float64 else t.to(low)


def _plain(t: Tensor) -> Tensor:
    """A parameter with its last dimension contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _run(groups: tuple[Group, ...], extras: Extras, numbers: Numbers, seed: int | None) -> Tensor:
    """The output of `forward`."""
    if torch.compiler.is_compiling():
        return registered.run_traced(groups, extras, numbers, seeds.drawn_traced(numbers.dropout_p, seed))
    if numbers.dropout_p > 0.0:
        numbers = numbers._replace(seed=seeds.drawn(numbers.dropout_p, seed))
    if torch.is_grad_enabled():
        flat = flatten(groups, extras)
        if any(t is not None and t.requires_grad for t in flat):
            result: Tensor = Linear.apply(numbers, *flat)
            return result
    return triton_launch.forward(groups, extras, numbers)[0]


class Linear(torch.autograd.Function):
    """A linear op with a backward of its own. Saved: what `kept` keeps of the inputs, and `Saved`."""

    @staticmethod
    def forward(ctx: Any, numbers: Numbers, *flat: Tensor | None) -> Tensor:
        """The output."""
        groups, extras = unflatten(flat)
        needs = ctx.needs_input_grad[1:]
        branch = bool(unflatten(needs)[1].gate)
        out, saved = triton_launch.forward(groups, extras, numbers, saving=True, saving_branch=branch)
        ctx.save_for_backward(*kept(groups, extras, numbers, needs), *saved)
        ctx.numbers, ctx.inners = numbers, [group.x.shape[-2] for group in groups if group.x.dim() > 1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """None for the numbers, and the gradients of the tensors."""
        count = len(ctx.needs_input_grad) - 1
        groups, extras = unflatten(ctx.saved_tensors[:count])
        saved = Saved(*ctx.saved_tensors[count:])
        needs = ctx.needs_input_grad[1:]
        return None, *triton_backward.backward(grad, ctx.inners, groups, extras, ctx.numbers, saved, needs)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
    row_mask: Tensor | None,
    norm: Norm | None,
    dropout_p: float,
    seed: int | None,
    residual_norm: Norm | None,
) -> Tensor | None:
    """`linear_residual`, or None where the kernels cannot serve the call. A post-norm takes a launch of its own.

    Raises:
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    if norm is not None and residual_norm is None:
        y = attempt([Group(x, weight, bias)], norms=[None])
        return None if y is None else _add_and_normalize(y, norm, residual, dropout_p, seed)
    if residual_norm is not None and autocasts(x.device.type):
        # Under autocast a norm decides on the dtype of its result.
        residual, residual_norm = normalize(residual, residual_norm), None
    out = attempt(
        [Group(x, weight, bias, residual=residual)],
        Extras(gate=gate, row_mask=row_mask),
        norms=[None],
        residual_norms=[residual_norm],
        dropout_p=dropout_p,
        seed=seed,
    )
    return out if out is None or norm is None else normalize(out, norm)


def _add_and_normalize(y: Tensor, norm: Norm, residual: Tensor, dropout_p: float, seed: int | None) -> Tensor:
    arguments = {"residual": residual, "dropout_p": dropout_p, "seed": seed}
    if norm.kind == "layer_norm":
        return layer_norm(y, norm.weight, norm.bias, norm.eps, **arguments)  # type: ignore[arg-type]
    return rms_norm(y, norm.weight, norm.eps, **arguments)  # type: ignore[arg-type]


def grouped_linear(
    groups: Sequence[Group],
    norms: Sequence[Norm | None],
    residual_norms: Sequence[Norm | None],
    post_norms: Sequence[Norm | None],
    activation: str | None,
    dropout_p: float,
    seed: int | None,
) -> Tensor | None:
    """`grouped_linear`, joined, or None where the kernels cannot serve the call.

    Groups that differ in more than the values of their tensors take a launch each, and so do post-norms.

    Raises:
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    if any(norm is not None for norm in residual_norms) and autocasts(groups[0].x.device.type):
        groups = [
            group
            if norm is None or group.residual is None
            else group._replace(residual=normalize(group.residual, norm))
            for group, norm in zip(groups, residual_norms, strict=True)
        ]
        residual_norms = [None] * len(groups)
    arguments: dict[str, Any] = {"activation": activation, "dropout_p": dropout_p}
    if similar(groups, norms, residual_norms):
        out = attempt(groups, norms=norms, residual_norms=residual_norms, seed=seed, **arguments)
        if out is None or not any(post_norms):
            return out
        outs: list[Tensor | None] = list(out.split([group.x.shape[-2] for group in groups], -2))
    else:
        outs = [
            attempt([g], norms=[a], residual_norms=[b], seed=None if seed is None else seed + i, **arguments)
            for i, (g, a, b) in enumerate(zip(groups, norms, residual_norms, strict=True))
        ]
    found = [
        out if out is None or norm is None else normalize(out, norm) for out, norm in zip(outs, post_norms, strict=True)
    ]
    return None if any(out is None for out in found) else torch.cat([out for out in found if out is not None], -2)

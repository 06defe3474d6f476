"""The linear ops as a registered op, for traced calls: `mllm_fast::linear` and `mllm_fast::linear_backward`.

Eager calls do not pass here: the dispatcher's boundary around a custom op costs tens of microseconds, more than a decode
step runs. The arguments are flat: the tensors of two groups and the extras, the seed of dropout as an int64 scalar on the
CPU, so that tracing draws no number, and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import triton_backward, triton_launch
from .call import Extras, Group, Numbers, Saved, flatten, kept, outputs_for, unflatten

_NAMES = (*(f"{name}{i}" for i in range(2) for name in Group._fields), *Extras._fields)
_COUNT = len(_NAMES)
_GATE = _NAMES.index("gate")
_TENSORS = ", ".join(f"Tensor? {name}" for name in _NAMES)
_NUMBERS = (
    "Tensor seed, str norm, float eps0, float eps1, str rnorm, float reps0, float reps1, str activation, float head_eps, "
    "float dropout_p"
)
_NO_GROUP = (None,) * len(Group._fields)


def run_traced(groups: Sequence[Group], extras: Extras, numbers: Numbers, seed: Tensor) -> Tensor:
    """The output of `forward`, through the registered op; `seed` is that of `numbers`, as a tensor."""
    n = numbers
    outputs = []
    for i in range(0, len(groups), 2):
        pair = groups[i : i + 2]
        eps, reps = ((*given[i : i + 2], 0.0)[:2] for given in (n.eps, n.reps))
        tensors = flatten(pair, extras) if len(pair) == 2 else (*pair[0], *_NO_GROUP, *extras)
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
        call = (*tensors, seed + i, n.norm, *eps, n.rnorm, *reps, n.activation, n.head_eps, n.dropout_p)
        outputs.append(linear_op(*call, any(needs), needs[_GATE])[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -2)


def _call(tensors: Sequence[Any], numbers: Sequence[Any]) -> tuple[tuple[Group, ...], Extras, Numbers]:
    """From the arguments of the registered op."""
    groups, extras = unflatten(tensors)
    if groups[1].weight is None:
        groups = groups[:1]
    seed, norm, eps0, eps1, rnorm, reps0, reps1, activation, head_eps, dropout_p = numbers
    number = int(seed) if dropout_p and seed is not None else 0
    return groups, extras, Numbers(norm, (eps0, eps1), rnorm, (reps0, reps1), activation, head_eps, dropout_p, number)


@torch.library.custom_op(
    "mllm_fast::linear",
    mutates_args=(),
    schema=f"({_TENSORS}, {_NUMBERS}, bool saving, bool saving_branch) -> (Tensor, Tensor, Tensor)",
)
def linear_op(*arguments: Any) -> tuple[Tensor, ...]:
    """(output, pre, pre_gate): the last two as in `Saved`, without elements where there are none.

    Differentiable once, in the output only, if `saving`.
    """
    *numbers, saving, saving_branch = arguments[_COUNT:]
    call = _call(arguments[:_COUNT], numbers)
    return _flat(*triton_launch.forward(*call, saving=saving, saving_branch=saving_branch))


@linear_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, *numbers, saving, saving_branch = arguments[_COUNT:]
    call = _call(arguments[:_COUNT], (None, *numbers))
    return _flat(*outputs_for(*call, saving=saving, saving_branch=saving_branch))


def _flat(out: Tensor, saved: Saved) -> tuple[Tensor, ...]:
    return out, *(out.new_empty(0) if t is None else t for t in saved)


@torch.library.custom_op(
    "mllm_fast::linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad, SymInt[] inners, {_TENSORS}, {_NUMBERS}, Tensor pre, Tensor pre_gate, bool[] needs) "
    "-> Tensor[]",
)
def linear_backward_op(grad: Tensor, inners: Sequence[int], *arguments: Any) -> list[Tensor]:
    """The gradient of each tensor, without elements where it is not needed; none is a residual's that has no norm."""
    *numbers, pre, pre_gate, needs = arguments[_COUNT:]
    groups, extras, call_numbers = _call(arguments[:_COUNT], numbers)
    saved = Saved(*(t if t.numel() else None for t in (pre, pre_gate)))
    own = len(groups) * len(Group._fields)
    wanted = (*needs[:own], *needs[-len(extras) :])
    found = triton_backward.backward(grad, inners, groups, extras, call_numbers, saved, wanted)
    found = (*found[:own], *(None,) * (_COUNT - len(found)), *found[own:])
    return [grad.new_empty(0) if t is None else t.contiguous() for t in found]


@linear_backward_op.register_fake
def _(grad: Tensor, inners: Sequence[int], *arguments: Any) -> list[Tensor]:
    groups, extras = unflatten(arguments[:_COUNT])
    needs = arguments[-1]
    shapes: list[Any] = [*flatten(groups, extras)]
    for i, group in enumerate(groups):
        if group.x is None and group.weight is not None:
            lead = grad.shape[:-1] if len(inners) == 1 else (*grad.shape[:-2], inners[i])
            shapes[i * len(group)] = grad.new_empty((*lead, group.weight.shape[1]), dtype=group.weight.dtype)
    return [
        t.new_empty(t.shape) if t is not None and need else grad.new_empty(0)
        for t, need in zip(shapes, needs, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    seed, *ctx.numbers, ctx.saving, _ = inputs[_COUNT:]
    groups, extras, numbers = _call(inputs[:_COUNT], (None, *ctx.numbers))
    ctx.inners = [group.x.shape[-2] if group.x.dim() > 1 else 1 for group in groups]
    if len(groups) == 1:
        groups = (*groups, Group(*_NO_GROUP))  # type: ignore[arg-type]
    ctx.save_for_backward(*kept(groups, extras, numbers, ctx.needs_input_grad[:_COUNT]), seed, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(ctx.numbers) + 3)  # the seed, the numbers, and what was to be saved
    if grad is None:
        return (None,) * _COUNT + nothing
    if not ctx.saving:
        raise RuntimeError("mllm_fast::linear was called with saving=False, and so has no backward pass")
    tensors, (seed, *saved) = ctx.saved_tensors[:_COUNT], ctx.saved_tensors[_COUNT:]
    needs = list(ctx.needs_input_grad[:_COUNT])
    grads: list[Tensor | None] = [None] * _COUNT
    start = 0
    for i, inner in enumerate(ctx.inners):
        place = _NAMES.index(f"residual{i}")
        if needs[place] and tensors[place] is None:  # without a norm it gets what comes
            grads[place] = grad if len(ctx.inners) == 1 else grad.narrow(-2, start, inner)
            needs[place] = False
        start += inner
    if any(needs):
        found = linear_backward_op(grad, ctx.inners, *tensors, seed, *ctx.numbers, *saved, needs)
        grads = [t if need else g for t, g, need in zip(found, grads, needs, strict=True)]
    return *grads, *nothing


linear_op.register_autograd(_backward, setup_context=_save)

"""`attention` as a registered op, for traced calls: `mllm_fast::attention` and `mllm_fast::attention_backward`.

Eager calls do not pass here: the dispatcher's boundary around a custom op costs tens of microseconds, more than a decode
step runs. A tracer sees one op, whichever implementation it runs, so that a graph is whole also where masks are read on
the host: that happens inside. The arguments are flat, tensors and numbers, the seed of dropout among the tensors (an
int64 scalar on the CPU), so that tracing draws no number.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dense import compute_dtype
from .plan import Plan, Shapes, build_plan, plan_for
from .settings import Settings

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? extra_k, Tensor? extra_v"
_MASKS = "Tensor? key_lengths, Tensor? key_padding, Tensor? first, Tensor? last, Tensor? words, Tensor? kv_index"
_NUMBERS = (
    "Tensor seed, bool causal, SymInt prefix, SymInt images, SymInt tokens, bool beyond_mean, float scale, "
    "float dropout_p, bool triton"
)
_TENSORS = 12  # the first arguments: the inputs, the masks and the seed

MAX_PLANS = 64


def run_traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    settings: Settings,
    seed: Tensor,
    *,
    triton: bool,
) -> Tensor:
    """The output [B, Lq, H, D], through the registered op; `seed` is that of `settings`, as a tensor."""
    given = (q, k, v, extra_k, extra_v)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    s = settings
    numbers = (s.causal, s.prefix, s.images, s.tokens, s.beyond_mean, s.scale, s.dropout_p, triton)
    return attention_op(*given, *s.tensors, seed, *numbers, training)[0]


def _settings(arguments: tuple[Any, ...]) -> tuple[Settings, bool]:
    """From (masks..., seed, numbers...) of the registered op, and whether the Triton kernels are to run."""
    *flat, triton = arguments
    values = [*flat[:6], *flat[7:], int(flat[6])]
    return Settings(*values), triton


@torch.library.custom_op(
    "mllm_fast::attention",
    mutates_args=(),
    schema=f"({_INPUTS}, {_MASKS}, {_NUMBERS}, bool training) -> (Tensor, Tensor, Tensor)",
)
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, logsumexp, what the output's rounding lost); differentiable once, in the output only, if `training`.

    The last two are for the backward pass; they have no elements where the implementation does not make them.
    """
    settings, triton = _settings(rest[:-1])
    training = rest[-1]
    if triton:
        from . import triton_launch

        return *triton_launch.forward(q, k, v, extra_k, extra_v, settings), q.new_empty(0)
    s = settings
    plan = _plan(s, q, k, extra_k)
    sources = _sources(k, v, extra_k, extra_v)
    with reference.without_autocast(q.device.type):
        if not training:
            out = reference.infer(plan, q, sources, s.scale, s.dropout_p, s.seed)
            return out.contiguous(), q.new_empty(0, dtype=compute_dtype(q.dtype)), q.new_empty(0)
        out, lost, lse = reference.forward(plan, q, sources, s.scale, s.dropout_p, s.seed)
    if lse is None:  # no row sees anything
        lse = q.new_zeros(q.shape[:3], dtype=compute_dtype(q.dtype))
    return out.contiguous(), lse.contiguous(), q.new_empty(0) if lost is None else lost.contiguous()


@attention_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, triton, training = rest
    wide = compute_dtype(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(q.shape[:3] if triton or training else (0,), dtype=wide)
    return out, lse, torch.empty_like(out) if training and not triton and q.dtype != wide else q.new_empty(0)


@torch.library.custom_op(
    "mllm_fast::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, Tensor lost, {_MASKS}, {_NUMBERS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lost: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, and those of the second source: without elements where there is none)."""
    settings, triton = _settings(rest)
    found: tuple[Tensor | None, ...]
    if triton:
        from . import triton_launch

        found = triton_launch.backward(grad, q, k, v, extra_k, extra_v, out, lse, settings)
    else:
        s = settings
        plan, sources = _plan(s, q, k, extra_k), _sources(k, v, extra_k, extra_v)
        exact = (out, None if q.dtype == compute_dtype(q.dtype) else lost, lse)
        with reference.without_autocast(q.device.type):
            dq, others = reference.backward(plan, grad, q, sources, *exact, s.scale, s.dropout_p, s.seed)
        found = (dq, *others, *(None,) * (4 - len(others)))
    return tuple(q.new_empty(0) if x is None else x.contiguous() for x in found)


@attention_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(
        q.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (q, k, v, extra_k, extra_v)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    *ctx.numbers, ctx.training = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    # None for the masks, the seed, the numbers and `training`.
    nothing = (None,) * (_TENSORS - 5 + len(ctx.numbers) + 1)
    if grad is None:
        return (None,) * 5 + nothing
    if not ctx.training:
        raise RuntimeError("mllm_fast::attention was called with training=False, and so has no backward pass")
    saved = ctx.saved_tensors
    inputs, kept = saved[:_TENSORS], saved[_TENSORS:]
    found = attention_backward_op(grad, *inputs[:5], *kept, *inputs[5:], *ctx.numbers)
    return *(g if x is not None else None for g, x in zip(found, inputs[:5], strict=True)), *nothing


attention_op.register_autograd(_backward, setup_context=_save)


def _sources(k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None) -> tuple[reference.Source, ...]:
    return reference.pairs([x for x in (k, v, extra_k, extra_v) if x is not None])


_plans: dict[Hashable, Plan] = {}
_plans_lock = threading.Lock()


def _plan(settings: Settings, q: Tensor, k: Tensor, extra_k: Tensor | None) -> Plan:
    """The plan of a call, kept by what its masks say.

    Eager calls keep it by the identity and version of the mask's tensors. A compiler may write new values into a tensor
    that it no longer needs, and increase no version.
    """
    s = settings
    shapes = Shapes.of(q, k, extra_k)
    tensors = [t for t in s.tensors if t is not None]
    if not tensors:
        return plan_for(s.mask, None, shapes, q.device)
    numbers = (shapes, q.device, s.causal, s.prefix, s.images, s.tokens, s.beyond_mean)
    contents = tuple(None if t is None else (t.dtype, t.shape, t.cpu().numpy().tobytes()) for t in s.tensors)
    key = (numbers, contents)
    with _plans_lock:
        plan = _plans.pop(key, None)
    if plan is None:
        plan = build_plan(s.mask, None if s.kv_index is None else s.kv_index.tolist(), shapes, q.device)
    with _plans_lock:
        _plans[key] = plan  # the last one used stands last
        if len(_plans) > MAX_PLANS:
            del _plans[next(iter(_plans))]
    return plan

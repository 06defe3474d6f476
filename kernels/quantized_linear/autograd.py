"""quantized_linear with its gradients: an autograd.Function for eager calls, and a registered op for traced ones.

Eager calls do not pass the dispatcher, whose boundary costs tens of microseconds. A tracer sees
`mllm_fast::quantized_linear` and `mllm_fast::quantized_linear_backward`, whose arguments are flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import llm_int8, reference
from .lowrank import LowRank
from .weights import Nested, Weight, Weight4bit, Weight8bit


@dataclass(frozen=True, slots=True)
class Settings:
    """What a call needs besides tensors.

    Attributes:
        implementation: "torch" or "triton".
        threshold: of the outliers of LLM.int8; None: the weight is multiplied as it is.
        scaling, dropout_p, seed: of the low-rank term.
    """

    implementation: str
    threshold: float | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: int = 0


def _module(settings: Settings) -> ModuleType:
    """What has `product`, `input_gradient` and `dropout` for the implementation."""
    if settings.implementation == "torch":
        return reference
    from . import triton_launch

    return triton_launch


def forward(
    settings: Settings, weight: Weight, x: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(x W^T + bias + low-rank term [M, N] in the dtype of x [M, K]; scaling * dropout(x) a^T [M, r] or None)."""
    module, down, term = _module(settings), None, None
    if a is not None and b is not None:
        dropped = module.dropout(x, settings.dropout_p, settings.seed)
        down = F.linear(dropped.to(a.dtype), a) * settings.scaling
        term = LowRank(down, b)
    if settings.threshold is None:
        return module.product(x, weight, bias, term), down
    assert isinstance(weight, Weight8bit)
    out = llm_int8.product(x, weight, bias, settings.threshold)
    return out if term is None else out + reference.dense(term, out.dtype), down


def backward(
    settings: Settings,
    weight: Weight,
    grad: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    down: Tensor | None,
    needs: tuple[bool, bool, bool],
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, a and b, those that are needed; that of x is added to `into` where it is given."""
    module = _module(settings)
    need_x, need_a, need_b = needs
    dx = da = db = term = None
    if a is not None and b is not None and down is not None:
        wide = grad.to(a.dtype)
        if need_b:
            db = wide.mT @ down
        if need_a or need_x:
            back = wide @ b * settings.scaling
            term = LowRank(back, a.mT, settings.dropout_p, settings.seed)
            if need_a:
                assert x is not None
                da = back.mT @ module.dropout(x, settings.dropout_p, settings.seed).to(a.dtype)
    if need_x and into is not None and module is reference:
        dx = reference.input_gradient(grad, weight, term, into)
    elif need_x:
        dx = module.input_gradient(grad, weight, term)
        dx = dx if into is None else into.add_(dx)
    return dx, da, db


class QuantizedLinear(torch.autograd.Function):
    """Saved: x, a, b and dropout(x) a^T with a low-rank term, else nothing. The weight is held as it is, in 4 or 8 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        weight: Weight,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        """x W^T + bias + low-rank term."""
        out, down = forward(settings, weight, x, bias, a, b)
        need_a = ctx.needs_input_grad[4]
        ctx.save_for_backward(x if need_a else None, a, b, down)
        ctx.settings, ctx.weight = settings, weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the four tensors."""
        _, _, need_x, need_bias, need_a, need_b = ctx.needs_input_grad
        needs = (need_x, need_a, need_b)
        x, a, b, down = ctx.saved_tensors
        dx, da, db = backward(ctx.settings, ctx.weight, grad, x, a, b, down, needs)
        return None, None, dx, grad.sum(0, dtype=ctx.bias_dtype) if need_bias else None, da, db


def run(
    settings: Settings, weight: Weight, x: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Tensor:
    """The result [M, N] of an eager call."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, a, b)):
        result: Tensor = QuantizedLinear.apply(settings, weight, x, bias, a, b)
        return result
    return forward(settings, weight, x, bias, a, b)[0]


# The weight and the settings, flat.
_WEIGHT = (
    "Tensor data, Tensor scale, Tensor? code, Tensor? nested_code, Tensor? nested_absmax, Tensor? nested_offset, "
    "int rows, int columns, int blocksize, str? decoder"
)
_SETTINGS = "str implementation, float? threshold, float scaling, float dropout_p, Tensor seed"


def _flat(weight: Weight, settings: Settings, seed: Tensor) -> tuple[Any, ...]:
    if isinstance(weight, Weight8bit):
        parts: tuple[Any, ...] = (weight.values, weight.scale, None, None, None, None, *weight.shape, 0, None)
    else:
        nested = weight.nested
        fine = (None, None, None) if nested is None else (nested.code, nested.absmax, nested.offset)
        parts = (weight.packed, weight.absmax, weight.code, *fine, *weight.shape, weight.blocksize, weight.decoder)
    return *parts, settings.implementation, settings.threshold, settings.scaling, settings.dropout_p, seed


def _unflat(arguments: tuple[Any, ...]) -> tuple[Settings, Weight]:
    data, scale, code, nested_code, nested_absmax, nested_offset, rows, columns, blocksize, decoder, *rest = arguments
    implementation, threshold, scaling, dropout_p, seed = rest
    settings = Settings(implementation, threshold, scaling, dropout_p, int(seed))
    if code is None:
        return settings, Weight8bit(data, scale)
    nested = None if nested_code is None else Nested(nested_code, nested_absmax, nested_offset)
    return settings, Weight4bit(data, scale, code, blocksize, (rows, columns), nested, decoder)


@torch.library.custom_op(
    "mllm_fast::quantized_linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, Tensor? a, Tensor? b, {_WEIGHT}, {_SETTINGS}) -> (Tensor, Tensor)",
)
def quantized_linear_op(
    x: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """(the result [M, N], what the low-rank term keeps [M, r]: no elements without one); the first is differentiable."""
    out, down = forward(*_unflat(rest), x, bias, a, b)
    return out, x.new_empty(0) if down is None else down


@quantized_linear_op.register_fake
def _(x: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    down = x.new_empty(0) if a is None else a.new_empty(x.shape[0], a.shape[0])
    return x.new_empty(x.shape[0], rest[6]), down


@torch.library.custom_op(
    "mllm_fast::quantized_linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? x, Tensor? a, Tensor? b, Tensor down, bool need_x, bool need_a, bool need_b, "
    f"{_WEIGHT}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def quantized_linear_backward_op(
    grad: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    down: Tensor,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The gradients of x, a and b: no elements where they are not needed."""
    settings, weight = _unflat(rest)
    found = backward(settings, weight, grad, x, a, b, None if a is None else down, (need_x, need_a, need_b))
    return tuple(grad.new_empty(0) if g is None else g for g in found)


@quantized_linear_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    down: Tensor,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return (
        grad.new_empty(grad.shape[0], rest[7]) if need_x else grad.new_empty(0),
        torch.empty_like(a) if need_a and a is not None else grad.new_empty(0),
        torch.empty_like(b) if need_b and b is not None else grad.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, a, b, *rest = inputs
    # Six tensors of the weight, then numbers, and the seed, a tensor, at the end.
    *tensors, seed = (*rest[:6], rest[-1])
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, output[1], *tensors, seed)
    ctx.numbers = rest[6:-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (7 + len(ctx.numbers))
    if grad is None:
        return (None,) * 4 + nothing
    need_x, need_bias, need_a, need_b = ctx.needs_input_grad[:4]
    x, a, b, down, *tensors, seed = ctx.saved_tensors
    dx, da, db = quantized_linear_backward_op(grad, x, a, b, down, need_x, need_a, need_b, *tensors, *ctx.numbers, seed)
    dbias = grad.sum(0, dtype=ctx.bias_dtype) if need_bias else None
    return dx if need_x else None, dbias, da if need_a else None, db if need_b else None, *nothing


quantized_linear_op.register_autograd(_backward, setup_context=_save)


def run_traced(
    settings: Settings,
    weight: Weight,
    x: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    seed: Tensor,
) -> Tensor:
    """The result [M, N], through the registered op; `seed`, an int64 scalar on the CPU, stands for that of `settings`."""
    out, _ = quantized_linear_op(x, bias, a, b, *_flat(weight, settings, seed))
    return out

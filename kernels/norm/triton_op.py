"""The norms on the Triton kernels: an autograd.Function for eager calls, and a registered op for traced ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_launch
from .configs import MAX_WIDTH
from .triton_launch import Settings

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot serve these x, residual, weight and bias, or None where they can."""
    for x in tensors:
        if x is not None and x.dtype not in _DTYPES:
            return f"the Triton kernels of layer_norm and rms_norm take fp32, bf16 and fp16, not {x.dtype}"
        if x is not None and x.shape[-1] > MAX_WIDTH:
            return f"the Triton kernels of layer_norm and rms_norm take rows of up to {MAX_WIDTH}, not {x.shape[-1]}"
    return None


class NormRows(torch.autograd.Function):
    """Saved: residual + dropout(x) (x itself where that is all), its mean and rstd, and the weight."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The output."""
        out, total, stats = triton_launch.forward(x, residual, weight, bias, settings, saving=True)
        ctx.save_for_backward(x if total is None else total, weight, stats)
        ctx.settings, ctx.dtypes = settings, _dtypes(x, residual, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors, and None for the settings."""
        total, weight, stats = ctx.saved_tensors
        return None, *_gradients(grad, total, weight, stats, ctx.settings, ctx.dtypes, ctx.needs_input_grad[1:])


Dtypes = tuple[torch.dtype | None, ...]


def _dtypes(*tensors: Tensor | None) -> Dtypes:
    return tuple(None if t is None else t.dtype for t in tensors)


def _gradients(
    grad: Tensor,
    total: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    settings: Settings,
    dtypes: Dtypes,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Of x, the residual, the weight and the bias."""
    of_x, of_residual, of_weight, of_bias = (d if need else None for d, need in zip(dtypes, needs, strict=True))
    return triton_launch.backward(
        grad,
        total,
        weight,
        stats,
        settings,
        x_dtype=of_x,
        residual_dtype=of_residual,
        weight_dtype=of_weight,
        bias_dtype=of_bias,
    )


def run(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, settings: Settings) -> Tensor:
    """The output [..., D] of an eager call."""
    given = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        result: Tensor = NormRows.apply(settings, *given)
        return result
    return triton_launch.forward(*given, settings)[0]


def run_traced(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
    seed: Tensor,
) -> Tensor:
    """The output [..., D], through the registered op; `seed` is that of `settings`, as a tensor."""
    out, _, _ = norm_op(x, residual, weight, bias, seed, settings.rms, settings.eps, settings.dropout_p, settings.dtype)
    return out


_SETTINGS = "Tensor seed, bool rms, float eps, float dropout_p, ScalarType? dtype"


def _settings(seed: Tensor, rms: bool, eps: float, dropout_p: float, dtype: torch.dtype | None) -> Settings:
    return Settings(rms, eps, dropout_p, int(seed), dtype)


@torch.library.custom_op(
    "mllm_fast::norm",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, residual + dropout(x) or nothing where that is x, mean and rstd); differentiable once, in the output."""
    out, total, stats = triton_launch.forward(x, residual, weight, bias, _settings(*rest), saving=True)
    assert stats is not None
    return out, x.new_empty(0) if total is None else total, stats


@norm_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, dropout_p, dtype = rest
    promoted = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty(0)
    if residual is not None or dropout_p > 0:
        total = x.new_empty(x.shape, dtype=promoted)
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape, dtype=dtype or promoted), total, x.new_empty((2, rows), dtype=torch.float32)


@torch.library.custom_op(
    "mllm_fast::norm_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor total, Tensor? weight, Tensor stats, {_SETTINGS}, ScalarType? x_dtype, "
    "ScalarType? residual_dtype, ScalarType? weight_dtype, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
)
def norm_backward_op(
    grad: Tensor, total: Tensor, weight: Tensor | None, stats: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The gradients whose dtypes are given, the others without elements; that of x too where the residual's is the same."""
    found = _gradients(grad, total, weight, stats, _settings(*rest[:5]), rest[5:], (True,) * 4)
    first = None if found[0] is found[1] else found[0]  # outputs must not share memory
    return tuple(grad.new_empty(0) if t is None else t for t in (first, *found[1:]))


@norm_backward_op.register_fake
def _(grad: Tensor, total: Tensor, weight: Tensor | None, stats: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dropout_p, of_x, of_residual = rest[3], *rest[5:7]
    if _shared(dropout_p, of_x, of_residual):
        of_x = None
    shapes = (grad.shape, grad.shape, grad.shape[-1:], grad.shape[-1:])
    dtypes = (of_x, of_residual, *rest[7:])
    return tuple(
        grad.new_empty(0) if d is None else grad.new_empty(shape, dtype=d)
        for shape, d in zip(shapes, dtypes, strict=True)
    )


def _shared(dropout_p: float, of_x: torch.dtype | None, of_residual: torch.dtype | None) -> bool:
    return dropout_p == 0 and of_x == of_residual


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, seed, *numbers = inputs
    _, total, stats = output
    saved = x if residual is None and numbers[2] == 0 else total
    ctx.save_for_backward(saved, weight, stats, seed)
    ctx.numbers, ctx.dtypes = numbers, _dtypes(x, residual, weight, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (1 + len(ctx.numbers))
    if grad is None:
        return (None,) * 4 + nothing
    total, weight, stats, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    wanted = tuple(d if need else None for d, need in zip(ctx.dtypes, needs, strict=True))
    found = list(norm_backward_op(grad, total, weight, stats, seed, *ctx.numbers, *wanted))
    if _shared(ctx.numbers[2], wanted[0], wanted[1]):
        found[0] = found[1]
    return *(g if d is not None else None for g, d in zip(found, wanted, strict=True)), *nothing


norm_op.register_autograd(_backward, setup_context=_save)

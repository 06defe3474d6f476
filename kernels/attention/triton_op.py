"""`attention` on the Triton kernels: an autograd.Function for eager calls, and a registered op for traced ones.

Eager calls do not pass the dispatcher: the boundary of a custom op costs tens of microseconds, more than a decode step
runs. A tracer sees `mllm_fast::attention` and `mllm_fast::attention_backward`, whose arguments are flat: tensors and
numbers, the seed of dropout among the tensors (an int64 scalar on the CPU), so that tracing draws no number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_launch
from .masks import Mask, MediaRanges
from .triton_launch import MAX_HEAD_DIM, MAX_HEAD_DIM_FP32, Settings

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(q: Tensor) -> str | None:
    """Why the kernels cannot serve queries like `q` [B, Lq, H, D], or None where they can."""
    if q.dtype not in _DTYPES:
        return f"the Triton kernels of attention take fp32, bf16 and fp16, not {q.dtype}"
    most = MAX_HEAD_DIM_FP32 if q.dtype == torch.float32 else MAX_HEAD_DIM
    if q.shape[3] > most:
        return f"the Triton kernels of attention take head dimensions up to {most} in {q.dtype}, not {q.shape[3]}"
    return None


def settings_of(
    mask: Mask | None, kv_index: Tensor | None, scale: float, dropout_p: float, seed: int, device: torch.device
) -> Settings:
    """The flat form of a call's masks and numbers; mask tensors are brought to `device`."""
    if mask is None:
        mask = _NO_MASK
    media = mask.media
    ranges = isinstance(media, MediaRanges)
    tensors = (
        mask.key_lengths,
        mask.key_padding,
        media.first if ranges else None,  # type: ignore[union-attr]
        media.last if ranges else None,  # type: ignore[union-attr]
        None if ranges or media is None else media.words,
        kv_index,
    )
    return Settings(
        *(t if t is None or t.device == device else t.to(device) for t in tensors),
        mask.causal,
        mask.prefix,
        0 if media is None else media.images,
        1 if media is None else media.tokens_per_image,
        ranges and media.beyond == "mean",  # type: ignore[union-attr]
        scale,
        dropout_p,
        seed,
    )


_NO_MASK = Mask()


class Attention(torch.autograd.Function):
    """Attention with a backward of its own. Saved: the inputs, the output, its logsumexp, the masks and the seed."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None
    ) -> Tensor:
        """The output."""
        out, lse = triton_launch.forward(q, k, v, extra_k, extra_v, settings)
        ctx.save_for_backward(q, k, v, extra_k, extra_v, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors, and None for the settings."""
        return None, *triton_launch.backward(grad, *ctx.saved_tensors, ctx.settings)


def run(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, settings: Settings) -> Tensor:
    """The output [B, Lq, H, D] of an eager call."""
    given = (q, k, v, extra_k, extra_v)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        result: Tensor = Attention.apply(settings, *given)
        return result
    return triton_launch.forward(*given, settings)[0]


def run_traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    settings: Settings,
    seed: Tensor,
) -> Tensor:
    """The output [B, Lq, H, D], through the registered op; `seed` is that of `settings`, as a tensor."""
    s = settings
    masks = (s.key_lengths, s.key_padding, s.first, s.last, s.words, s.kv_index)
    numbers = (s.causal, s.prefix, s.images, s.tokens, s.beyond_mean, s.scale, s.dropout_p)
    out, _ = attention_op(q, k, v, extra_k, extra_v, *masks, seed, *numbers)
    return out


_MASKS = "Tensor? key_lengths, Tensor? key_padding, Tensor? first, Tensor? last, Tensor? words, Tensor? kv_index"
_NUMBERS = (
    "Tensor seed, bool causal, SymInt prefix, SymInt images, SymInt tokens, bool beyond_mean, float scale, "
    "float dropout_p"
)
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? extra_k, Tensor? extra_v"


def _settings(arguments: tuple[Any, ...]) -> Settings:
    """From (masks..., seed, numbers...) of the registered op."""
    *masks, seed, causal, prefix, images, tokens, beyond_mean, scale, dropout_p = arguments
    return Settings(*masks, causal, prefix, images, tokens, beyond_mean, scale, dropout_p, int(seed))


@torch.library.custom_op(
    "mllm_fast::attention", mutates_args=(), schema=f"({_INPUTS}, {_MASKS}, {_NUMBERS}) -> (Tensor, Tensor)"
)
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """(output, logsumexp); differentiable once, in the output only."""
    return triton_launch.forward(q, k, v, extra_k, extra_v, _settings(rest))


@attention_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "mllm_fast::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, {_MASKS}, {_NUMBERS}) "
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
    *rest: Any,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, and those of the second source: without elements where there is none)."""
    found = triton_launch.backward(grad, q, k, v, extra_k, extra_v, out, lse, _settings(rest))
    return tuple(q.new_empty(0) if x is None else x for x in found)


@attention_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(
        q.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (q, k, v, extra_k, extra_v)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # The five inputs, the six masks and the seed are tensors, and the rest numbers.
    ctx.save_for_backward(*inputs[:12], *output)
    ctx.numbers = inputs[12:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (7 + len(ctx.numbers))
    if grad is None:
        return (None,) * 5 + nothing
    *inputs, out, lse = ctx.saved_tensors
    found = attention_backward_op(grad, *inputs[:5], out, lse, *inputs[5:], *ctx.numbers)
    return *(g if x is not None else None for g, x in zip(found, inputs[:5], strict=True)), *nothing


attention_op.register_autograd(_backward, setup_context=_save)

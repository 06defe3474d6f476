"""`splice_rows` on the Triton kernels: an autograd.Function for eager calls, and a registered op for traced ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_launch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(features: Tensor) -> str | None:
    """Why the kernels cannot serve features like these, or None where they can."""
    if features.dtype not in _DTYPES:
        return f"the Triton kernels of splice_rows take fp32, bf16 and fp16, not {features.dtype}"
    return None


class SpliceRows(torch.autograd.Function):
    """Saved: index and token ids."""

    @staticmethod
    def forward(ctx: Any, text: Tensor, features: Tensor, index: Tensor, token_ids: Tensor | None) -> Tensor:
        """The spliced rows."""
        ctx.save_for_backward(index, token_ids)
        ctx.counts = (features.shape[0], 0 if token_ids is None else text.shape[0])
        return triton_launch.forward(text, features, index, token_ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of text and features."""
        index, token_ids = ctx.saved_tensors
        text, spliced = ctx.needs_input_grad[:2]
        return *triton_launch.backward(grad, index, token_ids, *ctx.counts, text=text, spliced=spliced), None, None


def run(text: Tensor, features: Tensor, index: Tensor, token_ids: Tensor | None) -> Tensor:
    """The spliced rows: of an eager call, or through the registered op of a traced one."""
    if torch.compiler.is_compiling():
        return splice_op(text, features, index, token_ids)
    if torch.is_grad_enabled() and (text.requires_grad or features.requires_grad):
        result: Tensor = SpliceRows.apply(text, features, index, token_ids)
        return result
    return triton_launch.forward(text, features, index, token_ids)


@torch.library.custom_op("mllm_fast::splice_rows", mutates_args=())
def splice_op(text: Tensor, features: Tensor, index: Tensor, token_ids: Tensor | None) -> Tensor:
    """The spliced rows; differentiable once."""
    return triton_launch.forward(text, features, index, token_ids)


@splice_op.register_fake
def _(text: Tensor, features: Tensor, index: Tensor, token_ids: Tensor | None) -> Tensor:
    return features.new_empty(*index.shape, features.shape[1])


@torch.library.custom_op("mllm_fast::splice_rows_backward", mutates_args=())
def splice_backward_op(
    grad: Tensor, index: Tensor, token_ids: Tensor | None, features: int, vocabulary: int, text: bool, spliced: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of text and features, without elements where not wanted."""
    found = triton_launch.backward(grad, index, token_ids, features, vocabulary, text=text, spliced=spliced)
    nothing = grad.new_empty(0)
    return nothing if found[0] is None else found[0], nothing.clone() if found[1] is None else found[1]


@splice_backward_op.register_fake
def _(
    grad: Tensor, index: Tensor, token_ids: Tensor | None, features: int, vocabulary: int, text: bool, spliced: bool
) -> tuple[Tensor, Tensor]:
    width = grad.shape[-1]
    d_text = grad.new_empty(grad.shape if token_ids is None else (vocabulary, width)) if text else grad.new_empty(0)
    return d_text, grad.new_empty((features, width) if spliced else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    text, features, index, token_ids = inputs
    ctx.save_for_backward(index, token_ids)
    ctx.counts = (features.shape[0], 0 if token_ids is None else text.shape[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, token_ids = ctx.saved_tensors
    text, spliced = ctx.needs_input_grad[:2]
    d_text, d_features = splice_backward_op(grad, index, token_ids, *ctx.counts, text, spliced)
    return d_text if text else None, d_features if spliced else None, None, None


splice_op.register_autograd(_backward, setup_context=_save)

"""The public function `frozen_cross_entropy`, its autograd.Function, and the registered op for traced calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import runtime
from ..linear.reference import linear
from ..quantized_linear import Nested, Weight4bit, Weight8bit, quantized_linear
from ..quantized_linear import autograd as product
from . import reference

runtime.register_op("frozen_cross_entropy", "loss over a frozen head, the logits never held", has_triton=True)

QuantizedWeight = Weight4bit | Weight8bit
Weight = Tensor | QuantizedWeight
Settings = tuple[int, float, float | None, bool]
ChunkLoss = Callable[[Tensor, Tensor, float, float | None, bool], tuple[Tensor, Tensor | None]]

# Bytes of the logits held at a time. On a GPU large enough for GEMMs at full rate (1,024 rows of 32,000 in bf16); on a
# CPU what still fits into a last-level cache, in fp32.
CHUNK_BYTES = {"cuda": 64 << 20, "cpu": 16 << 20}


def frozen_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    shift: bool = False,
) -> Tensor:
    """Cross entropy of hidden W^T + b against labels, for a head W that is not trained.

    `F.cross_entropy(head(hidden).float().flatten(0, -2), labels.flatten(), ...)` as transformers computes it
    (`ForCausalLMLoss`), except that only the supervised rows meet the head (in multimodal training most rows are image
    and prompt), that at most `CHUNK_BYTES` of logits exist at a time, and that W gets no gradient. The gradient of
    `hidden` is computed in the forward pass, chunk by chunk (Liger Kernel's fused linear cross entropy, arXiv
    2410.10989, section 3.2).

    Args:
        hidden: [..., D], floating point, any strides.
        weight: [V, D] in the dtype of `hidden` (under autocast any), or a quantised weight of `quantized_linear`. Must
            not require a gradient.
        labels: integers, the leading shape of `hidden`; in [0, V) or `ignore_index`.
        bias: [V] or None; must not require a gradient.
        ignore_index: rows with this label count for nothing.
        label_smoothing: in [0, 1], as in `F.cross_entropy`.
        softcap: with a value c the logits are c * tanh(logits / c) (Gemma 2).
        reduction: "mean" over the supervised rows (NaN without any, as `F.cross_entropy`), or "sum".
        shift: row i predicts label i + 1 along the last dimension of `labels`, as in a causal language model.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs).

    Saved for backward: the gradient of the supervised rows of `hidden` [S, D], and which rows these are. Differentiable
    once. Finding the supervised rows reads their number on the host: one synchronisation a call.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, a head that requires a gradient, or a label out of range.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight, bias = (_lowered(x, hidden.device.type) for x in (hidden, weight, bias))
    _check(hidden, weight, bias, labels, label_smoothing, softcap, reduction)
    if shift:
        labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    settings = (ignore_index, label_smoothing, softcap, reduction == "mean")
    gradient = torch.is_grad_enabled() and hidden.requires_grad
    if torch.compiler.is_compiling():
        parts, form = _flatten(weight)
        traced: Tensor = _traced(hidden, parts, *form, bias, labels, *settings, gradient)[0]
        return traced
    if gradient:
        return _Loss.apply(hidden, weight, bias, labels, settings)
    return _compute(hidden, weight, bias, labels, *settings, gradient=False)[0]


def _lowered(x: Any, device_type: str) -> Any:
    """`x` as autocast gives it to a linear layer."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def _check(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
) -> None:
    if len(weight.shape) != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but hidden has shape {tuple(hidden.shape)}: expected [V, D] with D "
            f"the last dimension of hidden"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    for name, x in (("weight", weight), ("bias", bias)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"the head's {name} requires a gradient, which this loss does not compute; freeze the head "
                f"(requires_grad_(False)), or use torch.nn.functional.cross_entropy"
            )
        if isinstance(x, Tensor) and x.dtype != hidden.dtype:
            raise ValueError(
                f"hidden is {hidden.dtype}, but the head's {name} is {x.dtype}; cast them to one dtype, or run under "
                f"autocast"
            )
    if labels.shape != hidden.shape[:-1] or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels is {list(labels.shape)} of {labels.dtype}; expected {list(hidden.shape[:-1])} of int64, one label a "
            f"row of hidden"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], but is {label_smoothing}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be positive, but is {softcap}; pass None for none")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")


def _chunk_loss(hidden: Tensor) -> ChunkLoss:
    if runtime.choose("frozen_cross_entropy", hidden) == "torch":
        return reference.chunk_loss
    if hidden.dtype == torch.float64:
        if runtime.current_backend() == "triton":
            raise runtime.BackendUnavailableError(
                "the Triton kernel of frozen_cross_entropy does not take torch.float64; call it under backend('auto')"
            )
        return reference.chunk_loss
    from . import triton_rows

    return triton_rows.chunk_loss


def _compute(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    mean: bool,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, the gradient of the supervised rows [S, D], which rows these are [S]); no gradient: [0, D]."""
    size = weight.shape[0]
    labels = labels.reshape(-1)
    index = (labels != ignore_index).nonzero().squeeze(1)
    targets = labels.index_select(0, index).to(torch.int64)
    rows, number = hidden.reshape(-1, hidden.shape[-1]), len(index)
    _check_range(targets, size)
    chunk_loss = _chunk_loss(hidden)
    length = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) // (size * _held(hidden)))
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=kind, device=hidden.device)
    d_rows = rows.new_empty((number if gradient else 0, rows.shape[1]))
    scale = 1.0 / number if mean and number else 1.0
    for start in range(0, number, length):
        part = slice(start, min(start + length, number))
        x = rows if number == len(rows) <= length else rows.index_select(0, index[part])
        logits, pull = _head(x, weight, bias, gradient)
        loss, d_logits = chunk_loss(logits, targets[part], label_smoothing, softcap, gradient)
        total += loss
        if d_logits is not None and pull is not None:
            torch.mul(pull(d_logits), scale, out=d_rows[part])
    if mean:
        total = total / number if number else total.fill_(float("nan"))
    return total, d_rows, index


def _held(hidden: Tensor) -> int:
    """Bytes of one logit while its chunk is worked on: the PyTorch implementation widens it."""
    return hidden.element_size() if hidden.device.type == "cuda" else max(4, hidden.element_size())


def _check_range(targets: Tensor, size: int) -> None:
    if len(targets) == 0:
        return
    least, most = torch.stack(targets.aminmax()).tolist()
    if least < 0 or most >= size:
        raise ValueError(
            f"labels hold {least if least < 0 else most}, but the head has {size} classes: expected 0 to {size - 1}, or "
            f"ignore_index"
        )


def _head(
    x: Tensor, weight: Weight, bias: Tensor | None, gradient: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """The logits of x [R, D], and what turns their gradient into that of x."""
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(weight, Tensor):
            return linear(x, weight, bias), (lambda d: d @ weight) if gradient else None
        logits = quantized_linear(x, weight, bias)
        return logits, partial(_pull, weight) if gradient else None


def _pull(weight: QuantizedWeight, grad: Tensor) -> Tensor:
    """The gradient of x from that of x W^T. A registered op runs below autograd, so it is not asked."""
    settings = product.Settings(runtime.choose("quantized_linear", grad))
    dx = product.backward(settings, weight, grad, None, None, None, None, (True, False, False))[0]
    assert dx is not None
    return dx


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Weight, bias: Tensor | None, labels: Tensor, settings: Settings
    ) -> Tensor:
        loss, d_rows, index = _compute(hidden, weight, bias, labels, *settings, gradient=True)
        ctx.save_for_backward(d_rows, index)
        ctx.shape = hidden.shape
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, index = ctx.saved_tensors
        return _spread(d_rows, index, ctx.shape, grad), None, None, None, None


def _spread(d_rows: Tensor, index: Tensor, shape: torch.Size, grad: Tensor) -> Tensor:
    """The gradient of all rows: 0 for those without supervision."""
    d_rows = d_rows * grad.to(d_rows.dtype)
    d = d_rows.new_zeros((shape[:-1].numel(), shape[-1]))
    return d.index_copy_(0, index, d_rows).view(shape)


def _flatten(weight: Weight) -> tuple[list[Tensor], tuple[int, int, int]]:
    """A weight as a registered op takes it: tensors, and (blocksize or 0, V, D)."""
    if isinstance(weight, Tensor):
        return [weight], (0, *weight.shape)
    if isinstance(weight, Weight8bit):
        return [weight.values, weight.scale], (0, *weight.shape)
    nested = weight.nested
    scales = [] if nested is None else [nested.code, nested.absmax, nested.offset]
    return [weight.packed, weight.absmax, weight.code, *scales], (weight.blocksize, *weight.shape)


def _unflatten(parts: list[Tensor], blocksize: int, shape: tuple[int, int]) -> Weight:
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return Weight8bit(*parts)
    nested = Nested(parts[3], parts[4], parts[5]) if len(parts) > 3 else None
    return Weight4bit(parts[0], parts[1], parts[2], blocksize, shape, nested)


# The number of supervised rows depends on data, so a traced call gets the gradient of all rows, 0 where there is none.
@torch.library.custom_op("mllm_fast::frozen_cross_entropy", mutates_args=())
def _traced(
    hidden: Tensor,
    parts: list[Tensor],
    blocksize: int,
    classes: int,
    width: int,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    mean: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    weight, settings = _unflatten(parts, blocksize, (classes, width)), (ignore_index, label_smoothing, softcap, mean)
    loss, d_rows, index = _compute(hidden, weight, bias, labels, *settings, gradient=gradient)
    if not gradient:
        return loss, hidden.new_empty(0)
    return loss, _spread(d_rows, index, hidden.shape, torch.ones_like(loss))


@_traced.register_fake
def _(
    hidden: Tensor,
    parts: list[Tensor],
    blocksize: int,
    classes: int,
    width: int,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    mean: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((), dtype=kind), hidden.new_empty(hidden.shape if gradient else (0,))


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.parts = len(inputs[1])


def _traced_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    (d_hidden,) = ctx.saved_tensors
    return d_hidden * grad.to(d_hidden.dtype), [None] * ctx.parts, *(None,) * 10


_traced.register_autograd(_traced_backward, setup_context=_keep_gradient)

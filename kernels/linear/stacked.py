"""stacked_linear: many linear layers that read one input, as one GEMM."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import runtime
from ..norm.op import Norm, check_norm
from ..target import autocasts
from . import reference
from .call import Group
from .op import check_linear

runtime.register_op("stacked_linear", "one GEMM for all the layers that read the same input", has_triton=True)


@dataclass(frozen=True, eq=False)
class StackedWeight:
    """The weights of several linear layers as one, made by `stack_weights`.

    Attributes:
        weight: [sum of sizes, K].
        bias: [sum of sizes], or None if no layer has one.
        sizes: output features of each layer, in order.

    Raises:
        ValueError: sizes that do not add up to the rows of `weight`.
    """

    weight: Tensor
    bias: Tensor | None
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or sum(self.sizes) != self.weight.shape[0]:
            raise ValueError(
                f"sizes {self.sizes} add up to {sum(self.sizes)}, but weight has shape {tuple(self.weight.shape)}"
            )


def stack_weights(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    norms: Sequence[Norm | None] | None = None,
) -> StackedWeight:
    """The layers' weights as one, with the affine part of the norm before each folded in.

    norm_i(x) W_i^T + b_i = xhat (W_i diag(g_i))^T + (b_i + W_i beta_i), where xhat is x normalised without an affine
    part, which is the same for all layers. So one normalisation and one GEMM serve, for example, the keys and values of
    all layers of a Perceiver resampler (`norm_media` and `to_kv` of open_flamingo's `PerceiverAttention`). Exact but
    for rounding.

    Args:
        weights: W_i [N_i, K], of one dtype and device.
        biases: b_i [N_i] or None for each; None if no layer has one.
        norms: the norm that stands before each layer, or None where there is none; those given must agree in kind and
            eps, because one normalisation has to serve them all. None folds nothing.

    Returns:
        A `StackedWeight` with weight [sum N_i, K] and bias [sum N_i] in the dtype of `weights`; bias is None where
        neither `biases` nor a norm's bias gives one (so an RMS norm makes none). The fold is computed in fp32 (fp64 for
        fp64 weights) and rounded once. It shares no memory with the inputs. Differentiable with respect to every
        weight, bias, norm weight and norm bias:
            dW_i = dW diag(g_i) + db beta_i^T,  dg_i = column sums of dW * W_i,  dbeta_i = W_i^T db,  db_i = db.

    Saved for backward: the weights, and the norms' weights and biases.

    Raises:
        ValueError: no weights, sequences of different lengths, shapes or dtypes that do not fit, or norms that differ
            in kind or eps.
    """
    biases = [None] * len(weights) if biases is None else biases
    norms = [None] * len(weights) if norms is None else norms
    _check_stack(weights, biases, norms)
    first = weights[0]
    # Folding is arithmetic on parameters: autocast must not lower it.
    device = first.device.type
    with torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext():
        folded = [_fold(w, b, norm) for w, b, norm in zip(weights, biases, norms, strict=True)]
        weight = torch.cat([w for w, _ in folded])
        if all(b is None for _, b in folded):
            return StackedWeight(weight, None, tuple(w.shape[0] for w in weights))
        bias = torch.cat([first.new_zeros(w.shape[0]) if b is None else b for w, b in folded])
    return StackedWeight(weight, bias, tuple(w.shape[0] for w in weights))


def _fold(weight: Tensor, bias: Tensor | None, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """W diag(g) and b + W beta, in the dtype of W."""
    dtype = weight.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    folded = weight
    if norm is not None and norm.bias is not None:
        shift = torch.mv(weight.to(wide), norm.bias.to(wide))
        bias = shift if bias is None else bias.to(wide) + shift
    if norm is not None and norm.weight is not None:
        folded = (weight.to(wide) * norm.weight.to(wide)).to(dtype)
    return folded, None if bias is None else bias.to(dtype)


def _check_stack(weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[Norm | None]) -> None:
    if not weights:
        raise ValueError("stack_weights needs at least one weight, but got none")
    if not len(weights) == len(biases) == len(norms):
        raise ValueError(
            f"stack_weights needs one bias and one norm (or None) for each weight, but got {len(weights)} weights, "
            f"{len(biases)} biases and {len(norms)} norms"
        )
    first = weights[0]
    for i, (weight, bias, norm) in enumerate(zip(weights, biases, norms, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != first.shape[-1]:
            raise ValueError(
                f"weight {i} has shape {tuple(weight.shape)}, but weight 0 has shape {tuple(first.shape)}: "
                f"all must be [N_i, K] with the same K, since they read the same input"
            )
        if weight.dtype != first.dtype:
            raise ValueError(f"weight {i} is {weight.dtype}, but weight 0 is {first.dtype}: all must have one dtype")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias {i} has shape {tuple(bias.shape)}, but weight {i} has shape {tuple(weight.shape)}")
        if norm is not None:
            check_norm(weight, norm.weight, norm.bias, f"weight {i}")
    kinds = {(norm.kind, norm.eps) for norm in norms if norm is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"one normalisation serves all stacked layers, so their norms must agree in kind and eps, but got "
            f"{sorted(kinds)}; stack only those that agree"
        )


def stacked_linear(x: Tensor, stacked: StackedWeight, *, norm: Norm | None = None) -> tuple[Tensor, ...]:
    """The outputs of all stacked layers, from one GEMM: norm(x) W_i^T + b_i for each i.

    Args:
        x: [..., K], floating point, any strides; any number of rows, 0 too.
        stacked: from `stack_weights`, in the dtype of `x` (under autocast any).
        norm: applied to `x` once, for all layers. Where `stack_weights` folded the layers' norms in, pass the same kind
            and eps without weight and bias.

    Returns:
        For each layer [..., N_i], views of one buffer [..., sum N_i]: the last dimension is contiguous, and rows are
        sum N_i apart.

    Saved for backward: as in `norm_linear`.

    Raises:
        BackendUnavailableError: Triton is forced, and cannot serve this call.
        ValueError: shapes that do not fit.
    """
    check_linear(x, stacked.weight, stacked.bias, "stacked ")
    if norm is not None:
        check_norm(x, norm.weight, norm.bias)
    if runtime.chosen("stacked_linear", x.device.type) == "triton":
        from . import triton_op

        out = triton_op.attempt([Group(x, stacked.weight, stacked.bias)], norms=[norm])
        if out is not None:
            return out.split(stacked.sizes, -1)
    return reference.stacked_linear(x, stacked.weight, stacked.bias, stacked.sizes, norm)

"""The norm ops: layer_norm, rms_norm, and `Norm`, the description of either that other ops take as an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import runtime, seeds
from ..relaunch import PARTS, relaunches
from . import reference

runtime.register_op("layer_norm", "layer norm of residual + dropout(x), fp32 statistics", has_triton=True)
runtime.register_op("rms_norm", "RMS norm of residual + dropout(x), fp32 statistics", has_triton=True)


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation over the last dimension, for the ops that apply one before or after a GEMM.

    Attributes:
        kind: "layer_norm" or "rms_norm".
        weight: scale [D], or None for an affine-free norm.
        bias: shift [D], or None. RMS norm has none.
        eps: added to the variance (layer norm) or to the mean square (RMS norm).

    Raises:
        ValueError: for an unknown `kind`, or an RMS norm with a bias.
    """

    kind: Literal["layer_norm", "rms_norm"]
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.kind not in ("layer_norm", "rms_norm"):
            raise ValueError(f"unknown norm kind {self.kind!r}; expected 'layer_norm' or 'rms_norm'")
        if self.kind == "rms_norm" and self.bias is not None:
            raise ValueError("an RMS norm has no bias, but one was given; pass bias=None or kind='layer_norm'")


PARTS[Norm] = lambda norm: ((norm.kind, norm.eps), (norm.weight, norm.bias))


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, name_of_x: str = "x") -> None:
    """Raise ValueError unless the affine parameters are vectors as long as the last dimension of `x`."""
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"the norm {name} has shape {tuple(parameter.shape)}, but {name_of_x} has shape {tuple(x.shape)}: "
                f"expected {tuple(x.shape[-1:])}, one value for each element of the last dimension"
            )


def check_dropout(dropout_p: float) -> None:
    """Raise ValueError unless `dropout_p` is a probability."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], but is {dropout_p}")


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has the shape `other`."""
    if tensor.shape != other:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but {other_name} has shape {tuple(other)}; the two must be equal "
            f"(expand {name} if it is to be shared)"
        )


@relaunches
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Layer norm of residual + dropout(x) over the last dimension (Ba et al. 2016, eq. 4).

    With `residual` this is the post-norm edge of a BERT block (`BertOutput` and `BertSelfOutput` after their dense
    layer); without, `torch.nn.LayerNorm`.

    Args:
        x: [..., D], floating point, any strides.
        weight: [D] or None. Its dtype may differ from that of `x` (fp32 norms in a bf16 model).
        bias: as `weight`.
        eps: added to the variance.
        residual: shape of `x`, or None. Added after the dropout; its dtype may differ (torch's promotion applies).
        dropout_p: probability with which elements of `x` are zeroed, in [0, 1]; pass 0 in evaluation.
        seed: the dropout pattern is a function of the seed and the backend; None draws from torch's default generator.

    Returns:
        [..., D] in the promoted dtype of `x` and `residual` (never that of the parameters). Mean and variance are
        accumulated in fp32 (fp64 for fp64 inputs). Under autocast the dtype is what `F.layer_norm` gives there.

    Saved for backward: residual + dropout(x) (`x` itself where that is all), its mean and rstd (fp32), `weight`, and
    the seed (the kernels) or the dropout mask (the reference). Differentiable once on the kernels. Equal inputs give
    bitwise equal outputs and gradients.

    Raises:
        ValueError: parameters that are not [D], a residual of another shape, or a dropout_p outside [0, 1].
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    check_norm(x, weight, bias)
    check_dropout(dropout_p)
    if residual is not None:
        check_same_shape("residual", residual, "x", x.shape)
    if _on_triton("layer_norm", x, residual, weight, bias):
        return _run(x, residual, weight, bias, False, eps, dropout_p, seed)
    return reference.layer_norm(x, weight, bias, eps, residual, dropout_p, seed)


@relaunches
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """RMS norm of residual + dropout(x) over the last dimension (Zhang and Sennrich 2019, eq. 4).

    `LlamaRMSNorm` and `IdeficsRMSNorm` of transformers, except that a 16-bit result is rounded once, after the
    multiplication with `weight`, where those round before it as well, and that it keeps the dtype of `x` beside an fp32
    `weight`.

    Args:
        x: [..., D], floating point, any strides.
        weight: [D] or None, in any floating-point dtype.
        eps: added to the mean square.
        residual: as in `layer_norm`.
        dropout_p: as in `layer_norm`.
        seed: as in `layer_norm`.

    Returns:
        [..., D] in the promoted dtype of `x` and `residual`. The mean square is accumulated in fp32 (fp64 for fp64
        inputs).

    Saved for backward: as in `layer_norm`.

    Raises:
        ValueError: a weight that is not [D], a residual of another shape, or a dropout_p outside [0, 1].
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    check_norm(x, weight, None)
    check_dropout(dropout_p)
    if residual is not None:
        check_same_shape("residual", residual, "x", x.shape)
    if _on_triton("rms_norm", x, residual, weight, None):
        return _run(x, residual, weight, None, True, eps, dropout_p, seed)
    return reference.rms_norm(x, weight, eps, residual, dropout_p, seed)


def _on_triton(name: str, x: Tensor, *others: Tensor | None) -> bool:
    def unsupported() -> str | None:
        from . import triton_op

        return triton_op.unsupported(x, *others)

    return runtime.choose_for(name, x.device.type, unsupported) == "triton"


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    dropout_p: float,
    seed: int | None,
) -> Tensor:
    """A call on the kernels."""
    from . import triton_op
    from .triton_launch import Settings

    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    # On a GPU, autocast runs norms in fp32; on a CPU, where the interpreter is, it leaves them alone.
    dtype = torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else None
    given = (x, residual, weight, bias)
    if torch.compiler.is_compiling():
        settings = Settings(rms, eps, dropout_p, 0, dtype)
        return triton_op.run_traced(*given, settings, seeds.drawn_traced(dropout_p, seed))
    return triton_op.run(*given, Settings(rms, eps, dropout_p, seeds.drawn(dropout_p, seed), dtype))


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Apply `norm` to `x` [..., D]: `layer_norm` or `rms_norm`, whichever it describes."""
    if norm.kind == "layer_norm":
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, norm.eps)

"""Launches the norm kernels: tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import target
from ..relaunch import launch
from ..rows import as_rows
from ..sums import column_sums
from ..target import keep_scale, on_device
from . import configs
from .configs import Config
from .triton_norm import norm_rows, norm_rows_backward


@dataclass(frozen=True, slots=True)
class Settings:
    """The numbers of a call.

    Attributes:
        rms: RMS norm, else layer norm.
        eps: added to the variance or the mean square.
        dropout_p, seed: of the dropout on x.
        dtype: of the output; None: the promoted dtype of x and the residual.
    """

    rms: bool
    eps: float
    dropout_p: float = 0.0
    seed: int = 0
    dtype: torch.dtype | None = None


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
    *,
    saving: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """norm(residual + dropout(x)), contiguous; the sum, where it is not x itself; mean and rstd [2, rows] in fp32.

    Args:
        x, residual: [..., D] of one shape, any strides.
        weight, bias: [D], contiguous.
        settings: the rest.
        saving: whether there will be a backward; if not, the last two are None.
        config: instead of the chosen one.
    """
    s, width = settings, x.shape[-1]
    rows = x.numel() // max(width, 1)
    promoted = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    out = empty(*x.shape, dtype=s.dtype or promoted)
    total = empty(*x.shape, dtype=promoted) if saving and (residual is not None or s.dropout_p > 0) else None
    stats = empty(2, rows, dtype=torch.float32) if saving else None
    if out.numel() == 0:
        return out, total, stats
    if config is None:
        config = configs.forward_config(target.arch_of(x.device), width)
    (x_rows, residual_rows), inner, strides = as_rows(x, residual)
    with on_device(x):
        launch(
            norm_rows, (-(-rows // config.BM),),
            x_rows, residual_rows, weight, bias, out, total, stats, *strides[0], *strides[1], rows, inner, s.eps,
            s.dropout_p, keep_scale(s.dropout_p), s.seed,
            RMS=s.rms, DROPOUT=s.dropout_p > 0, D=width, BD=config.BD, BM=config.BM, num_warps=config.num_warps,
        )  # fmt: skip
    return out, total, stats


def backward(
    grad: Tensor,
    total: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    settings: Settings,
    *,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, the residual, the weight and the bias, each contiguous; None where not wanted.

    Without dropout and where their dtypes agree, those of x and the residual are one tensor.

    Args:
        grad: [..., D], any strides.
        total: [..., D], residual + dropout(x).
        weight: [D] or None.
        stats: mean and rstd [2, rows] in fp32, rows contiguous; None: they are found again.
        settings: as in forward.
        x_dtype, residual_dtype, weight_dtype, bias_dtype: the dtype of each gradient; None: not wanted.
        config: instead of the chosen one.
    """
    s, width = settings, grad.shape[-1]
    rows = grad.numel() // max(width, 1)
    shape = grad.shape

    def empty(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(shape, dtype=dtype, device=grad.device)

    shared = s.dropout_p == 0 and x_dtype == residual_dtype
    d_residual, d_x = empty(residual_dtype), None if shared else empty(x_dtype)
    if grad.numel() == 0:
        sums = [
            None if d is None else torch.zeros(width, dtype=d, device=grad.device) for d in (weight_dtype, bias_dtype)
        ]
        return d_residual if shared else d_x, d_residual, sums[0], sums[1]
    arch = target.arch_of(grad.device)
    if config is None:
        config = configs.backward_config(arch, width)
    summing = weight_dtype is not None or bias_dtype is not None
    programs = configs.programs_for(arch, rows, config) if summing else -(-rows // config.BM)
    weight_parts, bias_parts = (
        None if d is None else torch.empty(programs, width, dtype=torch.float32, device=grad.device)
        for d in (weight_dtype, bias_dtype)
    )
    (grad_rows, total_rows), inner, strides = as_rows(grad, total)

    def sweep(
        programs: int,
        d_residual: Tensor | None,
        d_x: Tensor | None,
        weight_parts: Tensor | None,
        bias_parts: Tensor | None,
    ) -> None:
        norm_rows_backward[(programs,)](
            grad_rows, total_rows, weight, stats, d_residual, d_x, weight_parts, bias_parts,
            *strides[0], *strides[1], 0 if stats is None else stats.stride(0), rows, inner,
            s.eps, s.dropout_p, keep_scale(s.dropout_p), s.seed,
            RMS=s.rms, DROPOUT=s.dropout_p > 0 and d_x is not None, D=width, BD=config.BD, BM=config.BM,
            num_warps=config.num_warps,
        )  # fmt: skip

    with on_device(grad):
        if summing and configs.sums_apart(config, s.dropout_p > 0 and d_x is not None):
            sweep(programs, None, None, weight_parts, bias_parts)
            sweep(-(-rows // config.BM), d_residual, d_x, None, None)
        else:
            sweep(programs, d_residual, d_x, weight_parts, bias_parts)
    sums = [
        None if parts is None or d is None else column_sums(parts, parts.shape[1:], d)
        for parts, d in ((weight_parts, weight_dtype), (bias_parts, bias_dtype))
    ]
    return d_residual if shared else d_x, d_residual, sums[0], sums[1]

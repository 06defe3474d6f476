"""Launches the kernels of gated_residual: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import target
from ..relaunch import launch
from ..rows import Strides, as_rows
from ..sizes import cdiv
from ..sums import column_sums
from ..target import on_device
from . import configs
from .configs import Config
from .triton_gated import gated_rows, gated_rows_backward


def forward(
    residual: Tensor, branch: Tensor, gate: Tensor, row_mask: Tensor | None, *, config: Config | None = None
) -> Tensor:
    """residual + tanh(gate) * branch, contiguous, in their promoted dtype.

    Args:
        residual, branch: [..., D] of one shape, any strides.
        gate: 1 or D elements, contiguous.
        row_mask: bool [...], or None.
        config: instead of the chosen one.
    """
    width = residual.shape[-1]
    out = torch.empty(residual.shape, dtype=torch.promote_types(residual.dtype, branch.dtype), device=residual.device)
    if out.numel() == 0:
        return out
    if config is None:
        config = configs.config_for(target.arch_of(out.device), width)
    (residual_rows, branch_rows, mask), inner, strides = _rows(residual, branch, row_mask)
    rows = out.numel() // width
    with on_device(out):
        launch(
            gated_rows, (cdiv(rows, config.BM) * cdiv(width, config.BD),),
            residual_rows, branch_rows, gate, mask, out, *strides[0], *strides[1], *strides[2], rows, inner, width,
            SCALAR=gate.numel() == 1, BD=config.BD, BM=config.BM, num_warps=config.num_warps,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    branch: Tensor | None,
    gate: Tensor,
    row_mask: Tensor | None,
    *,
    branch_dtype: torch.dtype | None,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the branch (contiguous) and of the gate (in its shape and dtype).

    Args:
        grad: [..., D], any strides.
        branch: [..., D]; None: the gate's gradient is not wanted.
        gate, row_mask: as in forward.
        branch_dtype: of the branch's gradient; None: not wanted.
        config: instead of the chosen one.
    """
    width = grad.shape[-1]
    d_branch = None if branch_dtype is None else torch.empty(grad.shape, dtype=branch_dtype, device=grad.device)
    if grad.numel() == 0:
        return d_branch, None if branch is None else torch.zeros_like(gate)
    arch, rows, scalar = target.arch_of(grad.device), grad.numel() // width, gate.numel() == 1
    if config is None:
        config = configs.config_for(arch, width)
    columns = cdiv(width, config.BD)
    programs, parts = cdiv(rows, config.BM), None
    if branch is not None:
        programs = configs.programs_for(arch, rows, columns, config)
        shape = (programs * columns, 1) if scalar else (programs, width)
        parts = torch.empty(shape, dtype=torch.float32, device=grad.device)
    (grad_rows, branch_rows, mask), inner, strides = _rows(grad, branch, row_mask)
    with on_device(grad):
        gated_rows_backward[(programs, columns)](
            grad_rows, branch_rows, gate, mask, d_branch, parts, *strides[0], *strides[1], *strides[2], rows, inner, width,
            SCALAR=scalar, BD=config.BD, BM=config.BM, num_warps=config.num_warps,
        )  # fmt: skip
    return d_branch, None if parts is None else column_sums(parts, gate.shape, gate.dtype, gate)


def _rows(
    first: Tensor, second: Tensor | None, row_mask: Tensor | None
) -> tuple[list[Tensor | None], int, list[Strides]]:
    """`as_rows` of two tensors [..., D] and a mask [...] as bytes."""
    mask = None if row_mask is None else row_mask.contiguous().view(torch.uint8)
    found, inner, strides = as_rows(first, second)
    # The mask is small: its rows are contiguous.
    mask_strides = (0, 0) if mask is None else (inner, 1)
    return [*found, mask], inner, [*strides, mask_strides]

"""The gated residual in plain PyTorch: the definition, and the CPU implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mask_rows(branch: Tensor, row_mask: Tensor | None) -> Tensor:
    """`branch` with the rows that `row_mask` hides set to 0 (and their gradient too, whatever they hold)."""
    return branch if row_mask is None else torch.where(row_mask.unsqueeze(-1), branch, 0)


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    """Compute residual + tanh(gate) * (row_mask ? branch : 0), rounded once, with tanh in fp32."""
    branch = mask_rows(branch, row_mask)
    scalar = gate.numel() == 1
    if scalar and gate.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # One op instead of four: 1.9 us against 5.2 us below and 3.5 us for `branch * gate.tanh() + residual` (one row
        # of 2048 in bf16). A decode step does this twice a layer.
        return torch.add(residual, branch, alpha=math.tanh(gate.item()))
    if gate.dtype not in (torch.float32, torch.float64):
        gate = gate.float()
    scale = gate.tanh().to(torch.promote_types(residual.dtype, branch.dtype)).reshape(() if scalar else -1)
    return torch.addcmul(residual, branch, scale)

"""`gated_residual` on the Triton kernels: an autograd.Function for eager calls, and a registered op for traced ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_launch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(*tensors: Tensor) -> str | None:
    """Why the kernels cannot serve this residual, branch and gate, or None where they can."""
    for x in tensors:
        if x.dtype not in _DTYPES:
            return f"the Triton kernels of gated_residual take fp32, bf16 and fp16, not {x.dtype}"
    return None


class GatedResidual(torch.autograd.Function):
    """Saved: gate and row mask, and the branch if the gate needs a gradient."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, branch: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
        """The output."""
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate, row_mask)
        ctx.dtypes = residual.dtype, branch.dtype
        return triton_launch.forward(residual, branch, gate, row_mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of residual, branch and gate."""
        branch, gate, row_mask = ctx.saved_tensors
        of_residual, of_branch, of_gate, _ = ctx.needs_input_grad
        d_branch = d_gate = None
        if of_branch or of_gate:
            d_branch, d_gate = triton_launch.backward(
                grad, branch, gate, row_mask, branch_dtype=ctx.dtypes[1] if of_branch else None
            )
        return grad.to(ctx.dtypes[0]) if of_residual else None, d_branch, d_gate, None


def run(residual: Tensor, branch: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    """The output [..., D]: of an eager call, or through the registered op of a traced one."""
    if torch.compiler.is_compiling():
        return gated_residual_op(residual, branch, gate, row_mask)
    if torch.is_grad_enabled() and (residual.requires_grad or branch.requires_grad or gate.requires_grad):
        result: Tensor = GatedResidual.apply(residual, branch, gate, row_mask)
        return result
    return triton_launch.forward(residual, branch, gate, row_mask)


@torch.library.custom_op("mllm_fast::gated_residual", mutates_args=())
def gated_residual_op(residual: Tensor, branch: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    """The output [..., D]; differentiable once."""
    return triton_launch.forward(residual, branch, gate, row_mask)


@gated_residual_op.register_fake
def _(residual: Tensor, branch: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    return residual.new_empty(residual.shape, dtype=torch.promote_types(residual.dtype, branch.dtype))


@torch.library.custom_op("mllm_fast::gated_residual_backward", mutates_args=())
def gated_residual_backward_op(
    grad: Tensor, branch: Tensor | None, gate: Tensor, row_mask: Tensor | None, branch_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The gradients of branch (with branch_dtype) and gate (with branch), without elements where not wanted."""
    found = triton_launch.backward(grad, branch, gate, row_mask, branch_dtype=branch_dtype)
    return tuple(grad.new_empty(0) if t is None else t for t in found)  # type: ignore[return-value]


@gated_residual_backward_op.register_fake
def _(
    grad: Tensor, branch: Tensor | None, gate: Tensor, row_mask: Tensor | None, branch_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    nothing = grad.new_empty(0)
    d_branch = nothing if branch_dtype is None else grad.new_empty(grad.shape, dtype=branch_dtype)
    return d_branch, nothing if branch is None else torch.empty_like(gate)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    residual, branch, gate, row_mask = inputs
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate, row_mask)
    ctx.dtypes = residual.dtype, branch.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate, row_mask = ctx.saved_tensors
    of_residual, of_branch, of_gate, _ = ctx.needs_input_grad
    d_branch = d_gate = None
    if of_branch or of_gate:
        wanted = ctx.dtypes[1] if of_branch else None
        d_branch, d_gate = gated_residual_backward_op(grad, branch if of_gate else None, gate, row_mask, wanted)
    return (
        grad.to(ctx.dtypes[0]) if of_residual else None,
        d_branch if of_branch else None,
        d_gate if of_gate else None,
        None,
    )


gated_residual_op.register_autograd(_backward, setup_context=_save)

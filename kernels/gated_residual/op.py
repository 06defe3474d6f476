"""The gated_residual op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import runtime
from ..norm.op import check_same_shape
from ..relaunch import relaunches
from . import reference

runtime.register_op("gated_residual", "residual + tanh(gate) * branch, rows masked", has_triton=True)


def check_gate(residual: Tensor, gate: Tensor | None, row_mask: Tensor | None) -> None:
    """Raise ValueError unless the gate and the row mask fit a residual [..., D]."""
    shape = residual.shape
    if gate is not None and gate.numel() != 1 and not (gate.numel() == shape[-1] == gate.shape[-1]):
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}, but residual has shape {tuple(shape)}: expected one value, or "
            f"{shape[-1]} values along the last dimension, as in [{shape[-1]}] or [1, 1, {shape[-1]}]"
        )
    if row_mask is not None:
        if row_mask.dtype != torch.bool:
            raise ValueError(f"row_mask must be bool (True = add the branch), but is {row_mask.dtype}")
        if row_mask.shape != shape[:-1]:
            raise ValueError(
                f"row_mask has shape {tuple(row_mask.shape)}, but residual has shape {tuple(shape)}: "
                f"expected {tuple(shape[:-1])}, one value a row"
            )


@relaunches
def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """Gated residual: residual + tanh(gate) * branch, with the branch of masked rows left out.

    Flamingo's tanh gating (Alayrac et al. 2022, figure 4): `attn(x) * attn_gate.tanh() + x` of open_flamingo's
    `GatedCrossAttentionBlock`, and `alpha_cross_attn` and `alpha_dense` of transformers'
    `IdeficsGatedCrossAttentionLayer`, which leaves out the attention of tokens that see no image.

    Args:
        residual: [..., D], floating point, any strides (stride 0 is fine).
        branch: shape of `residual`; its dtype may differ.
        gate: before the tanh; one element ([1] or []) or D of them ([D], [1, 1, D]), any floating-point dtype.
        row_mask: bool, shape of `residual` without its last dimension; False rows return `residual` exactly, whatever
            `branch` holds there (NaN too), and pass no gradient to `branch` or `gate`. None means all True.

    Returns:
        [..., D] in the promoted dtype of `residual` and `branch` (an fp32 gate does not widen a bf16 sum). tanh is
        taken in fp32 (fp64 for an fp64 gate), which the reference rounds to that dtype; the sum is rounded once.

    Saved for backward: `gate` and `row_mask`, and `branch` if the gate needs a gradient. Differentiable once on the
    kernels. Equal inputs give bitwise equal outputs and gradients.

    Raises:
        ValueError: a branch of another shape than the residual, a gate with neither 1 nor D values, or a row_mask that
            is not bool or not of the residual's leading shape.
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    check_same_shape("branch", branch, "residual", residual.shape)
    check_gate(residual, gate, row_mask)
    if (
        runtime.choose_for("gated_residual", residual.device.type, lambda: _unsupported(residual, branch, gate))
        == "torch"
    ):
        return reference.gated_residual(residual, branch, gate, row_mask)
    from . import triton_op

    return triton_op.run(residual, branch, gate.contiguous(), row_mask)


def _unsupported(*tensors: Tensor) -> str | None:
    from . import triton_op

    return triton_op.unsupported(*tensors)

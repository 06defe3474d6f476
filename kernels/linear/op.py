"""norm_linear and linear_residual: the two GEMMs of every block, with what stands before and after them."""

from __future__ import annotations

from torch import Tensor

from .. import runtime
from ..gated_residual.op import check_gate
from ..norm.op import Norm, check_dropout, check_norm
from ..relaunch import relaunches
from . import reference
from .activations import ACTIVATIONS, GATED_ACTIVATIONS
from .call import Extras, Group

runtime.register_op("norm_linear", "act(norm(x) W^T + b), gated activations included", has_triton=True)
runtime.register_op(
    "linear_residual", "residual + tanh(gate) * (x W^T + b), or norm(residual + x W^T + b)", has_triton=True
)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raise ValueError unless `weight` [N, K] and `bias` [N] fit `x` [..., K]."""
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)}, but x has shape {tuple(x.shape)}: expected [N, K] with K "
            f"the last dimension of x (a packed or quantised weight does not fit; call its module instead)"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(
            f"{prefix}bias has shape {tuple(bias.shape)}, but {prefix}weight has shape {tuple(weight.shape)}: "
            f"expected ({weight.shape[0]},)"
        )


@relaunches
def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    head_norm: Norm | None = None,
) -> Tensor:
    """act(norm(x) W^T + b), or with a gated activation act(norm(x) Wg^T + bg) * (norm(x) W^T + b).

    The first half of a pre-norm feed-forward network (`FeedForward` of open_flamingo: LayerNorm, Linear, GELU), of a
    gated one (`IdeficsMLP`, `LlamaMLP`: "swiglu" with gate_proj as `gate_weight` and up_proj as `weight`; Shazeer 2020,
    eq. 5 and 6), and a pre-norm query projection, also one whose heads are normalised (`q_layer_norm` of
    `IdeficsAttention`, `q_norm` of `MllamaTextCrossAttention`). The norm is computed once, also for a gated activation.

    Args:
        x: [..., K], floating point, any strides; any number of rows, 0 too.
        weight: [N, K], as `torch.nn.Linear` keeps it, in the dtype of `x` (as for `F.linear`; under autocast any).
        bias: [N] or None.
        norm: applied to `x` first, with fp32 statistics; its parameters may have another dtype.
        activation: None or a name in `ACTIVATIONS`: "gelu" (with erf), "gelu_tanh", "quick_gelu", "relu",
            "squared_relu", "silu", or gated: "swiglu", "geglu".
        gate_weight: [N, K], for a gated activation only.
        gate_bias: [N] or None, for a gated activation only.
        head_norm: an RMS norm with a weight [head_dim], N % head_dim == 0: applied to each head of norm(x) W^T + b, which
            is head_dim neighbouring elements. Excludes `activation`.

    Returns:
        [..., N], in the dtype that `F.linear` gives.

    Saved for backward, on the kernels: `x` (only with a norm, or for a weight's gradient), the weights, and with an
    activation or `head_norm` what stands before it; norm(x) is computed again, and so are its statistics. The reference
    keeps those too. Differentiable once on the kernels. Equal inputs give bitwise equal outputs and gradients.

    Raises:
        BackendUnavailableError: Triton is forced, and cannot serve this call.
        ValueError: shapes that do not fit, an unknown activation, a gated activation without `gate_weight`, a
            `gate_weight` or `gate_bias` that no activation uses, or a `head_norm` that does not fit.
    """
    check_linear(x, weight, bias)
    if norm is not None:
        check_norm(x, norm.weight, norm.bias)
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"unknown activation {activation!r}; expected None or one of {known}")
    if activation in GATED_ACTIVATIONS:
        if gate_weight is None:
            raise ValueError(
                f"activation {activation!r} needs a gate_weight with the shape of weight, {tuple(weight.shape)}, "
                f"but got None"
            )
        if gate_weight.shape != weight.shape:
            raise ValueError(
                f"gate_weight has shape {tuple(gate_weight.shape)}, but weight has shape {tuple(weight.shape)}; "
                f"the two must be equal"
            )
        check_linear(x, gate_weight, gate_bias, "gate_")
    elif gate_weight is not None or gate_bias is not None:
        raise ValueError(
            f"gate_weight and gate_bias belong to a gated activation ({', '.join(sorted(GATED_ACTIVATIONS))}), "
            f"but activation is {activation!r}"
        )
    if head_norm is not None:
        _check_head_norm(head_norm, weight, activation)
    if runtime.chosen("norm_linear", x.device.type) == "triton":
        from . import triton_op

        group, extras = Group(x, weight, bias), Extras(gate_weight, gate_bias)
        out = triton_op.attempt([group], extras, norms=[norm], activation=activation, head_norm=head_norm)
        if out is not None:
            return out
    return reference.norm_linear(x, weight, bias, norm, activation, gate_weight, gate_bias, head_norm)


def _check_head_norm(head_norm: Norm, weight: Tensor, activation: str | None) -> None:
    size = 0 if head_norm.weight is None or head_norm.weight.dim() != 1 else head_norm.weight.shape[0]
    if head_norm.kind != "rms_norm" or not size or weight.shape[0] % size:
        shape = None if head_norm.weight is None else tuple(head_norm.weight.shape)
        raise ValueError(
            f"head_norm is {head_norm.kind!r} with a weight of shape {shape}, but weight has shape "
            f"{tuple(weight.shape)}: expected an 'rms_norm' with a weight (head_dim,) that divides {weight.shape[0]}"
        )
    if activation is not None:
        raise ValueError(f"head_norm excludes an activation, but activation is {activation!r}; apply one of the two")


@relaunches
def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
    norm: Norm | None = None,
    residual_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Compute residual + tanh(gate) * row_mask * dropout(x W^T + b), or norm(residual + dropout(x W^T + b)).

    The second half of a block. Without `norm`: the output projections of Flamingo's gated block (Alayrac et al. 2022,
    figure 4; `GatedCrossAttentionBlock` of open_flamingo, `IdeficsGatedCrossAttentionLayer`, with `gate`) and of every
    other pre-norm block (without). With `norm`: the post-norm edge of a BERT block (`BertSelfOutput`, `BertOutput`, and
    the Q-Former's). On the kernels that norm is a launch of its own, because no program of the GEMM sees a whole row: a
    post-norm edge takes two launches, one more than the other forms. So it does in training; in inference the drop-ins
    call this without `norm` and leave the norm to those who read the rows (`mllm_fast/modules/rows.py`). These are the
    next linear layer (`norm_linear` with `norm`) and the next edge, whose residual is then residual_norm(residual).

    Args:
        x: [..., K], floating point, any strides; any number of rows, 0 too.
        weight: [N, K], as `torch.nn.Linear` keeps it, in the dtype of `x` (as for `F.linear`; under autocast any).
        bias: [N] or None.
        residual: [..., N] with the leading dimensions of `x`; any strides, its dtype may differ.
        gate: before the tanh, one element or N of them, as in `gated_residual`; None adds the branch as it is.
        row_mask: bool [...], the leading shape of `x`; False rows return the residual exactly. None means all True.
        norm: applied to the sum; excludes `gate` and `row_mask`.
        residual_norm: applied to `residual` first, with fp32 statistics.
        dropout_p: probability with which elements of x W^T + b are zeroed, in [0, 1]; pass 0 in evaluation.
        seed: the dropout pattern is a function of the seed and the backend; None draws from torch's default generator.

    Returns:
        [..., N] in the promoted dtype of `residual` and of what `F.linear` gives; rounded as `gated_residual` and
        `layer_norm` round.

    Saved for backward, on the kernels: `x` (only for the weight's gradient), `weight`, the seed, `gate` and `row_mask`; for
    the gate's gradient x W^T + b; with `residual_norm`, `residual`; with `norm`, what `layer_norm` saves. The reference
    keeps the dropout mask instead of the seed, and the norms' statistics. Differentiable once on the kernels. Equal inputs
    give bitwise equal outputs and gradients.

    Raises:
        BackendUnavailableError: Triton is forced, and cannot serve this call.
        ValueError: shapes that do not fit, `gate` or `row_mask` together with `norm`, or a dropout_p outside [0, 1].
    """
    check_linear(x, weight, bias)
    if residual.shape[:-1] != x.shape[:-1] or residual.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, but x with shape {tuple(x.shape)} and weight with shape "
            f"{tuple(weight.shape)} give {(*x.shape[:-1], weight.shape[0])}; the two must be equal (expand a residual "
            f"that is shared)"
        )
    if norm is None:
        check_gate(residual, gate, row_mask)
    elif gate is not None or row_mask is not None:
        raise ValueError("norm (post-norm) excludes gate and row_mask; pass norm alone, or the other two without it")
    else:
        check_norm(residual, norm.weight, norm.bias, "residual")
    if residual_norm is not None:
        check_norm(residual, residual_norm.weight, residual_norm.bias, "residual")
    check_dropout(dropout_p)
    if runtime.chosen("linear_residual", x.device.type) == "triton":
        from . import triton_op

        out = triton_op.linear_residual(x, weight, bias, residual, gate, row_mask, norm, dropout_p, seed, residual_norm)
        if out is not None:
            return out
    return reference.linear_residual(x, weight, bias, residual, gate, row_mask, norm, dropout_p, seed, residual_norm)

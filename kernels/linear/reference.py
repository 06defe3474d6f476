"""The linear ops in plain PyTorch: the definition, and the CPU implementation.

Every GEMM here is a plain `F.linear`: on a CPU (1 and 2 cores with AVX-512 bf16, torch 2.13, bf16, one row, weights
read from memory) nothing that leaves the weight where it is was faster. `addmm` with the residual as first argument and
tanh(gate) as alpha takes 1.03 to 1.15 times as long as `F.linear` and a separate add; `mv` and `addmv` take 1.3 to 1.8
times as long, `bmm` over blocks of rows 1.3 to 1.6, two halves 1.02 to 1.2. With the weight repacked by oneDNN it takes
0.45 (one core) to 0.7 (two cores) of the time, but that is a second copy of every weight.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..gated_residual import reference as gated_residual
from ..norm import reference as norms
from ..norm.op import Norm
from . import lowered, onednn
from .activations import ACTIVATIONS, GATED_ACTIVATIONS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias), always as one GEMM over all rows."""
    if lowered.serves(x, weight):
        return lowered.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])
    if x.dim() <= 2 and not onednn.serves(x, weight, bias):
        return F.linear(x, weight, bias)
    # Without this, rows that are not evenly spaced (`x[:, :n]`) become a batched GEMM on the CPU: 14.3 ms against
    # 1.3 ms for [4, 32, 768] x [3072, 768] in bf16 (one core). Copying them first costs almost nothing.
    rows = x.flatten(0, -2)
    y = onednn.linear(rows, weight, bias) if onednn.serves(rows, weight, bias) else F.linear(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def normalize(
    x: Tensor, norm: Norm | None, residual: Tensor | None = None, dropout_p: float = 0.0, seed: int | None = None
) -> Tensor:
    """norm(residual + dropout(x)); x itself where norm is None."""
    if norm is None:
        return x
    if norm.kind == "layer_norm":
        return norms.layer_norm(x, norm.weight, norm.bias, norm.eps, residual, dropout_p, seed)
    return norms.rms_norm(x, norm.weight, norm.eps, residual, dropout_p, seed)


def normalize_heads(y: Tensor, head_norm: Norm) -> Tensor:
    """Each head (as many neighbouring elements as head_norm.weight has) of y [..., N], normalised on its own."""
    assert head_norm.weight is not None  # the public function checked it
    heads = y.unflatten(-1, (-1, head_norm.weight.shape[0]))
    return normalize(heads, head_norm).flatten(-2)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    activation: str | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    head_norm: Norm | None = None,
) -> Tensor:
    """act(norm(x) W^T + b), or act(norm(x) Wg^T + bg) * (norm(x) W^T + b); the norm is computed once."""
    x = normalize(x, norm)
    y = linear(x, weight, bias)
    if head_norm is not None:
        return normalize_heads(y, head_norm)
    if activation is None:
        return y
    if activation not in GATED_ACTIVATIONS:
        return ACTIVATIONS[activation](y)
    assert gate_weight is not None  # the public function checked it
    return ACTIVATIONS[activation](linear(x, gate_weight, gate_bias)) * y


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
    row_mask: Tensor | None,
    norm: Norm | None,
    dropout_p: float,
    seed: int | None,
    residual_norm: Norm | None = None,
) -> Tensor:
    """Compute residual + tanh(gate) * row_mask * dropout(x W^T + b), or norm(residual + dropout(x W^T + b))."""
    residual = normalize(residual, residual_norm)
    y = linear(x, weight, bias)
    if norm is not None:
        return normalize(y, norm, residual, dropout_p, seed)
    y = norms.dropout(y, dropout_p, seed)
    if gate is not None:
        return gated_residual.gated_residual(residual, y, gate, row_mask)
    return residual + gated_residual.mask_rows(y, row_mask)


def stacked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...], norm: Norm | None
) -> tuple[Tensor, ...]:
    """norm(x) W^T + b, split along the last dimension into views."""
    return linear(normalize(x, norm), weight, bias).split(sizes, dim=-1)

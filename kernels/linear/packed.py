"""Weights in oneDNN's blocked layout, for CPU inference: a second copy that small GEMMs read faster.

With one row a GEMM reads each weight once, so the memory decides. From row-major bf16 weights `F.linear` reaches about
two thirds of the bandwidth of two cores and two fifths of that of one; from blocked weights it reaches nearly all of it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)


def can_pack(weight: Tensor) -> bool:
    """Whether `pack_weight` can serve this weight on this machine."""
    return weight.is_cpu and _machine_packs(weight.dtype)


@functools.cache
def _machine_packs(dtype: torch.dtype) -> bool:
    if dtype not in DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_weight(weight: Tensor) -> Tensor:
    """The [N, K] weight in oneDNN's blocked layout: an opaque tensor for `packed_linear`, as large as the weight.

    Raises:
        ValueError: the weight is not on a CPU, or its dtype has no such layout here (see `can_pack`).
    """
    if not can_pack(weight):
        raise ValueError(
            f"cannot pack a {weight.dtype} weight on {weight.device}: packing serves {DTYPES} on CPUs with oneDNN"
        )
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with a packed W. For inference: no gradient flows.

    No activation is appended: oneDNN's erf GELU takes longer on 576 x 4096 outputs (1.2 ms) than torch's own pass over
    them (0.3 ms).

    Args:
        x: [..., K] in the dtype of the weight.
        packed: from `pack_weight`, of a weight [N, K].
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of x.
    """
    return (_traced_linear if torch.compiler.is_compiling() else _linear)(x, packed, bias)


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


# torch.compile knows oneDNN's op by name, and expects a weight that it packed itself; this one it leaves alone.
_traced_linear = torch.library.custom_op("mllm_fast::packed_linear", _linear, mutates_args=())


@_traced_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))

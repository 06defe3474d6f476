"""Layer norm and RMS norm in plain PyTorch: the definition, and the CPU implementation.

`torch.nn.functional.layer_norm` and `rms_norm` accumulate the statistics of 16-bit inputs in fp32 and round once,
at the end (tests/kernels/test_norm.py holds them to it), so the definition is a call to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _keep(shape: Sequence[int], p: float, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 where an element is kept, 0 where it is dropped: what `F.dropout` draws after `torch.manual_seed(seed)`."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).bernoulli_(1.0 - p, generator=generator)


# torch.compile cannot trace the making of a generator; as an op of its own it stays whole in the graph.
_traced_keep = torch.library.custom_op("mllm_fast::dropout_keep", _keep, mutates_args=())


@_traced_keep.register_fake
def _(shape: Sequence[int], p: float, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def dropout(x: Tensor, p: float, seed: int | None) -> Tensor:
    """Zero each element with probability `p` and scale the rest by 1 / (1 - p).

    Without a seed this is `F.dropout`, so a fused model draws the very numbers its original draws. With one, the
    pattern is that of `F.dropout` right after `torch.manual_seed(seed)`, whatever the strides of `x`; no global
    generator is touched.
    """
    if p == 0.0:
        return x
    if seed is None:
        return F.dropout(x, p)
    draw = _traced_keep if torch.compiler.is_compiling() else _keep
    keep = draw(x.shape, p, seed, x.dtype, x.device)
    return x * (keep.div_(1.0 - p) if p < 1.0 else keep)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    seed: int | None,
) -> Tensor:
    """With s = residual + dropout(x): (s - mean(s)) * rsqrt(var(s) + eps) * weight + bias, in the dtype of s."""
    x = _add_residual(x, residual, dropout_p, seed)
    shape = x.shape[-1:]
    if all(p is None or p.dtype == x.dtype for p in (weight, bias)):
        return F.layer_norm(x, shape, weight, bias, eps)
    # F.layer_norm takes parameters of another dtype in one case only (fp32 beside a 16-bit x, on a CPU), but frozen
    # 16-bit models keep norms in fp32, and the other way round. Every other mix is computed in the wide dtype.
    wide = _wide(x)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    if x.device.type == "cpu":
        return F.layer_norm(x, shape, weight, bias, eps)
    return F.layer_norm(x.to(wide), shape, weight, bias, eps).to(x.dtype)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, dropout_p: float, seed: int | None
) -> Tensor:
    """With s = residual + dropout(x): s * rsqrt(mean(s^2) + eps) * weight, in the dtype of s."""
    x = _add_residual(x, residual, dropout_p, seed)
    if weight is None or weight.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # F.rms_norm takes the mix, with a warning.
    wide = _wide(x)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _add_residual(x: Tensor, residual: Tensor | None, dropout_p: float, seed: int | None) -> Tensor:
    x = dropout(x, dropout_p, seed)
    return x if residual is None else residual + x

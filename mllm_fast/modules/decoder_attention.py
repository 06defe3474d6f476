"""Attention of a decoder layer under a mask that the model hands to every layer, keeping the least for backward.

torch's attention turns a mask of booleans into one that it adds, and keeps it: once a layer, unless it is given one that
it can keep as it is. And with a mask, on a GPU, only its slowest way takes fewer heads of keys than of queries: whoever
repeats them keeps the repeats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

# torch's kernels for GPUs read a mask whose rows begin at multiples of so many elements, and copy any other.
ALIGNED = 8

# For each living mask of booleans the version that was read, and the masks made of it, by dtype.
_added: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` [..., S, T] is True and -inf elsewhere, in `dtype`; other masks than of booleans as they are.

    It is made once for a mask, and lives as long as that, so that all layers of a model that are given the same mask keep
    one tensor.
    """
    if mask.dtype != torch.bool:
        return mask
    if mask.is_inference():  # nothing tells whether it was written to since
        return _made(mask, dtype)
    version, made = _added.get(mask, (None, {}))
    if version != mask._version:
        made = {}
        _added[mask] = (mask._version, made)
    if dtype not in made:
        made[dtype] = _made(mask, dtype)
    added: Tensor = made[dtype]
    return added


def _made(mask: Tensor, dtype: torch.dtype) -> Tensor:
    *rows, columns = mask.shape
    with torch.inference_mode(False), torch.no_grad():
        added = torch.zeros(*rows, -(-columns // ALIGNED) * ALIGNED, dtype=dtype, device=mask.device)[..., :columns]
        return added.masked_fill_(~mask, float("-inf"))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v, keys and values repeated for the query heads of their group (arXiv 2305.13245).

    Args:
        q: [B, H, S, D].
        k, v: [B, G, T, D], G a divisor of H.
        mask: [B or 1, 1, S, T] of booleans (True: visible), or to be added.

    Returns:
        [B, H, S, D].

    Saved for backward: q, k, v, the result with its logsumexps, and `added_mask(mask)`. With groups on a GPU the result is
    computed again in backward instead of being kept.
    """
    mask = added_mask(mask, q.dtype)
    if k.shape[1] == q.shape[1] or q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return grouped_attention(q, k, v, mask, scale)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`masked_attention` of keys and values that are repeated twice, in forward and in backward, and kept once."""
    y: Tensor = _GroupedAttention.apply(q, k, v, mask, scale)
    return y


def _repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, mask)
        return _repeated(q, k, v, mask, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with torch.enable_grad():
            q, k, v = leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
            y = _repeated(q, k, v, mask, ctx.scale)
        found = iter(torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad))
        return *(next(found) if need else None for need in needs), None, None

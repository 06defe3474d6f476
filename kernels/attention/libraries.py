"""`attention` by torch's SDPA and by xformers, for the calls that `dispatch` gives them: no mask, or hidden keys only.

Tensors are [batch, length, heads, head_dim]. Batch rows that share keys become queries of one row; two key sources are
concatenated, because neither library takes two. Differentiable by autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import Mask


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, mask: Mask | None, scale: float
) -> Tensor:
    """[B, Lq, H, D] by `torch.nn.functional.scaled_dot_product_attention`."""
    batch, queries = q.shape[:2]
    visible = None if mask is None else _visible(mask, k)
    blind = None
    if visible is not None:
        # A hidden key must not be read, whatever it holds: a product with NaN is NaN also where the weight is 0.
        k, v = (x.masked_fill(~visible[:, :, None, None], 0) for x in (k, v))
        if extra_k is None:
            # What SDPA gives for a row that sees nothing depends on its kernel: let it see zeros.
            blind = ~visible.any(1)
            visible = visible | blind[:, None]
            q = q.masked_fill(blind[:, None, None, None], 0)
        visible = _with_extra(visible, extra_k)[:, None, None]  # [B, 1, 1, keys]
    q, k, v = (x.transpose(1, 2) for x in _plain(q, k, v, extra_k, extra_v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped)
    out = out.transpose(1, 2).reshape(batch, queries, *out.shape[1::2])
    return out if blind is None else out.masked_fill(blind[:, None, None, None], 0)


def xformers(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, mask: Mask | None, scale: float
) -> Tensor:
    """[B, Lq, H, D] by `xformers.ops.fmha.memory_efficient_attention`; without a mask."""
    from xformers.ops import fmha

    batch, queries, heads, _ = q.shape
    q, k, v = _plain(q, k, v, extra_k, extra_v)
    if (group := heads // k.shape[2]) > 1:  # five dimensions, the group expanded
        q = q.unflatten(2, (k.shape[2], group))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))
    out: Tensor = fmha.memory_efficient_attention(q, k, v, scale=scale)
    return out.reshape(batch, queries, heads, out.shape[-1])


LIBRARIES: dict[str, Callable[..., Tensor]] = {"sdpa": sdpa, "xformers": xformers}


def _plain(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [Bk, fold * Lq, H, D], and the keys and values of both sources, without strides of 0."""
    if extra_k is not None and extra_v is not None:
        k, v = (torch.cat((x, e.expand(x.shape[0], -1, -1, -1)), 1) for x, e in ((k, extra_k), (v, extra_v)))
    q = q.reshape(k.shape[0], -1, *q.shape[2:])
    return tuple(x.contiguous() if 0 in x.stride() else x for x in (q, k, v))  # type: ignore[return-value]


def _visible(mask: Mask, k: Tensor) -> Tensor | None:
    """[B, Lk] bool on k's device; None where all is visible."""
    visible = None if mask.key_padding is None else mask.key_padding.to(k.device)
    if mask.key_lengths is not None:
        within = torch.arange(k.shape[1], device=k.device) < mask.key_lengths.to(k.device)[:, None]
        visible = within if visible is None else visible & within
    return visible


def _with_extra(visible: Tensor, extra_k: Tensor | None) -> Tensor:
    return visible if extra_k is None else F.pad(visible, (0, extra_k.shape[1]), value=True)

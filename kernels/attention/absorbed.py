"""absorbed_attention: attention over keys and values that are linear in something else, without ever forming them.

With k = x W_k^T and v = x W_v^T, scores q k^T are (q W_k) x^T, and what is read is (p x) W_v^T: the projections move from
the many rows of x to the few queries. Fewer operations wherever there are fewer queries than
keys * head_dim / (keys + head_dim); for the Q-Former's 32 queries on 257 image tokens, 0.6 of them. DeepSeek-V2
(arXiv 2405.04434, section 2.1.2) absorbs the projections of its latent attention in the same way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import runtime
from ..linear.reference import linear

runtime.register_op("absorbed_attention", "attention over keys and values that are linear in x, and never formed")


def absorbed_attention(
    q: Tensor,
    x: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None = None,
    *,
    key_padding: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q (x W_k^T)^T * scale) (x W_v^T + b_v), head by head.

    A bias of the keys would add the same to all scores of a row, which softmax undoes: there is no argument for it. In
    16 bit q W_k, the scores and p x are rounded where keys and values are otherwise.

    Args:
        q: [B, Lq, H, D], its projection's bias included.
        x: [B, M, E] in q's dtype.
        key_weight, value_weight: [H * D, E], as `torch.nn.Linear` keeps them.
        value_bias: [H * D] or None.
        key_padding: [B, M] bool, True where visible; each row of it must show something. None shows everything.
        scale: what scores are multiplied with; default D ** -0.5.

    Returns:
        [B, Lq, H, D] in q's dtype; softmax in fp32 (fp64 for fp64).

    Saved for backward: what autograd saves of the GEMMs and the softmax.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, _, heads, size = q.shape
    wanted = (heads * size, x.shape[-1])
    if x.ndim != 3 or x.shape[0] != batch or key_weight.shape != wanted or value_weight.shape != wanted:
        raise ValueError(
            f"q is {list(q.shape)}, x {list(x.shape)}, key_weight {list(key_weight.shape)} and value_weight "
            f"{list(value_weight.shape)}; expected x [{batch}, M, E] and weights [{heads * size}, E]"
        )
    if key_padding is not None and key_padding.shape != x.shape[:2]:
        raise ValueError(f"key_padding is {list(key_padding.shape)}; expected {list(x.shape[:2])}, as x has")
    runtime.choose("absorbed_attention", q)
    scale = size**-0.5 if scale is None else scale
    # Queries that all images share are absorbed once.
    shared = batch > 1 and q.stride(0) == 0
    q = q[:1] if shared else q
    if math.frexp(scale)[0] == 0.5:  # a power of two changes no rounding, and is cheapest here
        q, scale = q * scale, 1.0
    keys, values = (w.view(heads, size, x.shape[-1]) for w in (key_weight, value_weight))  # [H, D, E]
    hidden = None if key_padding is None else ~key_padding.unsqueeze(1)
    absorbed = [_absorb(row, keys) for row in q] * (batch if shared else 1)
    # One image at a time: its intermediates stay in a CPU's cache (2.0 ms an image, against 3.4 for eight at once).
    read = [_read(absorbed[b], x[b], values, None if hidden is None else hidden[b], scale) for b in range(batch)]
    if not read:
        return q.new_empty(q.shape)
    out = torch.stack(read).transpose(1, 2)
    return out if value_bias is None else out + value_bias.view(heads, size)


def _absorb(q: Tensor, keys: Tensor) -> Tensor:
    """Queries [Lq, H, D] through the weights of the keys [H, D, E]: [H * Lq, E]."""
    return torch.bmm(q.transpose(0, 1), keys).flatten(0, 1)


def _read(absorbed: Tensor, x: Tensor, values: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """What absorbed queries [H * Lq, E] read of one image x [M, E], of which `hidden` [1, M] is not seen: [H, Lq, D]."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = linear(absorbed, x, None)
    if scale != 1.0:
        scores = scores.to(wide) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    mixed = linear(torch.softmax(scores, dim=-1, dtype=wide).to(x.dtype), x.t(), None)  # [H * Lq, E]
    return torch.bmm(mixed.view(values.shape[0], -1, values.shape[2]), values.transpose(1, 2))

"""softmax(q k^T * scale) v, with its logsumexp, over one rectangle of keys that all queries see or one causal square.

Two results over different keys can be merged by their logsumexp (`merge`). The backward of each part takes the output
and the logsumexp of the merged whole, and then gives the exact gradients: with P = exp(s - lse) and
delta = rowsum(dO * O), both of the whole row, dS = P * (dO V^T - delta) holds key by key (FlashAttention,
arXiv 2205.14135, algorithm 4).

All tensors are [batch, length, heads, head_dim] in the compute dtype (`compute_dtype`); logsumexp is
[batch, length, heads]. Keys may have fewer batch rows and fewer heads than queries, by whole factors: consecutive query
rows, or heads, share them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

# Scores held at once by the plain path, in elements: 8 MiB in fp32.
SCORES = 1 << 21

# Scores of one head over one row of keys from which a batched GEMM beats the flash kernel: 3 queries over 577 keys take
# 185 microseconds against 259, one query over 64 keys does not gain.
MANY_SCORES = 1024

_aten = torch.ops.aten
_HAS_FLASH = hasattr(_aten, "_scaled_dot_product_flash_attention_for_cpu")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32.

    16-bit inputs are widened piece by piece also before torch's CPU flash kernel. Without AMX, its own 16-bit form is
    slower than the cast and the fp32 form together. Without the cast, 98 against 73 microseconds forward and 857
    against 161 backward for 34 queries, 64 keys and 8 heads of 64; 757 against 47 for one query and 32 heads of 128
    (AMD EPYC with AVX512-BF16, one thread).
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(slots=True)
class Dropout:
    """Dropout on the probabilities, drawn call by call: equal calls in equal order give equal patterns."""

    p: float
    generator: torch.Generator

    @staticmethod
    def start(p: float, seed: int, device: torch.device) -> Dropout | None:
        """The beginning of the pattern of `seed`, or None for p = 0."""
        return Dropout(p, torch.Generator(device).manual_seed(seed)) if p else None

    def factors(self, like: Tensor) -> Tensor:
        """0 with probability p, else 1 / (1 - p), for each element of `like`."""
        drawn = torch.rand(like.shape, generator=self.generator, device=like.device)
        return (drawn >= self.p).to(like.dtype).mul_(1 / (1 - self.p) if self.p < 1 else 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """(output, logsumexp) of q [B, L, H, D] over k, v [B / fold, n, H / group, D]; causal needs n == L."""
    run = _flash_forward if _use_flash(q, dropout) else _plain_forward
    batch, length, heads, _ = q.shape
    key_batch, _, key_heads, _ = k.shape
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if batch == key_batch and heads == key_heads:
        out, lse = run(q.transpose(1, 2), keys, values, scale, causal, dropout)
        return out.transpose(1, 2), lse.transpose(1, 2)
    if not causal:
        out, lse = run(_pack(q, k), keys, values, scale, False, dropout)
        return _unpack(out, q, k), _unpack(lse.unsqueeze(-1), q, k).squeeze(-1)
    # Packed rows would lose their place on the diagonal; so one call for each query that shares a key.
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(batch, length, heads)
    for q_, out_, lse_ in zip(_members(q, k), _members(out, k), _members(lse.unsqueeze(-1), k), strict=True):
        part, part_lse = run(q_, keys, values, scale, True, dropout)
        out_.copy_(part)
        lse_.copy_(part_lse.unsqueeze(-1))
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of this part, from the output and logsumexp of the whole."""
    run = _flash_backward if _use_flash(q, dropout) else _plain_backward
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2]:
        grad_, q_, out_, lse_ = (x.transpose(1, 2) for x in (grad, q, out, lse))
        dq, dk, dv = run(grad_, q_, out_, keys, values, lse_, scale, causal, dropout)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    lse = lse.unsqueeze(-1)
    if not causal:
        grad_, q_, out_, lse_ = (_pack(x, k) for x in (grad, q, out, lse))
        dq, dk, dv = run(grad_, q_, out_, keys, values, lse_.squeeze(-1), scale, False, dropout)
        return _unpack(dq, q, k), dk.transpose(1, 2), dv.transpose(1, 2)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for grad_, q_, out_, lse_, dq_ in zip(*(_members(x, k) for x in (grad, q, out, lse, dq)), strict=True):
        part = run(grad_, q_, out_, keys, values, lse_.squeeze(-1), scale, True, dropout)
        dq_.copy_(part[0])
        dk += part[1]
        dv += part[2]
    return dq, dk.transpose(1, 2), dv.transpose(1, 2)


def inference(q: Tensor, sources: list[tuple[Tensor, Tensor]], scale: float) -> Tensor | None:
    """The output alone over one or more rectangles of keys that all queries see, for 16-bit inputs on a CPU; or None.

    torch's CPU flash kernel multiplies 64 queries with 320 keys at 160 GFLOP/s on two cores, where a batched GEMM in
    bf16 runs at ten times that, so that scores in a block of memory cost less than half: 1.1 against 2.7 ms for 9 images
    of 256 + 64 keys and 8 heads of 64. None is given where that does not hold: few queries to a key, or scores beyond
    the block. Scaled queries and scores
    are rounded to the input's type, as eager attention does; softmax is computed in fp32.

    Args:
        q: [B, L, H, D] in bf16 or fp16; sources: pairs k, v [B / fold, n, H / group, D] of the same type.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    batch, length, heads, _ = q.shape
    keys = sum(k.shape[1] for k, _ in sources)
    rows = max(1, SCORES // max(1, heads * length * keys))
    sharing = length * batch // max(1, max(k.shape[0] for k, _ in sources))
    if sharing * keys < MANY_SCORES or any(k.shape[0] not in (1, batch) for k, _ in sources):
        return None
    out = torch.empty(q.shape, dtype=q.dtype)
    for start in range(0, batch, rows):
        part = slice(start, start + rows)
        q_part = q[part] * scale
        parts = [(k, v) if k.shape[0] == 1 < batch else (k[part], v[part]) for k, v in sources]
        scores = q.new_empty(q_part.shape[0], heads, length, keys)
        offset = 0
        for k, _ in parts:
            # GEMMs want heads that lie in one piece; the copy of k is a few per cent of the product.
            packed = torch.matmul(_pack(q_part, k), k.transpose(1, 2).contiguous().transpose(-1, -2))
            scores[..., offset : offset + k.shape[1]] = _unpack(packed, q_part, k).transpose(1, 2)
            offset += k.shape[1]
        p = scores.softmax(-1).transpose(1, 2)
        offset = 0
        total: Tensor | None = None
        for _, v in parts:
            product = torch.matmul(_pack(p[..., offset : offset + v.shape[1]], v), v.transpose(1, 2).contiguous())
            product = _unpack(product, q_part, v)
            total = product if total is None else total.add_(product)
            offset += v.shape[1]
        assert total is not None, "there is at least one source"
        out[part] = total
    return out


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The result over the union of two disjoint sets of keys, each of which every row sees some of."""
    both = torch.logaddexp(lse, more_lse)
    weight, more_weight = (lse - both).exp_().unsqueeze(-1), (more_lse - both).exp_().unsqueeze(-1)
    return torch.addcmul(out * weight, more, more_weight), both


def _use_flash(q: Tensor, dropout: Dropout | None) -> bool:
    return _HAS_FLASH and q.device.type == "cpu" and dropout is None


def _pack(x: Tensor, k: Tensor) -> Tensor:
    """[B, L, H, E] -> [key batch, key heads, queries that share a key, E]: a shared key is then read once."""
    batch, length, heads, size = x.shape
    key_batch, _, key_heads, _ = k.shape
    rows = batch // key_batch * length
    split = x.reshape(key_batch, rows, key_heads, heads // key_heads, size)
    return split.transpose(1, 2).reshape(key_batch, key_heads, rows * (heads // key_heads), size)


def _unpack(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    key_batch, _, key_heads, _ = k.shape
    split = x.reshape(key_batch, key_heads, batch // key_batch * length, heads // key_heads, x.shape[-1])
    return split.transpose(1, 2).reshape(batch, length, heads, x.shape[-1])


def _members(x: Tensor, k: Tensor) -> Iterator[Tensor]:
    """Views [key batch, key heads, L, E] of x [B, L, H, E], one for each (query row, query head) that shares a key."""
    batch, length, heads, size = x.shape
    key_batch, _, key_heads, _ = k.shape
    split = x.view(key_batch, batch // key_batch, length, key_heads, heads // key_heads, size)
    for fold in range(batch // key_batch):
        for group in range(heads // key_heads):
            yield split[:, fold, :, :, group].transpose(1, 2)


# Below, tensors are [batch, heads, length, head_dim] and logsumexp is [batch, heads, length].


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    result = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return cast(tuple[Tensor, Tensor], result)


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    result = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return cast(tuple[Tensor, Tensor, Tensor], result)


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of query rows whose scores fit in `SCORES`, or single rows, whose scores are fewer than k's elements."""
    rows = max(1, SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(start, start + rows) for start in range(0, q.shape[2], rows))


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, rows: slice) -> Tensor:
    scores = torch.matmul(q[:, :, rows] * scale, k.transpose(-1, -2))
    if causal:
        row = torch.arange(rows.start, rows.start + scores.shape[2], device=q.device)
        scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > row.unsqueeze(-1), -math.inf)
    return scores


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1])
    for rows in _chunks(q, k):
        scores = _scores(q, k, scale, causal, rows)
        lse[:, :, rows] = scores.logsumexp(-1)
        p = scores.sub_(lse[:, :, rows].unsqueeze(-1)).exp_()
        if dropout is not None:
            p *= dropout.factors(p)
        out[:, :, rows] = torch.matmul(p, v)
    return out, lse


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _chunks(q, k):
        p = _scores(q, k, scale, causal, rows).sub_(lse[:, :, rows].unsqueeze(-1)).exp_()
        grad_rows = grad[:, :, rows]
        dp = torch.matmul(grad_rows, v.transpose(-1, -2))
        if dropout is None:
            dv += torch.matmul(p.transpose(-1, -2), grad_rows)
        else:
            factors = dropout.factors(p)
            dv += torch.matmul((p * factors).transpose(-1, -2), grad_rows)
            dp *= factors
        delta = (grad_rows * out[:, :, rows]).sum(-1, keepdim=True)
        ds = dp.sub_(delta).mul_(p).mul_(scale)
        dq[:, :, rows] = torch.matmul(ds, k)
        dk += torch.matmul(ds.transpose(-1, -2), q[:, :, rows])
    return dq, dk, dv

"""What the attention tests compare with: torch's own SDPA over concatenated keys, under a dense bool mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mllm_fast.kernels.attention import Mask, MediaRanges, MediaSubsets, dense


def visible(mask: Mask | None, batch: int, queries: int, keys: int) -> Tensor:
    """[batch, queries, keys] bool: what each part of the mask says, key by key."""
    seen = torch.ones(batch, queries, keys, dtype=torch.bool)
    if mask is None:
        return seen
    key, row = torch.arange(keys), torch.arange(queries)
    if mask.key_lengths is not None:
        seen &= key < mask.key_lengths[:, None, None]
    if mask.key_padding is not None:
        seen &= mask.key_padding[:, None]
    if mask.causal:
        seen &= (key <= row[:, None] + keys - queries) | (key < mask.prefix)
    if isinstance(mask.media, MediaRanges):
        image = key // mask.media.tokens_per_image
        seen &= (image >= mask.media.first[..., None]) & (image < mask.media.last[..., None])
    if isinstance(mask.media, MediaSubsets):
        image = key // mask.media.tokens_per_image
        seen &= (mask.media.words[..., image // 64] >> (image % 64)) & 1 == 1
    return seen


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    kv_index: Tensor | None = None,
) -> Tensor:
    """`attention` by definition: keys repeated and concatenated, a dense mask, SDPA, and 0 where nothing is seen."""
    batch, queries, heads, _ = q.shape
    key_rows, keys, key_heads, _ = k.shape
    index = torch.arange(batch) // (batch // key_rows) if kv_index is None else kv_index.long()
    seen = visible(mask, batch, queries, keys)
    k, v = k[index], v[index]
    uniform = torch.zeros(batch, queries, dtype=torch.bool)
    if mask is not None and isinstance(mask.media, MediaRanges) and mask.media.beyond == "mean" and extra_k is None:
        first, last = mask.media.first, mask.media.last
        uniform = ((first >= mask.media.images) & (first < last)).expand(batch, queries)
    mean = v.mean(1, keepdim=True).repeat_interleave(heads // key_heads, 2)
    if extra_k is not None and extra_v is not None:
        rows = extra_k.shape[0]
        which = torch.zeros_like(index) if rows == 1 else index if rows == key_rows else torch.arange(batch)
        k, v = torch.cat([k, extra_k[which]], 1), torch.cat([v, extra_v[which]], 1)
        seen = torch.cat([seen, seen.new_ones(batch, queries, extra_k.shape[1])], -1)
    blind = ~seen.any(-1)
    if k.shape[1] == 0:
        return q * 0
    k, v = (x.repeat_interleave(heads // key_heads, 2).transpose(1, 2) for x in (k, v))
    # A row that sees nothing is given everything, and then put to 0: SDPA's own answer for it is not what we define.
    allowed = (seen | blind[..., None])[:, None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=allowed, scale=scale).transpose(1, 2)
    out = out.masked_fill(blind[:, :, None, None], 0)
    return torch.where(uniform[:, :, None, None], mean, out) if uniform.any() else out


def gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of every input; 0 for one that the output does not depend on."""
    found = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@contextlib.contextmanager
def plain_path(scores: int = 7) -> Iterator[None]:
    """Without the flash kernel, and with so few scores at a time that even small calls take several steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_HAS_FLASH", False)
        patch.setattr(dense, "SCORES", scores)
        yield


class Recorder(TorchDispatchMode):
    """Counts the calls of aten ops, and notes the most elements that one new tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self._seen |= {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._seen:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out

    @property
    def flash_calls(self) -> int:
        return self.calls.get("_scaled_dot_product_flash_attention_for_cpu", 0)

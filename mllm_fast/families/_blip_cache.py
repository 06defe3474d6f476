"""Caches of BLIP's text decoder: an image part with one row per image, and a text part that may be static."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from ..kernels.attention import Mask, MediaRanges
from ..modules.med import MakeMask


class ImageCacheLayer(DynamicLayer):
    """The cross-attention part of a cache: keys and values with one row per image, however many beams read it.

    Upstream stores a row per beam and gathers them all at every step of a beam search. Beams stay within their image, so
    with several text rows to an image there is nothing to reorder or repeat. Keys and values are [images, heads, tokens,
    head_dim], as in every cache of transformers.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.rows = rows  # text rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder, where each text row has an image row of its own."""
        if self.rows == self.keys.shape[0]:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let `repeats` text rows follow each one: they read the same image row."""
        self.rows *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these text rows; from then on each has an image row of its own."""
        images = torch.arange(self.rows, device=self.keys.device) // (self.rows // self.keys.shape[0])
        super().batch_select_indices(images[indices])
        self.rows = self.keys.shape[0]


def is_static(cache: Cache | None) -> bool:
    """Whether the cache has room for keys that do not exist yet, and counts those that do on the device."""
    return cache is not None and cache.is_compileable


def split(cache: Cache, config: Any) -> EncoderDecoderCache:
    """The cache with a part of its own for image keys, which upstream would put among those of a static cache's text."""
    return cache if isinstance(cache, EncoderDecoderCache) else EncoderDecoderCache(cache, DynamicCache(config=config))


def capacity(cache: Cache) -> int:
    """How many text keys a static cache returns, used or not."""
    text = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return int(text.get_max_length())


def room_for(mask: Tensor | None, keys: int) -> Tensor | None:
    """A padding mask [B, L] with room for all `keys` of a static cache: its shape then stays what it is at every step."""
    return None if mask is None else F.pad(mask.bool(), (0, keys - mask.shape[1]))


def positions(cache: Cache, queries: int, device: torch.device) -> Tensor:
    """The positions [1, queries] of new tokens behind those in a static cache, without waiting for their number."""
    return (torch.arange(queries, device=device) + cache.get_seq_length()).unsqueeze(0)


def static_mask(visible: Tensor | None, position: Tensor, batch: int, keys: int) -> Mask:
    """The causal mask over a static cache's keys.

    Args:
        visible: [B, keys] padding mask; None: all tokens are visible.
        position: [1, queries] of the rows that ask.
        batch: B.
        keys: the cache's capacity.
    """
    limit = position + 1
    if limit.shape[1] == 1:
        return Mask(key_lengths=limit[0].expand(batch), key_padding=visible)
    return Mask(key_padding=visible, media=MediaRanges(torch.zeros_like(limit), limit, keys, 1))


def made_once(make: MakeMask) -> MakeMask:
    """`make`, run once for each number of rows; a tracer has no use for that."""
    return make if torch.compiler.is_compiling() else functools.cache(make)

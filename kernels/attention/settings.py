"""A call's masks and numbers in flat form: what the kernels and the registered op take besides q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import Mask, MediaRanges, MediaSubsets


@dataclass(frozen=True, eq=False, slots=True)
class Settings:
    """What a call needs besides q, k, v and the second source: masks as small integer tensors, and numbers.

    first, last [B or 1, Lq] (ranges) or words [B or 1, Lq, W] (subsets) are the media mask; images is 0 without one.
    """

    key_lengths: Tensor | None
    key_padding: Tensor | None
    first: Tensor | None
    last: Tensor | None
    words: Tensor | None
    kv_index: Tensor | None
    causal: bool
    prefix: int
    images: int
    tokens: int
    beyond_mean: bool
    scale: float
    dropout_p: float
    seed: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The masks and kv_index."""
        return (self.key_lengths, self.key_padding, self.first, self.last, self.words, self.kv_index)

    @property
    def mask(self) -> Mask:
        """The mask that `settings_of` was given, but for an empty one, which says nothing."""
        media: MediaRanges | MediaSubsets | None = None
        if self.words is not None:
            media = MediaSubsets(self.words, self.images, self.tokens)
        elif self.first is not None and self.last is not None:
            beyond = "mean" if self.beyond_mean else "zero"
            media = MediaRanges(self.first, self.last, self.images, self.tokens, beyond)  # type: ignore[arg-type]
        return Mask(self.key_lengths, self.key_padding, self.causal, self.prefix, media)


def settings_of(
    mask: Mask | None, kv_index: Tensor | None, scale: float, dropout_p: float, seed: int, device: torch.device
) -> Settings:
    """The flat form of a call's masks and numbers; mask tensors are brought to `device`."""
    if mask is None:
        mask = _NO_MASK
    media = mask.media
    first = last = words = None
    images, tokens, beyond_mean = 0, 1, False
    if media is not None:
        images, tokens = media.images, media.tokens_per_image
        if isinstance(media, MediaRanges):
            first, last, beyond_mean = media.first, media.last, media.beyond == "mean"
        else:
            words = media.words
    lengths, padding, first, last, words, kv_index = (
        t if t is None or t.device == device else t.to(device)
        for t in (mask.key_lengths, mask.key_padding, first, last, words, kv_index)
    )
    return Settings(
        lengths,
        padding,
        first,
        last,
        words,
        kv_index,
        mask.causal,
        mask.prefix,
        images,
        tokens,
        beyond_mean,
        scale,
        dropout_p,
        seed,
    )


_NO_MASK = Mask()

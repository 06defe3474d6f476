"""What each query row of `attention` may see, as small integer tensors. No mask here grows with rows x keys.

A mask object is made once per forward pass and shared by all layers: what `attention` derives from it on the host
(which rows read which keys) is kept on the object. Its tensors must therefore not be changed after the first use; a
change that autograd's version counter can see is noticed, and the derived plan is made again.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

WORD_BITS = 64

_INTEGERS = (torch.int32, torch.int64)


def _check_images(images: int, tokens_per_image: int) -> None:
    if images < 0:
        raise ValueError(f"images is {images}; it must be 0 or more")
    if tokens_per_image < 1:
        raise ValueError(f"tokens_per_image is {tokens_per_image}; it must be 1 or more")


def _check_rows(name: str, rows: Tensor, batch: int, queries: int) -> None:
    """`rows` starts with [batch or 1, queries]."""
    if rows.shape[0] not in (1, batch) or rows.shape[1] != queries:
        raise ValueError(
            f"{name} is {list(rows.shape)}, but the queries are [batch={batch}, length={queries}]; "
            f"expected its first two sizes to be [{batch} or 1, {queries}]"
        )


def _check_keys(images: int, tokens_per_image: int, keys: int) -> None:
    if images * tokens_per_image != keys:
        raise ValueError(
            f"the mask has {images} images of {tokens_per_image} tokens: {images * tokens_per_image} keys. But k "
            f"has {keys}; pass the images and tokens_per_image that k was made from"
        )


@dataclass(frozen=True, eq=False)
class MediaRanges:
    """Each text row sees a range of images: row (b, i) sees `first[b, i]` up to, not including, `last[b, i]`.

    This is the mask of Flamingo's gated cross-attention (arXiv 2204.14198, section 3.1.3): phi(i), the last image
    before token i, gives the range [phi - 1, phi), and "all images so far" gives [0, phi). Ranges need not be
    monotone in i.

    Args:
        first, last: [B, Lq] or [1, Lq], int32 or int64. An empty range (first >= last) sees nothing: output and
            gradient 0. The part of a range that lies before image 0 or past the last image is cut off.
        images: images per key row. `tokens_per_image`: keys per image. Their product is the key length.
        beyond: what a non-empty range wholly past the last image (first >= images) gives: "zero", or "mean", the mean
            of V over all keys. The latter is what masked_fill(-max) followed by softmax makes of such a row in
            open_flamingo and flamingo_pytorch (`MaskedCrossAttention`), whatever else the mask says. With a second
            key source such a row sees that source alone.

    Raises:
        ValueError: shapes, dtypes or counts that do not fit; here, or at the first use for what depends on q and k.
    """

    first: Tensor
    last: Tensor
    images: int
    tokens_per_image: int
    beyond: Literal["zero", "mean"] = "zero"
    _plans: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, rows in (("first", self.first), ("last", self.last)):
            if rows.ndim != 2 or rows.dtype not in _INTEGERS:
                raise ValueError(
                    f"MediaRanges.{name} is {list(rows.shape)} of {rows.dtype}; "
                    "expected [batch or 1, length] of int32 or int64"
                )
        if self.first.shape != self.last.shape:
            raise ValueError(
                f"MediaRanges.first is {list(self.first.shape)} and last is {list(self.last.shape)}; "
                "they must have one shape"
            )
        _check_images(self.images, self.tokens_per_image)
        if self.beyond not in ("zero", "mean"):
            raise ValueError(f"MediaRanges.beyond is {self.beyond!r}; choose 'zero' or 'mean'")

    def check(self, batch: int, queries: int, keys: int) -> None:
        """Raise ValueError unless the mask fits queries [batch, queries] and `keys` keys."""
        _check_rows("MediaRanges.first", self.first, batch, queries)
        _check_keys(self.images, self.tokens_per_image, keys)


@dataclass(frozen=True, eq=False)
class MediaSubsets:
    """Each text row sees an arbitrary subset of the images: bit j of word w stands for image 64 * w + j.

    This is the mask of transformers' idefics (`image_attention_mask`) and mllama (`cross_attention_mask`).

    Args:
        words: [B, Lq, W] or [1, Lq, W] int64 with W = ceil(images / 64). No bit at or above `images` may be set.
        images: images per key row. `tokens_per_image`: keys per image. Their product is the key length.

    Raises:
        ValueError: shapes, dtypes or counts that do not fit; here, or at the first use for what depends on q and k.
    """

    words: Tensor
    images: int
    tokens_per_image: int
    _plans: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.words.ndim != 3 or self.words.dtype != torch.int64:
            raise ValueError(
                f"MediaSubsets.words is {list(self.words.shape)} of {self.words.dtype}; "
                "expected [batch or 1, length, words] of int64 (MediaSubsets.from_mask makes it from a bool mask)"
            )
        _check_images(self.images, self.tokens_per_image)
        expected = -(-self.images // WORD_BITS)
        if self.words.shape[2] != expected:
            raise ValueError(
                f"MediaSubsets.words has {self.words.shape[2]} words a row, but {self.images} images need {expected} "
                f"({WORD_BITS} images a word)"
            )

    @staticmethod
    def from_mask(mask: Tensor, tokens_per_image: int) -> MediaSubsets:
        """Pack a bool mask [B, Lq, images] (True = visible) into words."""
        if mask.ndim != 3 or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {list(mask.shape)} of {mask.dtype}; expected [batch, length, images] of torch.bool"
            )
        batch, queries, images = mask.shape
        words = -(-images // WORD_BITS)
        padded = torch.nn.functional.pad(mask, (0, words * WORD_BITS - images))
        bits = torch.ones((), dtype=torch.int64, device=mask.device) << torch.arange(WORD_BITS, device=mask.device)
        # Distinct powers of two: the sum is their bitwise or, bit 63 included (it wraps to the sign bit).
        packed = (padded.view(batch, queries, words, WORD_BITS) * bits).sum(-1)
        return MediaSubsets(packed, images, tokens_per_image)

    def check(self, batch: int, queries: int, keys: int) -> None:
        """Raise ValueError unless the mask fits queries [batch, queries] and `keys` keys."""
        _check_rows("MediaSubsets.words", self.words, batch, queries)
        _check_keys(self.images, self.tokens_per_image, keys)


@dataclass(frozen=True, eq=False)
class Mask:
    """The parts of a visibility mask, combined by AND. They concern the first key source only.

    Args:
        key_lengths: [B] int32 or int64; keys at or past the length are hidden.
        key_padding: [B, Lk] bool; True = visible.
        causal: row i sees keys j <= i + Lk - Lq (aligned at the bottom right, so a decode step sees all keys so far).
        prefix: with causal, the first `prefix` keys are visible to all rows; so rows of the prefix see the whole
            prefix and nothing else (UniLM, arXiv 1905.03197; BLIP-2's image-grounded text generation, arXiv
            2301.12597, section 3.1).
        media: which images each row sees.

    Raises:
        ValueError: shapes, dtypes or counts that do not fit; here, or at the first use for what depends on q and k.
    """

    key_lengths: Tensor | None = None
    key_padding: Tensor | None = None
    causal: bool = False
    prefix: int = 0
    media: MediaRanges | MediaSubsets | None = None
    _plans: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        lengths, padding = self.key_lengths, self.key_padding
        if lengths is not None and (lengths.ndim != 1 or lengths.dtype not in _INTEGERS):
            raise ValueError(
                f"Mask.key_lengths is {list(lengths.shape)} of {lengths.dtype}; expected [batch] of int32 or int64"
            )
        if padding is not None and (padding.ndim != 2 or padding.dtype != torch.bool):
            raise ValueError(
                f"Mask.key_padding is {list(padding.shape)} of {padding.dtype}; "
                "expected [batch, keys] of torch.bool, True = visible"
            )
        if self.prefix < 0:
            raise ValueError(f"Mask.prefix is {self.prefix}; it must be 0 or more")
        if self.prefix and not self.causal:
            raise ValueError(
                f"Mask.prefix is {self.prefix} without causal=True; without it, all keys are visible anyway"
            )
        if self.media is not None and not isinstance(self.media, MediaRanges | MediaSubsets):
            raise ValueError(f"Mask.media is a {type(self.media).__name__}; expected MediaRanges or MediaSubsets")

    def check(self, batch: int, queries: int, keys: int) -> None:
        """Raise ValueError unless the mask fits queries [batch, queries] and `keys` keys."""
        if self.key_lengths is not None and self.key_lengths.shape[0] != batch:
            raise ValueError(f"Mask.key_lengths has {self.key_lengths.shape[0]} entries for a batch of {batch}")
        if self.key_padding is not None and self.key_padding.shape != (batch, keys):
            raise ValueError(
                f"Mask.key_padding is {list(self.key_padding.shape)}; expected [batch={batch}, keys={keys}]"
            )
        if self.prefix > keys:
            raise ValueError(f"Mask.prefix is {self.prefix}, but there are {keys} keys")
        if self.media is not None:
            self.media.check(batch, queries, keys)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the mask is made of, those of `media` included."""
        found = [t for t in (self.key_lengths, self.key_padding) if t is not None]
        if isinstance(self.media, MediaRanges):
            found += [self.media.first, self.media.last]
        elif self.media is not None:
            found.append(self.media.words)
        return tuple(found)


def parts_of(mask: Mask) -> tuple[tuple[Hashable, ...], tuple[Tensor | None, ...]]:
    """All that a mask says: constants, and tensors."""
    media: tuple[Hashable, ...] = ()
    tensors: tuple[Tensor | None, ...] = (mask.key_lengths, mask.key_padding)
    if isinstance(mask.media, MediaRanges):
        media = (mask.media.images, mask.media.tokens_per_image, mask.media.beyond)
        tensors += (mask.media.first, mask.media.last)
    elif mask.media is not None:
        media, tensors = (mask.media.images, mask.media.tokens_per_image), (*tensors, mask.media.words)
    return (mask.causal, mask.prefix, *media), tensors

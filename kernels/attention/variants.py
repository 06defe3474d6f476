"""Every configuration in which the attention kernels may be launched, for the audit: the launchers on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..launch import Architecture, Variant, recording
from . import triton_launch
from .masks import Mask, MediaRanges, MediaSubsets
from .settings import settings_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call of `attention`: sizes from the models that make it, forward and backward.

    Attributes:
        label: for people.
        queries, keys, extra: rows of q, of the first and of the second key source.
        heads, key_heads, width: of q, of the keys, and the head dimension.
        batch: rows of q; the keys have `key_rows`.
        images: with a media mask, which is `media`.
        own_extra: the second key source has a row for each of q's.
        dropout, causal, lengths, padding: whether the call has them.
        training: the backward too.
    """

    label: str
    queries: int
    keys: int
    width: int = 64
    heads: int = 8
    key_heads: int = 8
    batch: int = 8
    key_rows: int = 8
    extra: int = 0
    own_extra: bool = True
    images: int = 0
    media: str = "ranges"
    prefix: int | None = None
    lengths: bool = False
    padding: bool = False
    dropout: bool = False
    indexed: bool = False
    training: bool = True


# Each tile of the configurations once: by rows (16, 32, 64, 128 and more) and by head dimension.
TILES = tuple(
    Case(f"{queries} queries, D {width}", queries, 256, width, heads=16, key_heads=16, batch=64, key_rows=64)
    for width in (64, 96, 128, 256)
    for queries in (16, 32, 64, 128)
)
# And what a kernel has in addition, at the sizes of the models that need it.
FEATURES = (
    Case("Q-Former, image", 32, 257, heads=12, key_heads=12, dropout=True),
    Case("Q-Former, ITG", 64, 64, heads=12, key_heads=12, prefix=32, padding=True, dropout=True),
    Case("text, padded", 64, 64, heads=12, key_heads=12, padding=True, dropout=True),
    Case("resampler", 64, 256, extra=64),
    Case("resampler, shared latents", 64, 256, extra=64, own_extra=False),
    Case("resampler, idefics2", 64, 4900, 96, 16, 4, extra=64, lengths=True),
    Case("abstractor", 65, 257, heads=16, key_heads=16, extra=65),
    Case("ViT, D 72", 257, 257, 72, 16, 16),
    Case("ViT, D 80", 257, 257, 80, 16, 16),
    Case("ViT, D 88", 257, 257, 88, 16, 16),
    Case("gated, ranges", 1120, 33 * 64, batch=1, key_rows=1, images=33),
    Case("gated, ranges, mean beyond", 1120, 33 * 64, batch=1, key_rows=1, images=33, media="mean"),
    Case("gated, ranges, idefics", 1120, 33 * 64, 128, 32, 32, 1, 1, images=33, media="subsets"),
    Case("gated, mllama", 512, 4 * 1601, 128, 32, 8, 1, 1, images=4, media="subsets"),
    Case("gated, many images", 256, 70 * 64, batch=2, key_rows=2, images=70, media="subsets"),
    Case("decode, Flamingo", 1, 33 * 64, batch=1, key_rows=1, images=33, training=False),
    Case("decode, many images", 1, 70 * 64, batch=1, key_rows=1, images=70, media="subsets", training=False),
    Case("decode, idefics", 1, 33 * 64, 128, 32, 32, 1, 1, images=33, media="subsets", training=False),
    Case("decode, mllama", 1, 4 * 1601, 128, 32, 8, 1, 1, images=4, media="subsets", training=False),
    Case("decode, mllama, plain", 1, 6404, 128, 32, 8, 1, 1, training=False),
    Case("decode, beams", 1, 257, heads=12, key_heads=12, batch=5, key_rows=1, training=False),
    Case("decode, self-attention", 1, 128, heads=12, key_heads=12, prefix=0, padding=True, training=False),
    Case("kv_index", 32, 257, heads=12, key_heads=12, batch=12, key_rows=4, indexed=True),
    # Much at once: each adds to what has to stay in registers.
    Case("text, causal", 128, 128, heads=12, key_heads=12, batch=16, key_rows=16, prefix=0, dropout=True),
    Case("text, blind rows", 64, 64, heads=12, key_heads=12, images=1, media="mean", padding=True, dropout=True),
    Case("caption, blind rows", 64, 64, heads=12, key_heads=12, images=1, media="mean", padding=True, dropout=True, prefix=0),
    Case("caption, keys one by one", 128, 128, heads=12, key_heads=12, images=128, media="mean", padding=True, dropout=True,
         prefix=0),
    Case("caption, two sources", 32, 32, heads=12, key_heads=12, extra=32, dropout=True, prefix=0),
    Case("resampler, idefics2, padded", 64, 4900, 96, 16, 4, extra=64, padding=True),
    Case("abstractor, padded", 65, 257, heads=16, key_heads=16, extra=65, padding=True),
    Case("gated, 32 latents", 256, 16 * 32, batch=2, key_rows=2, images=16),
    Case("gated, many images, mean beyond", 256, 70 * 64, batch=2, key_rows=2, images=70, media="mean"),
    Case("gated, many images, idefics", 256, 70 * 64, 128, 32, 32, 1, 1, images=70, media="subsets"),
)  # fmt: skip
# fp16 compiles as bf16 does, to other instructions of the same cost; fp32 has tiles of its own.
FULL = tuple(
    Case(f"{queries} queries, D {width}", queries, 256, width, heads=16, key_heads=16)
    for width in (64, 128)
    for queries in (16, 32)
)
NAMED = {case.label: case for case in FEATURES}
IN_HALF = ("Q-Former, image", "gated, ranges")
IN_FULL = ("Q-Former, ITG", "resampler", "abstractor, padded", "ViT, D 72", "gated, ranges", "text, blind rows")
GROUPS = (
    (BF16, TILES + FEATURES),
    (FP16, tuple(NAMED[label] for label in IN_HALF)),
    (FP32, (*FULL, *(NAMED[label] for label in IN_FULL))),
)


def variants(architecture: Architecture) -> Iterator[Variant]:
    """All launches of all cases."""
    # fp32 is compiled for torch's default precision of matrix products, which needs the most registers.
    for dtype, cases in GROUPS:
        for case in cases:
            with recording(architecture) as launches:
                _call(case, dtype)
            name = str(dtype).removeprefix("torch.")
            for launch in launches:
                c = launch.constexprs
                tile = f", {c['BM']}x{c['BN']}" if "BM" in c else ""
                step = ""
                if "BACKWARD" in c:
                    step = ", dQ" if c["BACKWARD"] else ", forward"
                elements = c["BM"] * c["BN"] if "BM" in c else None
                yield replace(launch, label=f"{name}, {case.label}{step}{tile}", elements=elements)


def _call(case: Case, dtype: torch.dtype) -> None:
    meta = torch.device("meta")

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=meta)

    q = empty(case.batch, case.queries, case.heads, case.width)
    k = empty(case.key_rows, case.keys, case.key_heads, case.width)
    extra = None
    if case.extra:
        extra = empty(case.batch if case.own_extra else 1, case.extra, case.key_heads, case.width)
    settings = settings_of(
        _mask(case, empty),
        empty(case.batch, dtype=torch.int64) if case.indexed else None,
        case.width**-0.5,
        0.1 if case.dropout else 0.0,
        1 << 40,
        meta,
    )
    out, lse = triton_launch.forward(q, k, k, extra, extra, settings)
    if case.training:
        triton_launch.backward(empty(*q.shape), q, k, k, extra, extra, out, lse, settings)


def _mask(case: Case, empty: object) -> Mask:
    assert callable(empty)
    media: MediaRanges | MediaSubsets | None = None
    if case.images:
        tokens = case.keys // case.images
        if case.media == "subsets":
            words = empty(case.batch, case.queries, -(-case.images // 64), dtype=torch.int64)
            media = MediaSubsets(words, case.images, tokens)
        else:
            first, last = (empty(case.batch, case.queries, dtype=torch.int32) for _ in range(2))
            media = MediaRanges(first, last, case.images, tokens, beyond="mean" if case.media == "mean" else "zero")
    return Mask(
        key_lengths=empty(case.batch, dtype=torch.int32) if case.lengths else None,
        key_padding=empty(case.batch, case.keys, dtype=torch.bool) if case.padding else None,
        causal=case.prefix is not None,
        prefix=case.prefix or 0,
        media=media,
    )

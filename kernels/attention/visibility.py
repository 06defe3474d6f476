"""Masks read on the host: which keys each run of query rows sees, as intervals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise
from typing import NamedTuple, TypeVar

from .masks import WORD_BITS, Mask, MediaRanges, MediaSubsets

T = TypeVar("T")
Interval = tuple[int, int]  # [start, end)
Intervals = tuple[Interval, ...]  # disjoint and ascending, no two touch


class Visible(NamedTuple):
    """What every row of a run of query rows sees of the first key source."""

    full: Intervals  # keys that the whole run sees
    square: int | None = (
        None  # first key of a causal square as wide as the run is long: row i of the run sees i + 1 keys of it
    )
    uniform: bool = False  # the scores are all one constant, so the output is the mean of V over `full`


NOTHING = Visible(())
Runs = list[tuple[Interval, Visible]]  # (rows, what they see); every row in exactly one run


def runs_by_batch(mask: Mask, batch: int, queries: int, keys: int) -> Iterator[tuple[Iterable[int], Runs]]:
    """(batch rows, their runs), in order; batch rows that the mask cannot tell apart come together.

    Raises:
        ValueError: bits set for images that do not exist.
    """
    if queries == 0 or batch == 0:
        return
    by_row = None if mask.media is None else _media_runs(mask.media, keys)
    padded = mask.key_lengths is not None or mask.key_padding is not None
    lengths = None if mask.key_lengths is None else mask.key_lengths.tolist()
    padding = None if mask.key_padding is None else mask.key_padding.tolist()
    together = not padded and (by_row is None or len(by_row) == 1)
    for b in range(1 if together else batch):
        unpadded: Intervals = ((0, keys),) if keys else ()
        if padding is not None:
            unpadded = _true_intervals(padding[b])
        if lengths is not None:
            unpadded = _intersect(unpadded, ((0, min(lengths[b], keys)),))
        if by_row is None:
            runs: Runs = [((0, queries), Visible(unpadded))]
        else:
            runs = by_row[b % len(by_row)]
            if padded:
                runs = [
                    (rows, seen if seen.uniform else Visible(_intersect(seen.full, unpadded))) for rows, seen in runs
                ]
        if mask.causal:
            runs = [new for run in runs for new in _causal(run, keys - queries, mask.prefix)]
        yield (range(batch) if together else (b,)), runs


def _media_runs(media: MediaRanges | MediaSubsets, keys: int) -> list[Runs]:
    """The runs of each batch row of a media mask (one entry where all batch rows are alike)."""
    images, tokens = media.images, media.tokens_per_image
    if isinstance(media, MediaSubsets):

        @functools.cache
        def subset(words: tuple[int, ...]) -> Visible:
            bits = sum((word % (1 << WORD_BITS)) << (WORD_BITS * i) for i, word in enumerate(words))
            if bits >> images:
                raise ValueError(
                    f"MediaSubsets.words shows image {bits.bit_length() - 1}, but there are {images} images"
                )
            seen = _true_intervals(bits >> j & 1 for j in range(images))
            return Visible(tuple((first * tokens, last * tokens) for first, last in seen))

        return [_runs(map(tuple, rows), subset) for rows in media.words.tolist()]

    mean = media.beyond == "mean" and keys > 0

    @functools.cache
    def between(bounds: tuple[int, int]) -> Visible:
        first, last = bounds
        if mean and images <= first < last:
            return Visible(((0, keys),), uniform=True)
        first, last = max(first, 0), min(last, images)
        return Visible(((first * tokens, last * tokens),)) if first < last else NOTHING

    both = zip(media.first.tolist(), media.last.tolist(), strict=True)
    return [_runs(zip(first, last, strict=True), between) for first, last in both]


def _runs(rows: Iterable[T], visible: Callable[[T], Visible]) -> Runs:
    runs: Runs = []
    start = 0
    for row, same in groupby(rows):
        end = start + sum(1 for _ in same)
        runs.append(((start, end), visible(row)))
        start = end
    return runs


def _causal(run: tuple[Interval, Visible], offset: int, prefix: int) -> Runs:
    """Split a run where the causal limit meets its keys: row i sees keys below max(i + offset + 1, prefix)."""
    (start, end), visible = run
    if visible.uniform:
        return [run]
    edges = {edge - offset for interval in visible.full for edge in interval} | {prefix - offset}
    cuts = [start, *sorted(edge for edge in edges if start < edge < end), end]
    runs: Runs = []
    for first, last in pairwise(cuts):
        limit = max(first + offset, prefix)  # every row of this run sees the keys below it
        full = _intersect(visible.full, ((0, limit),))
        grows = first + offset >= prefix and any(a <= limit < b for a, b in visible.full)
        if grows and last - first > 1:
            runs.append(((first, last), Visible(full, square=limit)))
        else:
            # The square of a single row is one more key.
            runs.append(((first, last), Visible(_intersect(visible.full, ((0, limit + 1),)) if grows else full)))
    return runs


def _true_intervals(flags: Iterable[object]) -> Intervals:
    found = []
    start = 0
    for flag, same in groupby(map(bool, flags)):
        end = start + sum(1 for _ in same)
        if flag:
            found.append((start, end))
        start = end
    return tuple(found)


def _intersect(left: Intervals, right: Intervals) -> Intervals:
    both = ((max(a, c), min(b, d)) for a, b in left for c, d in right)
    return tuple((a, b) for a, b in both if a < b)


def key_blocks(batch_rows: list[int], key_row_of: list[int], own_rows: bool) -> Iterator[tuple[int, int, int, int]]:
    """Split ascending batch rows into blocks (batch, end_batch, key row, end key row) with equally many rows a key row.

    Row `batch + i` of a block reads key row `key row + i // fold`, where fold = batch rows / key rows of the block.
    With `own_rows` the fold is 1.
    """
    # One entry per stretch of neighbouring batch rows that read the same key row.
    stretches: list[tuple[int, int, int]] = []
    for b in batch_rows:
        if stretches and not own_rows and stretches[-1][1] == b and stretches[-1][2] == key_row_of[b]:
            stretches[-1] = (stretches[-1][0], b + 1, key_row_of[b])
        else:
            stretches.append((b, b + 1, key_row_of[b]))
    block: tuple[int, int, int, int] | None = None
    for first, end, row in stretches:
        if block is not None:
            fold = (block[1] - block[0]) // (block[3] - block[2])
            if (block[1], block[3], fold) == (first, row, end - first):
                block = (block[0], end, block[2], row + 1)
                continue
            yield block
        block = (first, end, row, row + 1)
    if block is not None:
        yield block


def key_rows_of(kv_index: Iterable[int] | None, batch: int, key_rows: int) -> list[int]:
    """The key row that each batch row reads.

    Raises:
        ValueError: an index outside of the key rows.
    """
    if kv_index is None:
        fold = batch // key_rows if key_rows else 1
        return [b // fold for b in range(batch)]
    rows = list(kv_index)
    for b, row in enumerate(rows):
        if not 0 <= row < key_rows:
            raise ValueError(f"kv_index[{b}] is {row}, but k has {key_rows} rows; expected 0 to {key_rows - 1}")
    return rows

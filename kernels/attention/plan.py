"""Which query rows read which keys: a mask turned, once and on the host, into calls of a dense attention kernel.

A `Plan` is a list of segments. A segment is a set of query rows that all see the same keys; these keys are its pieces,
each a slice (or, for scattered keys, an index) of one key source. Rows that see nothing are in no segment, and keys
that nobody sees are in no piece: they are never read. All pieces are full rectangles but causal squares, row i of which
sees keys 0 to i.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .masks import Mask
from .visibility import NOTHING, Interval, Visible, key_blocks, key_rows_of, runs_by_batch

MAX_PLANS = 16  # kept on one mask object: one for each set of shapes that it is used with


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A part of a tensor [rows, columns, ...]: rows [row, end_row), and in each the same slice or index of columns."""

    row: int
    end_row: int
    columns: Interval | Tensor
    whole: bool  # it is all of the tensor

    @property
    def width(self) -> int:
        """How many columns."""
        return self.columns.numel() if isinstance(self.columns, Tensor) else self.columns[1] - self.columns[0]

    @property
    def size(self) -> int:
        """How many (row, column) pairs."""
        return (self.end_row - self.row) * self.width

    def take(self, x: Tensor) -> Tensor:
        """The part of `x`: a view, or a copy where the columns are an index."""
        if self.whole:
            return x
        x = x.narrow(0, self.row, self.end_row - self.row)
        if isinstance(self.columns, Tensor):
            return x.index_select(1, self.columns)
        return x.narrow(1, self.columns[0], self.columns[1] - self.columns[0])

    def write(self, total: Tensor, part: Tensor) -> None:
        """Set the part of `total`."""
        total = total.narrow(0, self.row, self.end_row - self.row)
        if isinstance(self.columns, Tensor):
            total.index_copy_(1, self.columns, part.to(total.dtype))
        else:
            total.narrow(1, self.columns[0], self.columns[1] - self.columns[0]).copy_(part)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add to the part of `total`."""
        total = total.narrow(0, self.row, self.end_row - self.row)
        if isinstance(self.columns, Tensor):
            # The index holds no column twice, so the result does not depend on the order of the additions.
            total.index_add_(1, self.columns, part.to(total.dtype))
        else:
            total.narrow(1, self.columns[0], self.columns[1] - self.columns[0]).add_(part)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Keys that a segment reads: a part of [key rows, keys] of one source."""

    source: int  # 0: k and v, 1: extra_k and extra_v
    keys: Span
    causal: bool = False
    uniform: bool = False  # the scores are all one constant


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Query rows, a part of [batch, queries], and the pieces that they all read."""

    rows: Span
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """The segments of one attention call, and what their execution wants to know about them as a whole."""

    segments: tuple[Segment, ...]
    covers: bool  # every query row is in a segment
    rereads: tuple[bool, bool]  # per source: its keys are read more than once on average
    _alone: dict[int, bool] = field(default_factory=dict)

    def alone(self, source: int, key_rows: int, keys: int) -> bool:
        """Whether no two pieces touch the same keys of `source`, so that its gradient needs no accumulator."""
        if source not in self._alone:
            spans = [piece.keys for segment in self.segments for piece in segment.pieces if piece.source == source]
            self._alone[source] = len(spans) < 2 or (not self.rereads[source] and _disjoint(spans, key_rows, keys))
        return self._alone[source]


def _disjoint(spans: Iterable[Span], key_rows: int, keys: int) -> bool:
    touched = torch.zeros(key_rows, keys, dtype=torch.int32)
    for span in spans:
        columns = span.columns.cpu() if isinstance(span.columns, Tensor) else slice(*span.columns)
        touched[span.row : span.end_row, columns] += 1
    return int(touched.max()) <= 1


class Shapes(NamedTuple):
    """What a plan depends on besides the mask. `extra_*` are 0 without a second key source."""

    batch: int
    queries: int
    key_rows: int
    keys: int
    extra_rows: int = 0
    extra_keys: int = 0

    @staticmethod
    def of(q: Tensor, k: Tensor, extra_k: Tensor | None) -> Shapes:
        """Of tensors [rows, length, heads, head_dim]."""
        extra = (0, 0) if extra_k is None else (extra_k.shape[0], extra_k.shape[1])
        return Shapes(q.shape[0], q.shape[1], k.shape[0], k.shape[1], *extra)


def plan_for(mask: Mask | None, kv_index: Tensor | None, shapes: Shapes, device: torch.device) -> Plan:
    """The plan of this call, made at its first use.

    The plan of a mask that holds tensors is kept on the mask, or on its media part where it has no other, so that a
    `Mask` made anew in each layer around one media object costs nothing. Without such tensors, plans are kept by
    their settings.
    """
    tensors = () if mask is None else mask.tensors()
    if mask is None or not tensors:
        causal, prefix = (False, 0) if mask is None else (mask.causal, mask.prefix)
        rows = None if kv_index is None else tuple(kv_index.tolist())
        return _plan_without_tensors(causal, prefix, rows, shapes)
    only_media = mask.key_lengths is None and mask.key_padding is None and not mask.causal
    plans = mask.media._plans if mask.media is not None and only_media else mask._plans
    key = (shapes, device, id(kv_index), *(_version(t) for t in (kv_index, *tensors)))
    entry = plans.get(key)
    if entry is None:
        if len(plans) >= MAX_PLANS:
            plans.clear()
        # The entry holds kv_index, so that its id cannot come to mean another tensor.
        index = None if kv_index is None else kv_index.tolist()
        entry = plans[key] = (kv_index, build_plan(mask, index, shapes, device))
    plan: Plan = entry[1]
    return plan


def _version(tensor: Tensor | None) -> int:
    # A tensor made in inference mode has no version counter.
    return -1 if tensor is None or tensor.is_inference() else tensor._version


@functools.lru_cache(maxsize=512)
def _plan_without_tensors(causal: bool, prefix: int, kv_index: tuple[int, ...] | None, shapes: Shapes) -> Plan:
    # Made of slices only, so it belongs to no device.
    return build_plan(Mask(causal=causal, prefix=prefix), kv_index, shapes, torch.device("cpu"))


def build_plan(mask: Mask, kv_index: Iterable[int] | None, shapes: Shapes, device: torch.device) -> Plan:
    """The plan of this call, made anew; `device` is where scattered keys are looked up.

    Raises:
        ValueError: a mask that does not fit the shapes, or shows images or key rows that do not exist.
    """
    mask.check(shapes.batch, shapes.queries, shapes.keys)
    key_row_of = key_rows_of(kv_index, shapes.batch, shapes.key_rows)
    # A second source with a row of its own for each batch row, where the first has fewer rows.
    own_extra = (
        shapes.extra_keys > 0 and shapes.extra_rows == shapes.batch and shapes.extra_rows not in (1, shapes.key_rows)
    )

    # Batch rows by (what is seen, by which rows), so that equal rows of neighbouring batch rows become one call.
    groups: dict[tuple[Visible, tuple[Interval, ...]], list[int]] = {}
    for batch_rows, runs in runs_by_batch(mask, shapes.batch, shapes.queries, shapes.keys):
        rows_of: dict[Visible, list[Interval]] = {}
        for (start, end), seen in runs:
            if seen.uniform and shapes.extra_keys:
                seen = NOTHING  # next to any real score, those of hidden keys vanish
            same = rows_of.setdefault(seen, [])
            if same and same[-1][1] == start:
                start = same.pop()[0]
            same.append((start, end))
        for seen, same in rows_of.items():
            groups.setdefault((seen, tuple(same)), []).extend(batch_rows)

    segments = []
    for (seen, rows), members in groups.items():
        if not seen.full and seen.square is None and not shapes.extra_keys:
            continue
        for first, end, key_row, end_key_row in key_blocks(members, key_row_of, own_extra):
            pieces = []
            if seen.full:
                keys = _span(key_row, end_key_row, seen.full, shapes.key_rows, shapes.keys, device)
                pieces.append(Piece(0, keys, uniform=seen.uniform))
            if seen.square is not None:
                square = ((seen.square, seen.square + rows[0][1] - rows[0][0]),)
                keys = _span(key_row, end_key_row, square, shapes.key_rows, shapes.keys, device)
                pieces.append(Piece(0, keys, causal=True))
            if shapes.extra_keys:
                source_rows = (
                    (0, 1) if shapes.extra_rows == 1 else (first, end) if own_extra else (key_row, end_key_row)
                )
                everything = ((0, shapes.extra_keys),)
                pieces.append(Piece(1, _span(*source_rows, everything, shapes.extra_rows, shapes.extra_keys, device)))
            segments.append(Segment(_span(first, end, rows, shapes.batch, shapes.queries, device), tuple(pieces)))

    reads = [0, 0]
    for segment in segments:
        for piece in segment.pieces:
            reads[piece.source] += piece.keys.size
    return Plan(
        tuple(segments),
        sum(segment.rows.size for segment in segments) == shapes.batch * shapes.queries,
        (reads[0] > shapes.key_rows * shapes.keys, reads[1] > shapes.extra_rows * shapes.extra_keys),
    )


def _span(
    row: int, end_row: int, intervals: tuple[Interval, ...], all_rows: int, all_columns: int, device: torch.device
) -> Span:
    if len(intervals) == 1:
        whole = (row, end_row, *intervals[0]) == (0, all_rows, 0, all_columns)
        return Span(row, end_row, intervals[0], whole)
    index = torch.cat([torch.arange(start, end) for start, end in intervals])
    return Span(row, end_row, index.to(device), False)

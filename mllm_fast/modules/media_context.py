"""What the gated blocks of one model share: media keys and values computed once, and who sees which image.

Upstream projects every image to keys and values in every layer at every generated token. Here a layer asks
`MediaContext.keys_values`, which projects an image the first time it is seen and hands out the same tensors until the
media, or a weight that made them, changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .graphs import Capture, CudaCapture
from .state import TensorKey, TensorKeys, autocast_key, needs_graph, readable_on_host

KeysValues = tuple[Tensor, Tensor]
Project = Callable[[Tensor], KeysValues]

# Generations that may be interleaved on one model before the oldest has to project its images again. The bound keeps a
# caller who holds thousands of media tensors from holding thousands of keys and values.
MAX_RECORDS = 4


def one_row_each(media: Tensor, rows: int) -> Tensor:
    """The media rows [B_media, ...] with one for each of `rows` text rows, for code that cannot share them."""
    if media.shape[0] == rows:
        return media
    if media.shape[0] == 1:
        return media.expand(rows, *media.shape[1:])
    return media.repeat_interleave(rows // media.shape[0], dim=0)


class _Record:
    """One media tensor that was seen, and the keys and values every layer made of it."""

    def __init__(self, media: Tensor, parent: _Record | None) -> None:
        # Kept to recognise these images at the head of a longer media tensor.
        self.media = media.detach()
        self.key = TensorKey(self.media)
        self.parent = parent
        self.layers: dict[Hashable, tuple[TensorKeys, Tensor, Tensor]] = {}

    def begins(self, media: Tensor) -> bool:
        """Whether `media` holds these very images, followed by more."""
        own, other = self.media.shape, media.shape
        return (
            own[1] < other[1]
            and (own[0], *own[2:]) == (other[0], *other[2:])
            and self.media.dtype == media.dtype
            and self.media.device == media.device
            and self.key.matches(self.media)  # nobody wrote to it since
            and readable_on_host(media)  # on a GPU, looking would cost more than projecting once more
            and torch.equal(media[:, : own[1]], self.media)
        )

    @property
    def alive(self) -> bool:
        """Whether anybody else still holds the media: two uses of the storage are the tensor and this very look at it."""
        return torch._C._storage_Use_Count(self.media.untyped_storage()._cdata) > 2


class MediaContext:
    """Shared by all fused modules of one model. It holds no parameters; copies of a model start with an empty one.

    It also holds what captures their CUDA graphs (`capture`), because these share one memory pool.

    Records live as long as the caller's media tensor, except the newest, which stays until the next media, until a
    training step, or until `clear` (called at the end of a fused `generate`), so that an image appended in the middle
    of a generation can build on it. Several generations may be interleaved: each media tensor has its own record.
    """

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._visibility: list[tuple[TensorKey, Hashable, Any]] = []
        self._given: Mapping[Hashable, KeysValues] = {}
        self.capture: Capture = CudaCapture()

    def __deepcopy__(self, memo: dict[int, Any]) -> MediaContext:
        return MediaContext()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return MediaContext, ()

    def clear(self) -> None:
        """Forget everything that was computed from media."""
        self._records.clear()
        self._visibility.clear()

    @contextlib.contextmanager
    def given(self, keys_values: Mapping[Hashable, KeysValues]) -> Iterator[None]:
        """While it lasts, these layers take these keys and values, which the caller knows to be those of its media.

        For the length of a trace: it holds for all threads.
        """
        before, self._given = self._given, keys_values
        try:
            yield
        finally:
            self._given = before

    def keys_values(
        self,
        layer: Hashable,
        media: Tensor,
        weights: tuple[Sequence[Tensor | None], Hashable] | None,
        project: Project,
    ) -> KeysValues:
        """Keys and values of `media` for one layer, projected at most once while media and weights stay the same.

        Args:
            layer: what tells this layer from the others.
            media: [B, images, tokens, D].
            weights: the tensors the projection reads and any state beside them (`children.weights_of`); None when
                that is unknown, and the projection then runs every time.
            project: [B, images, tokens, D] -> keys and values [B, images * tokens, heads, head_dim].

        Returns:
            keys and values, [B, images * tokens, heads, head_dim].
        """
        if layer in self._given:
            return self._given[layer]
        if torch.compiler.is_compiling():
            return project(media)
        tensors, extra = weights if weights is not None else ((), None)
        if weights is None or needs_graph(media, *tensors):
            self._forget_dead()
            return project(media)
        extra = (extra, autocast_key(media.device.type))
        record = self._record(media)
        entry = record.layers.get(layer)
        if entry is not None and entry[0].match(tensors, extra):
            return entry[1], entry[2]
        k, v = self._extend(record, layer, media, tensors, extra, project)
        record.layers[layer] = (TensorKeys(tensors, extra), k, v)
        return k, v

    def _extend(
        self,
        record: _Record,
        layer: Hashable,
        media: Tensor,
        tensors: Sequence[Tensor | None],
        extra: Hashable,
        project: Project,
    ) -> KeysValues:
        """Project the images that the record's parent has not projected yet."""
        parent = record.parent
        entry = None if parent is None else parent.layers.get(layer)
        if parent is None or entry is None or not entry[0].match(tensors, extra):
            return project(media)
        k, v = project(media[:, parent.media.shape[1] :])
        k, v = torch.cat((entry[1], k), dim=1), torch.cat((entry[2], v), dim=1)
        if not parent.alive:
            del parent.layers[layer]
            if not parent.layers:
                record.parent = None
        return k, v

    def _record(self, media: Tensor) -> _Record:
        for record in self._records:
            if record.key.matches(media):
                return record
        parent = next((r for r in reversed(self._records) if r.begins(media)), None)
        kept = [r for r in self._records if r.alive and not r.key.overwritten(media)]
        record = _Record(media, parent)
        self._records = [*kept, record][-MAX_RECORDS:]
        return record

    def _forget_dead(self) -> None:
        if self._records:
            self._records = [r for r in self._records if r.alive]

    def visibility(self, source: Tensor, extra: Hashable, build: Callable[[], Any]) -> Any:
        """`build()`, computed once for all layers that ask with the same unchanged `source` tensor and `extra`."""
        if torch.compiler.is_compiling():
            return build()
        for key, known, value in self._visibility:
            if known == extra and key.matches(source):
                return value
        self._visibility = [entry for entry in self._visibility if entry[0].alive][-3:]
        value = build()
        self._visibility.append((TensorKey(source), extra, value))
        return value

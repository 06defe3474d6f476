"""What is trained on: pictures with captions, from a folder with a captions file or from a `datasets` dataset.

A dataset here is anything with a length and `dataset[i]`, which gives a `Sample`; `group(i)` says which samples share their
pictures, so that a split does not put one picture on both sides.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from ..pipeline import read_image
from .captions_file import DataError, Record, describe, find_captions_file, read_captions

__all__ = [
    "CaptionDataset",
    "CaptionFolder",
    "DataError",
    "DatasetCaptions",
    "Part",
    "Sample",
    "open_dataset",
    "split",
]

# Beyond so many, more of the same kind tells nobody more.
_NAMED_DEFECTS = 5


@dataclass(frozen=True)
class Sample:
    """One thing to learn: what should be said of pictures.

    Attributes:
        images: PIL pictures, in the order in which the prompt shows them.
        caption: the text to learn, without special tokens.
        prompt: the text before it; None: the stage's own.
    """

    images: tuple[Image.Image, ...]
    caption: str
    prompt: str | None = None


@runtime_checkable
class CaptionDataset(Protocol):
    """A map-style dataset of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def group(self, index: int) -> Hashable:
        """Equal for samples that have to stay on one side of a split."""
        ...


class CaptionFolder:
    """A folder of pictures with a captions file: `captions.csv`, `captions.jsonl` or `captions.json`.

    Its columns are `image` (a path from the folder; in JSON also a list of them), `caption`, and `prompt` if wanted; others
    are ignored. A CSV file begins with their names, a JSON file is a list of objects.

    All that can be known without decoding pictures is checked here; `check` decodes them too.

    Args:
        folder: of the captions file; pictures are found from here.
        captions: name of the captions file in the folder, where there are several or it is called otherwise.

    Raises:
        DataError: no captions file, one that cannot be read, an empty caption, a missing picture, ...: file and row.
    """

    def __init__(self, folder: str | Path, captions: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.path = find_captions_file(self.folder, captions)
        self.records: list[Record] = read_captions(self.path)
        missing = [
            f"{self._at(record)}: there is no picture {self.folder / name}"
            for record in self.records
            for name in record.images
            if not (self.folder / name).is_file()
        ]
        _refuse(missing)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        try:
            images = tuple(read_image(self.folder / name) for name in record.images)
        except (OSError, ValueError) as error:
            raise DataError(f"{self._at(record)}: {error}") from error
        return Sample(images, record.caption, record.prompt)

    def group(self, index: int) -> Hashable:
        """Its first picture."""
        return self.records[index].images[0]

    def check(self) -> None:
        """Decode every picture.

        Raises:
            DataError: some cannot be decoded: which, and in which rows.
        """
        defects = []
        for index in range(len(self)):
            try:
                self[index]
            except DataError as error:
                defects.append(str(error))
        _refuse(defects)

    def _at(self, record: Record) -> str:
        return f"{self.path} {record.where}"


class DatasetCaptions:
    """A `datasets.Dataset` with a column of pictures and a column of captions.

    Args:
        dataset: its pictures are PIL pictures (a column of type `datasets.Image`), paths, or lists of them.
        image, caption, prompt: names of the columns. A prompt column is optional.

    Raises:
        DataError: a column is missing; names those there are.
    """

    def __init__(self, dataset: Any, image: str = "image", caption: str = "caption", prompt: str = "prompt") -> None:
        columns = list(dataset.column_names)
        if lacks := [name for name in (image, caption) if name not in columns]:
            raise DataError(
                f"the dataset has no column {', '.join(map(repr, lacks))}; it has {', '.join(map(repr, columns))}: say which "
                "hold the pictures and the captions (image_column, caption_column)"
            )
        self.dataset = dataset
        self.columns = (image, caption, prompt if prompt in columns else None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image, caption, prompt = self.columns
        at = f"sample {index} of the dataset"
        row: Mapping[str, Any] = self.dataset[index]
        text = row[caption]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{at}: {caption} is {describe(text)}; expected a text that is not empty")
        asked = None if prompt is None else row[prompt]
        if asked is not None and not isinstance(asked, str):
            raise DataError(f"{at}: {prompt} is {describe(asked)}; expected a text or nothing")
        pictures = row[image] if isinstance(row[image], list | tuple) else [row[image]]
        return Sample(tuple(_picture(picture, f"{at}: {image}") for picture in pictures), text.strip(), asked)

    def group(self, index: int) -> Hashable:
        """The sample itself: what its picture is called, a dataset does not say."""
        return index


@dataclass(frozen=True)
class Part:
    """Some samples of a dataset, in an order of their own."""

    dataset: Any
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def group(self, index: int) -> Hashable:
        """As in the whole dataset."""
        return _group(self.dataset, self.indices[index])


def split(dataset: Any, held_out: float, seed: int = 0) -> tuple[Part, Part]:
    """What is trained on, and what is held out: the same for a seed, and no picture in both.

    Args:
        dataset: with a length; where it has `group`, samples of one group stay together.
        held_out: share of the samples, between 0 and 1; or their number, from 1. Groups stay whole, so it may come out a
            little larger.
        seed: of the draw.

    Raises:
        ValueError: a share or number that leaves one of the sides empty.
    """
    total = len(dataset)
    wanted = round(held_out * total) if 0 < held_out < 1 else int(held_out)
    if wanted != held_out and not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; expected a share between 0 and 1, or a whole number of samples")
    groups: dict[Hashable, list[int]] = {}
    for index in range(total):
        groups.setdefault(_group(dataset, index), []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    taken, count = 0, 0
    while taken < len(order) and count < wanted:
        count += len(order[taken])
        taken += 1
    if not 0 < count < total:
        raise ValueError(
            f"holding out {held_out} of {total} samples with {len(order)} different pictures leaves {total - count} to train "
            f"on and {count} to evaluate on; expected some of both"
        )
    sides = (order[taken:], order[:taken])
    train, rest = (sorted(index for group in side for index in group) for side in sides)
    return Part(dataset, train), Part(dataset, rest)


def open_dataset(
    source: str | Path,
    *,
    captions: str | Path | None = None,
    subset: str | None = None,
    split: str | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    prompt_column: str = "prompt",
) -> CaptionFolder | DatasetCaptions:
    """A dataset by where it is: a folder with a captions file, a folder that `datasets` saved, or a name on the hub.

    Args:
        source: the folder or the name.
        captions: as in `CaptionFolder`.
        subset, split: of a `datasets` dataset; default: its only one, or "train".
        image_column, caption_column, prompt_column: of a `datasets` dataset.

    Raises:
        DataError: neither is there, or a defect in what is there.
        ImportError: it needs `datasets`, which is not installed.
    """
    folder = Path(source)
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()]
    if folder.is_dir() and not saved:
        return CaptionFolder(folder, captions)
    if folder.exists() and not saved:
        raise DataError(f"{folder} is a file; expected the folder of pictures with its captions file")
    datasets = _datasets(source)
    if saved:
        loaded = datasets.load_from_disk(str(folder))
    else:
        try:
            loaded = datasets.load_dataset(str(source), subset)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{source} is neither a folder here nor a dataset that `datasets` finds: {error}"
            ) from error
    if isinstance(loaded, Mapping):
        wanted = split or ("train" if len(loaded) > 1 else next(iter(loaded)))
        if wanted not in loaded:
            raise DataError(f"{source} has no split {wanted!r}; it has {', '.join(map(repr, loaded))}")
        loaded = loaded[wanted]
    elif split is not None:
        raise DataError(f"{source} has no splits, but split {split!r} was asked for; leave it out")
    return DatasetCaptions(loaded, image_column, caption_column, prompt_column)


def _datasets(source: str | Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source} is no folder with a captions file, and reading it as a dataset needs the library datasets: "
            "pip install datasets"
        ) from error
    return datasets


def _group(dataset: Any, index: int) -> Hashable:
    return dataset.group(index) if hasattr(dataset, "group") else index


def _picture(value: Any, at: str) -> Image.Image:
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if not isinstance(value, str | Path):
        raise DataError(f"{at} is {describe(value)}; expected a picture (a column of type datasets.Image) or a path")
    try:
        return read_image(value)
    except (OSError, ValueError) as error:
        raise DataError(f"{at}: {error}") from error


def _refuse(defects: Sequence[str]) -> None:
    if defects:
        more = len(defects) - _NAMED_DEFECTS
        rest = f"; and {more} more" if more > 0 else ""
        raise DataError("; ".join(defects[:_NAMED_DEFECTS]) + rest)

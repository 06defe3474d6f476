"""Captions files: CSV, JSON lines and JSON to records, with file and row of every defect."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("captions.csv", "captions.jsonl", "captions.json")
_NEEDED = ("image", "caption")
_READ = ("image", "caption", "prompt")


class DataError(ValueError):
    """Training data with a defect: says where, and what was expected."""


@dataclass(frozen=True)
class Record:
    """A row of a captions file. `where` says which; `images` are paths as they are written there."""

    where: str
    images: tuple[str, ...]
    caption: str
    prompt: str | None


def find_captions_file(folder: Path, captions: str | Path | None = None) -> Path:
    """The captions file of a folder.

    Args:
        folder: where it lies.
        captions: its name; None: the one of `NAMES` that is there.

    Raises:
        DataError: no such folder or file, or several.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one with pictures and a captions file ({', '.join(NAMES)})")
    if captions is not None:
        path = folder / captions
        if not path.is_file():
            raise DataError(f"{folder} has no captions file {captions}")
        if path.suffix not in _READERS:
            raise DataError(f"{path} ends in {path.suffix!r}; expected {', '.join(_READERS)}")
        return path
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if not found:
        raise DataError(f"no captions file was found in {folder}; expected {', '.join(NAMES)}, or its name")
    if len(found) > 1:
        raise DataError(f"{folder} has {', '.join(path.name for path in found)}; say which is meant")
    return found[0]


def read_captions(path: Path) -> list[Record]:
    """All rows of a captions file.

    Raises:
        DataError: what is wrong, and in which row; a file without rows.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    records = [_record(path, where, row) for where, row in _READERS[path.suffix](path, text)]
    if not records:
        raise DataError(f"{path} holds no captions; expected a row with image and caption for each sample")
    return records


def describe(value: Any) -> str:
    """A value in an error: its type, and the value where it is short."""
    if value is None:
        return "missing"
    if isinstance(value, str) and not value.strip():
        return "empty"
    shown = repr(value)
    return f"{shown} ({type(value).__name__})" if len(shown) <= 40 else f"a {type(value).__name__}"


def _rows_of_csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Where a quoted text runs over lines, the line that ends it counts.
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{path} row 1: the column {', '.join(twice)} stands there twice; expected it once")
        if lacks := [name for name in _NEEDED if name not in header]:
            names = ", ".join(header) or "none"
            raise DataError(
                f"{path} row 1: no column {', '.join(lacks)}; the columns are {names}; expected image,caption or "
                "image,caption,prompt"
            )
        for fields in reader:
            if not fields:
                continue
            where = f"row {reader.line_num}"
            if len(fields) != len(header):
                raise DataError(
                    f"{path} {where}: {len(fields)} fields for {len(header)} columns; quote texts that hold commas"
                )
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} row {reader.line_num}: {error}") from error


def _rows_of_jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"row {number}", _parsed(path, f"row {number}", line)


def _rows_of_json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    rows = _parsed(path, "", text)
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {_kind(rows)}; expected a list of objects with image and caption")
    for number, row in enumerate(rows, 1):
        yield f"entry {number}", row


_READERS = {".csv": _rows_of_csv, ".jsonl": _rows_of_jsonl, ".json": _rows_of_json}


def _parsed(path: Path, where: str, text: str) -> Any:
    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name, value in pairs:
            if name in row:
                at = f" {where}" if where else f" entry with image {row.get('image')!r}"
                raise DataError(f"{path}{at}: {name} stands there twice; expected it once")
            row[name] = value
        return row

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        at = where or f"line {error.lineno}"
        raise DataError(f"{path} {at}: no JSON: {error.msg} at column {error.colno}") from error


def _record(path: Path, where: str, row: Any) -> Record:
    at = f"{path} {where}"
    if not isinstance(row, dict):
        raise DataError(f"{at}: {_kind(row)}; expected an object with image and caption")
    image, caption, prompt = (row.get(name) for name in _READ)
    images = image if isinstance(image, list) else [image]
    if not images:
        raise DataError(f"{at}: image is an empty list; expected at least one path")
    for name in images:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{at}: image is {describe(name)}; expected the path of a picture from {path.parent}")
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{at}: caption is {describe(caption)}; expected a text that is not empty")
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"{at}: prompt is {describe(prompt)}; expected a text or nothing")
    # An empty field of a CSV file is no prompt; an empty text in JSON is one.
    if path.suffix == ".csv" and not prompt:
        prompt = None
    return Record(where, tuple(name.strip() for name in images), caption.strip(), prompt)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")

"""What the reports of this package print: tables as text, numbered modules in one row, bytes in units."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType

Row = TypeVar("Row")


def as_text(*parts: RenderableType, width: int = 140) -> str:
    """Tables and lines as plain text of at most `width` characters."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def grouped(rows: Iterable[tuple[str, Row]]) -> dict[str, list[Row]]:
    """Rows by path, where paths that differ in numbers only are one: "layers.0.fc1", "layers.1.fc1" -> "layers.*.fc1"."""
    groups: dict[str, list[Row]] = {}
    for path, row in rows:
        groups.setdefault(numbers_aside(path), []).append(row)
    return groups


def numbers_aside(path: str) -> str:
    """ "layers.0.fc1, layers.1.fc1" -> "layers.*.fc1, layers.*.fc1"."""
    return re.sub(r"(?:(?<=\.)|(?<=^)|(?<= ))\d+(?=\.|,|$)", "*", path)


def alike(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...], int]]:
    """(path, what is said of it, how many) of rows that say the same of paths that differ in numbers only.

    A row that is alone keeps its path.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path, said in rows:
        groups.setdefault((numbers_aside(path), said), []).append(path)
    return [(pattern if len(paths) > 1 else paths[0], said, len(paths)) for (pattern, said), paths in groups.items()]


def size(count: float) -> str:
    """Bytes as B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

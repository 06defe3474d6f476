"""What the reports of the package are made of."""

from __future__ import annotations

import pytest
from rich.table import Table

from mllm_fast import tables


def test_numbered_modules_share_a_row_if_the_same_is_said_of_them() -> None:
    rows = [("layers.0.fc", ("a",)), ("layers.1.fc", ("a",)), ("layers.2.fc", ("b",)), ("head", ("a",)), ("3", ("a",))]
    assert tables.alike(rows) == [
        ("layers.*.fc", ("a",), 2),
        ("layers.2.fc", ("b",), 1),
        ("head", ("a",), 1),
        ("3", ("a",), 1),
    ]
    assert tables.grouped([("0.x, t.0.x", 1), ("1.x, t.1.x", 2), ("a1.x", 3)]) == {"*.x, t.*.x": [1, 2], "a1.x": [3]}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (5 * 2**40, "5120.0 GiB")]
)
def test_bytes_in_units(count: int, text: str) -> None:
    assert tables.size(count) == text


def test_text_holds_what_was_given() -> None:
    table = Table("column", title="title")
    table.add_row("[not markup]")
    said = tables.as_text(table, "a line")
    assert "[not markup]" in said
    assert said.endswith("a line\n")

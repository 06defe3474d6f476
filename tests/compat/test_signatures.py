"""Upstream's methods are called as they were when the drop-ins were written, and drop-ins take what upstream's take."""

from __future__ import annotations

import pytest

from mllm_fast.families import REGISTRY
from tests.compat import signatures


def test_no_upstream_signature_changed() -> None:
    """In the tested versions; elsewhere `python -m tests.compat.signatures` lists what changed."""
    before, now = signatures.recorded(), signatures.versions()
    if before["versions"] != now:
        pytest.skip("other versions than the recorded ones are installed; python -m tests.compat.signatures compares")
    lines = signatures.changes(before["signatures"], signatures.installed())
    assert not lines, "look at the drop-ins of these classes, then python -m tests.compat.signatures --write:\n" + (
        "\n".join(lines)
    )


@pytest.mark.parametrize("path", sorted(REGISTRY))
def test_a_dropin_takes_what_upstream_takes(path: str) -> None:
    if signatures.upstream_class(path) is None:
        pytest.skip("its project is not installed here, or has no such class in this version")
    lines = signatures.refused(REGISTRY[path])
    assert not lines, "\n".join(lines)


def test_changes_are_listed_by_class_and_method() -> None:
    before = {"a.A": {"forward": "(self, x)", "generate": "(self)"}, "a.B": {"forward": "(self)"}, "a.C": {}}
    now = {"a.A": {"forward": "(self, x, y=None)"}, "a.B": {}, "a.D": {"forward": "(self)"}}
    assert signatures.changes(before, now) == [
        "a.D: not recorded",
        "a.C: recorded, and no drop-in names it any more",
        "a.A.generate: gone",
        "a.A.forward\n    was (self, x)\n    now (self, x, y=None)",
        "a.B: not installed, or gone",
    ]
    assert signatures.changes(now, now) == []


def test_defaults_are_shown_and_annotations_are_not() -> None:
    def method(self: object, x: int, *args: int, flag: bool = False, value: object = object(), **kw: str) -> None: ...

    assert signatures.described(method) == "(self, x, *args, flag=False, value='object', **kw)"


def test_every_registered_class_of_the_tested_versions_exists() -> None:
    found = {path: signatures.upstream_class(path) for path in REGISTRY}
    assert not [path for path, cls in found.items() if cls is None]

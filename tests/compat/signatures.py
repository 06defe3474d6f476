"""The upstream methods that drop-ins stand in for, and their signatures: as recorded, and as installed.

python -m tests.compat.signatures           # what changed since they were recorded; status 1 if anything did
python -m tests.compat.signatures --write   # record those of the installed versions
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "open_clip" not in sys.modules:
    sys.modules["open_clip"] = types.ModuleType("open_clip")  # open_flamingo imports it for a factory nobody calls

from mllm_fast.families import REGISTRY, Entry

FILE = Path(__file__).with_name("signatures.json")
# Distributions whose classes are swapped.
SOURCES = ("transformers", "open-flamingo", "flamingo-pytorch", "bitsandbytes", "peft")


def upstream_class(path: str) -> type | None:
    """The class of that path, or None where what it comes from is not installed, or has no such class any more."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def overridden(entry: Entry) -> Iterator[tuple[str, Any, Any]]:
    """(name, upstream's, ours) of every method of upstream that the drop-in of `entry` replaces."""
    upstream = upstream_class(entry.upstream)
    if upstream is None:
        return
    dropin = entry.load()
    seen: set[str] = set()
    for cls in dropin.__mro__:
        if cls is upstream or not cls.__module__.startswith("mllm_fast.families"):
            break
        for name, method in vars(cls).items():
            if name not in seen and inspect.isfunction(method) and callable(theirs := getattr(upstream, name, None)):
                seen.add(name)
                yield name, theirs, getattr(dropin, name)


def described(method: Any) -> str:
    """Names, kinds and defaults of the parameters; annotations change too often, and say nothing to a caller."""
    signature = inspect.signature(method)
    parameters = []
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not inspect.Parameter.empty and not isinstance(default, bool | int | float | str | tuple | None):
            parameter = parameter.replace(default=type(default).__name__)
        parameters.append(parameter.replace(annotation=inspect.Parameter.empty))
    return str(inspect.Signature(parameters))


def installed() -> dict[str, dict[str, str]]:
    """{upstream class: {method: signature}} of what is installed; a class that is not there has no methods."""
    found: dict[str, dict[str, str]] = {}
    for path, entry in sorted(REGISTRY.items()):
        if not path.startswith("mllm_fast."):  # its own models are no other project's
            found[path] = {name: described(theirs) for name, theirs, _ in sorted(overridden(entry), key=lambda m: m[0])}
    return found


def versions() -> dict[str, str]:
    """Of the projects that the classes come from."""
    found = {}
    for name in SOURCES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def recorded() -> dict[str, Any]:
    """What `--write` wrote: "versions" and "signatures"."""
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data


def changes(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """What differs, a line for each class or method."""
    lines = [f"{path}: not recorded" for path in sorted(now.keys() - before.keys())]
    lines += [f"{path}: recorded, and no drop-in names it any more" for path in sorted(before.keys() - now.keys())]
    for path in sorted(before.keys() & now.keys()):
        old, new = before[path], now[path]
        if old and not new:
            lines.append(f"{path}: not installed, or gone")
            continue
        lines += [f"{path}.{name}: not recorded" for name in sorted(new.keys() - old.keys())]
        lines += [f"{path}.{name}: gone" for name in sorted(old.keys() - new.keys())]
        lines += [
            f"{path}.{name}\n    was {old[name]}\n    now {new[name]}"
            for name in sorted(old.keys() & new.keys())
            if old[name] != new[name]
        ]
    return lines


def refused(entry: Entry) -> list[str]:
    """Parameters of upstream's methods that the drop-in's would not take, a line for each method."""
    lines = []
    for name, theirs, ours in overridden(entry):
        given, taken = (inspect.signature(method).parameters.values() for method in (theirs, ours))
        if any(p.kind == p.VAR_KEYWORD for p in taken):
            continue
        lacks = {p.name for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {p.name for p in taken}
        if lacks:
            lines.append(f"{entry.upstream}.{name}: the drop-in does not take {', '.join(sorted(lacks))}")
    return lines


def main() -> int:
    """Compare, or record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="record the signatures of the installed versions")
    if parser.parse_args().write:
        FILE.write_text(json.dumps({"versions": versions(), "signatures": installed()}, indent=2) + "\n", "utf-8")
        return 0
    before, now = recorded(), versions()
    lines = changes(before["signatures"], installed())
    for name, version in now.items():
        was = before["versions"][name]
        print(f"{name} {version}" + ("" if version == was else f" (recorded with {was})"))  # noqa: T201
    print("\n".join(lines) if lines else "no signature changed")  # noqa: T201
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())

"""Writes docs/api.md from the docstrings: `python docs/generate_api.py` (or `make docs`); `--check` only compares.

A docstring is shown as it is written. What is public is what a module's `__all__` names, or what `SECTIONS` lists.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")

HEAD = """# API reference

Made from the docstrings by `docs/generate_api.py`; do not edit. Shapes are written `[batch, length, heads, head_dim]`, and
`[..., D]` has any number of leading dimensions.
"""


@dataclass(frozen=True)
class Section:
    """A heading, a module, and its public names; without names those of its `__all__`."""

    title: str
    module: str
    names: tuple[str, ...] = ()


SECTIONS = (
    Section("The package", "mllm_fast"),
    Section("Ops", "mllm_fast.ops"),
    Section("Models of our own", "mllm_fast.models"),
    Section("Fine-tuning", "mllm_fast.finetune"),
    Section("Models with their processors", "mllm_fast.pipeline"),
    Section("Verification", "mllm_fast.verification", ("verify", "VerifyReport", "Compared")),
    Section("What can be fused", "mllm_fast.families", ("Entry", "CannotFuseError", "find")),
    Section("Backends", "mllm_fast.kernels.runtime", ("explain", "BackendUnavailableError", "UnknownBackendError")),
)


def undocumented() -> list[str]:
    """Public names without a docstring."""
    found = [(section.module, name) for section in SECTIONS for name in _names(section)]
    values = [(module, name, getattr(importlib.import_module(module), name)) for module, name in found]
    return [
        f"{module}.{name}"
        for module, name, value in values
        if (inspect.isclass(value) or inspect.isroutine(value)) and not documentation(value)
    ]


def text() -> str:
    """The whole page."""
    parts, seen = [HEAD], set[int]()
    sections = [(section, [p for name in _names(section) for p in _entry(section, name, seen)]) for section in SECTIONS]
    parts += ["\n".join(f"- [{s.title}](#{_anchor(s.title)})" for s, entries in sections if entries) + "\n"]
    for section, entries in sections:
        if entries:
            parts += [f"## {section.title}\n", f"`{section.module}`. {_summary(section.module)}\n", *entries]
    return "\n".join(parts)


def _names(section: Section) -> list[str]:
    module = importlib.import_module(section.module)
    if section.names:
        return list(section.names)
    names = getattr(module, "__all__", None)
    if names is None:
        found = vars(module).items()
        # Those that it imports from elsewhere are public where it is made of nothing else, as `ops` is.
        own = [n for n, value in found if getattr(value, "__module__", None) == section.module]
        taken = [n for n, value in found if str(getattr(value, "__module__", "")).startswith("mllm_fast.")]
        names = own or taken
    return sorted((n for n in names if not n.startswith("_")), key=lambda n: (n[0].isupper(), n.lower()))


def _summary(module: str) -> str:
    return (inspect.getdoc(importlib.import_module(module)) or "").split("\n\n")[0].replace("\n", " ")


def _entry(section: Section, name: str, seen: set[int]) -> list[str]:
    value = getattr(importlib.import_module(section.module), name)
    if not (inspect.isclass(value) or inspect.isroutine(value)) or id(value) in seen:
        return []
    seen.add(id(value))
    parts = [f"### {name}\n", _block(f"{_kind(value)}{name}{_signature(value)}", value)]
    if inspect.isclass(value):
        for method, member in vars(value).items():
            found = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
            if method.startswith("_") or not (inspect.isfunction(found) or isinstance(member, property)):
                continue
            if inspect.getdoc(found) and inspect.getdoc(found) != inspect.getdoc(
                getattr(nearest_base(value), method, None)
            ):
                signature = "" if isinstance(member, property) else _signature(found)
                parts.append(_block(f"{name}.{method}{signature}", found))
    return parts


def nearest_base(cls: type) -> Any:
    """The next class in the order of resolution: what a method's docstring may come from."""
    return cls.__mro__[1]


def _kind(value: Any) -> str:
    return "class " if inspect.isclass(value) else ""


def _signature(value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, Exception):
        return ""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values() if p.name[0] != "_"
    ]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _block(head: str, value: Any) -> str:
    doc = documentation(value)
    lines = [*textwrap.wrap(head, 120, subsequent_indent=" " * 8, break_on_hyphens=False)]
    lines += [f"    {line}".rstrip() for line in doc.splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def documentation(value: Any) -> str:
    """The docstring that somebody wrote, or ""."""
    doc = inspect.getdoc(value) or ""
    return "" if inspect.isclass(value) and doc.startswith(f"{value.__name__}(") else doc  # a dataclass writes its own


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def main(arguments: list[str]) -> int:
    """Write the page, or with --check say whether it is what it would be."""
    new = text()
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if "--check" in arguments:
        print("docs/api.md is up to date" if new == old else "docs/api.md is out of date: run make docs")  # noqa: T201
        return int(new != old)
    if new != old:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    # The repository's own package, wherever the script is started from.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main(sys.argv[1:]))

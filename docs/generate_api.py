"""Writes docs/api.md from the docstrings: `python docs/generate_api.py` (or `make docs`); `--check` only compares.

A docstring is shown as it is written. What is public is what a module's `__all__` names, or what `SECTIONS` lists.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
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
    """A heading, a module, and its public names, which may lie in modules below it; without names what the module has.

    `paths` shows each name with the module below that it lies in.
    """

    title: str
    module: str
    names: tuple[str, ...] = ()
    paths: bool = False


SECTIONS = (
    Section("The package", "mllm_fast"),
    Section("Ops", "mllm_fast.ops"),
    Section("Models of our own", "mllm_fast.models"),
    Section(
        "Stages that transformers has no class for",
        "mllm_fast.models",
        ("blip2_stage1.Blip2Stage1", "blip_pretraining.BlipPretraining"),
    ),
    Section(
        "Original checkpoints",
        "mllm_fast.models",
        (
            "flamingo_checkpoint.load_original", "flamingo_checkpoint.save_original",
            "minigpt4_checkpoint.from_original", "minigpt4_checkpoint.load_original", "minigpt4_checkpoint.save_original",
            "llava_checkpoint.load_llava", "llava_checkpoint.load_projector", "llava_checkpoint.save_projector",
            "llava_checkpoint.load_lora", "llava_checkpoint.save_lora", "mplug_owl.load_original",
            "lavis_checkpoint.load_lavis", "lavis_checkpoint.save_lavis", "lavis_checkpoint.LavisReport",
        ),
        paths=True,
    ),
    Section(
        "Blocks for new models",
        "mllm_fast.modules",
        (
            "gated_cross_attention.GatedCrossAttentionBlock",
            "perceiver_resampler.PerceiverResampler",
            "projector.Projector",
            "visual_abstractor.VisualAbstractor",
        ),
    ),
    Section("Fine-tuning", "mllm_fast.finetune"),
    Section("Stages of fine-tuning", "mllm_fast.finetune.stages", ("run_stage", "prepare_stage", "StageRun")),
    Section("Data for fine-tuning", "mllm_fast.finetune.data"),
    Section("Memory of a training step", "mllm_fast.finetune.memory"),
    Section("Vision features on disk", "mllm_fast.finetune.features", ("FeatureCache",)),
    Section("Models with their processors", "mllm_fast.pipeline"),
    Section("Verification", "mllm_fast.verification", ("verify", "VerifyReport", "Compared")),
    Section(
        "Errors of loading and quantising",
        "mllm_fast.quantization",
        ("ModelNotFoundError", "UnreadableModelError", "NothingToQuantizeError", "UnmatchedNameError"),
    ),
    Section("What can be trained", "mllm_fast.families.recipes", ("recipe_of", "Recipe", "MissingPartError")),
    Section("What can be fused", "mllm_fast.families", ("Entry", "CannotFuseError", "find")),
    Section("Backends", "mllm_fast.kernels.runtime", ("explain", "BackendUnavailableError", "UnknownBackendError")),
)  # fmt: skip


def text() -> str:
    """The whole page."""
    parts, seen = [HEAD], set[int]()
    sections = [
        (section, [p for name, value in _public(section) for p in _entry(name, value, seen)]) for section in SECTIONS
    ]
    parts += ["\n".join(f"- [{s.title}](#{s.title.lower().replace(' ', '-')})" for s, _ in sections) + "\n"]
    for section, entries in sections:
        summary = documentation(importlib.import_module(section.module)).split("\n\n")[0].replace("\n", " ")
        parts += [f"## {section.title}\n", f"`{section.module}`. {summary}\n", *entries]
    return "\n".join(parts)


def undocumented() -> list[str]:
    """Public names, and public methods of public classes, without a docstring of their own."""
    found = []
    for section in SECTIONS:
        for name, value in _public(section):
            members = _members(value) if inspect.isclass(value) else ()
            parts = [(name, value), *((f"{name}.{member}", function) for member, function, _ in members)]
            found += [f"{section.module}.{path}" for path, part in parts if not documentation(part)]
    return found


def documentation(value: Any) -> str:
    """The docstring that somebody wrote for it, or ""."""
    doc = inspect.cleandoc(vars(value).get("__doc__") or "") if inspect.isclass(value) else inspect.getdoc(value) or ""
    return "" if inspect.isclass(value) and doc.startswith(f"{value.__name__}(") else doc  # a dataclass writes its own


def _public(section: Section) -> Iterator[tuple[str, Any]]:
    for path in section.names or _names(section.module):
        *below, name = path.split(".")
        value = getattr(importlib.import_module(".".join((section.module, *below))), name)
        if inspect.isclass(value) or inspect.isroutine(value):
            yield path if section.paths else name, value


def _names(module_name: str) -> list[str]:
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", None)
    if names is None:
        found = [(n, str(getattr(v, "__module__", ""))) for n, v in vars(module).items() if not inspect.ismodule(v)]
        # What it imports from elsewhere is public where it is made of nothing else, as `ops` is.
        own = [n for n, home in found if home == module_name]
        names = own or [n for n, home in found if home.startswith("mllm_fast.")]
    return sorted((n for n in names if not n.startswith("_")), key=lambda n: (n[0].isupper(), n.lower()))


def _members(cls: type) -> Iterator[tuple[str, Any, bool]]:
    """(name, function, whether it is a property) of the public methods that a class adds to its bases' own."""
    for name, member in vars(cls).items():
        found = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        if name.startswith("_") or not (inspect.isfunction(found) or isinstance(found, property)):
            continue
        # What overrides a method of another library means what that says, unless it says more.
        overrides = any(name in vars(base) for base in cls.__mro__[1:])
        if documentation(found) or not overrides:
            yield name, found, isinstance(found, property)


def _entry(name: str, value: Any, seen: set[int]) -> list[str]:
    if id(value) in seen:
        return []
    seen.add(id(value))
    kind = "class " if inspect.isclass(value) else ""
    parts = [f"### {name}\n", _block(f"{kind}{name}{_signature(value)}", value)]
    if inspect.isclass(value):
        for method, function, is_property in _members(value):
            parts.append(_block(f"{name}.{method}{'' if is_property else _signature(function)}", function))
    return parts


def _signature(value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, Exception):
        return ""
    signature = inspect.signature(value)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values() if not p.name.startswith("_")]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty)).replace("<factory>", "...")


def _block(head: str, value: Any) -> str:
    lines = textwrap.wrap(head, 120, subsequent_indent=" " * 8, break_on_hyphens=False)
    lines += [f"    {line}".rstrip() for line in documentation(value).splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


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

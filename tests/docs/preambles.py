"""What a reader of each page already has: tiny models with random weights, their inputs, and files.

A page's blocks run in the namespace that `namespace` gives for its name; pages that are not listed start with nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm_fast.pipeline import drawn_image
from tests.cli import systems as cli_systems
from tests.quantization import systems

Namespace = dict[str, Any]


def _blip2() -> Namespace:
    """A BLIP-2 and a prompt about an image for it, two samples."""
    return {"model": systems.blip2(), "inputs": systems.inputs("blip2")}


def _readme(folder: Path) -> Namespace:
    systems.llava().save_pretrained(folder / "path" / "or" / "hub-name")
    return _blip2() | {"another_model": systems.llava()}


def _fusing(folder: Path) -> Namespace:
    return _blip2()


def _quantising(folder: Path) -> Namespace:
    """LLaVAs: one in memory, another one, and one in a folder."""
    systems.llava().save_pretrained(folder / "path" / "to" / "model")
    return {
        "model": systems.llava(),
        "another_model": systems.blip2(),
        "inputs": systems.inputs("llava"),
    }


def _finetuning(folder: Path) -> Namespace:
    """A LLaVA with a prompt; another one in a folder with its processor; and pictures with captions."""
    cli_systems.llava(folder / "path" / "to" / "model")
    pictures = folder / "pictures"
    pictures.mkdir()
    lines = ["image,caption"]
    for i in range(6):
        drawn_image(20 + i).save(pictures / f"{i}.png")
        lines.append(f"{i}.png,a picture of the image.")
    (pictures / "captions.csv").write_text("\n".join(lines) + "\n")
    return {"model": systems.llava(), "inputs": systems.inputs("llava")}


_PAGES: dict[str, Callable[[Path], Namespace]] = {
    "README.md": _readme,
    "docs/fusing.md": _fusing,
    "docs/quantising.md": _quantising,
    "docs/finetuning.md": _finetuning,
}


def namespace(page: str, folder: Path) -> Namespace:
    """The names that the blocks of a page may use.

    Args:
        page: its path in the repository.
        folder: in which its blocks run, for files that they read.
    """
    return {"__name__": "__page__", **_PAGES.get(page, lambda folder: {})(folder)}

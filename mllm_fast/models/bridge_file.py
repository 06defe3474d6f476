"""The files of a trained bridge: `bridge.safetensors` (weights) and `bridge.json` (the configuration they belong to).

The weights' metadata repeats the configuration, so that a pair torn by an interrupted overwrite is noticed on loading.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS_FILE = "bridge.safetensors"
CONFIG_FILE = "bridge.json"


class BridgeMismatchError(ValueError):
    """A saved bridge does not fit the model it is loaded into; the message lists every difference."""


class DamagedBridgeError(ValueError):
    """A file of a saved bridge holds something else; the message names it."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary neighbour of `path`, then rename it: readers see the old file or the new one, whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a text in UTF-8."""
    write_atomically(path, lambda file: _write_text(file, text))


def write_bridge(folder: Path, weights: dict[str, Tensor], config: dict[str, Any], *, overwrite: bool) -> Path:
    """Write both files into `folder`, which is made where missing.

    Raises:
        FileExistsError: one of them is there already and `overwrite` is False.
    """
    taken = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if (folder / name).exists()]
    if taken and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {' and '.join(taken)}; choose another folder or pass overwrite=True"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    tensors = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    write_text_atomically(folder / CONFIG_FILE, text + "\n")
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"config": text}))
    return folder


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_bridge_config(folder: Path) -> dict[str, Any]:
    """The configuration in `folder`.

    Raises:
        FileNotFoundError: `folder` lacks one of the two files.
        DamagedBridgeError: the file holds no configuration.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"no bridge in {folder}: {' and '.join(missing)} missing; expected a folder from save_bridge"
        )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(folder / CONFIG_FILE, error) from error
    if not isinstance(config, dict):
        raise _damaged(folder / CONFIG_FILE, f"it holds a {type(config).__name__}")
    return config


def _damaged(file: Path, reason: object) -> DamagedBridgeError:
    return DamagedBridgeError(f"{file} is damaged ({reason}); save the bridge again")


def read_bridge_weights(
    folder: Path, own: dict[str, Tensor], own_config: dict[str, Any], later: dict[str, Any]
) -> dict[str, Tensor]:
    """The tensors in `folder`, once they are known to fit a model with parameters `own` and configuration `own_config`.

    `later` holds options that files from before them lack, and what these files mean.

    Raises:
        FileNotFoundError: `folder` lacks one of the two files.
        BridgeMismatchError: the configuration differs, or tensors are missing, unexpected or of another shape.
        DamagedBridgeError: one of the files holds something else.
    """
    try:
        return _read_weights(folder, own, own_config, later)
    except SafetensorError as error:
        raise _damaged(folder / WEIGHTS_FILE, error) from error


def _read_weights(
    folder: Path, own: dict[str, Tensor], own_config: dict[str, Any], later: dict[str, Any]
) -> dict[str, Tensor]:
    config = read_bridge_config(folder)
    meant = {**later, **config}
    problems = [
        f"{name}: the file has {meant.get(name, 'nothing')}, the model has {own_config.get(name, 'nothing')}"
        for name in sorted(meant.keys() | own_config.keys())
        if meant.get(name) != own_config.get(name)
    ]
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        if json.loads((file.metadata() or {}).get("config", "null")) != config:
            problems.append(f"{CONFIG_FILE} and {WEIGHTS_FILE} come from different saves; save the bridge again")
        names = set(file.keys())
        problems += [f"missing: {name}" for name in own if name not in names]
        problems += [f"unexpected: {name}" for name in sorted(names - own.keys())]
        for name in sorted(names & own.keys()):
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(own[name].shape):
                problems.append(f"shape of {name}: the file has {shape}, the model has {tuple(own[name].shape)}")
        if problems:
            raise BridgeMismatchError(f"the bridge in {folder} does not fit this model:\n  " + "\n  ".join(problems))
        return {name: file.get_tensor(name) for name in names}

"""The folder of a run: what was trained, and everything that it takes to go on from there with the same losses.

`trained.safetensors` holds the trained parameters only, under their names in the model. `state-<step>.pt` holds the rest:
optimiser, schedule, random states, position in the data, history; `torch.load(weights_only=True)` reads it, so no file of a
run can carry code. `best.safetensors` holds the trained parameters of the best evaluation, and `training.json` tells people
how the run went; nothing reads it back.

A checkpoint counts from the moment `trained.safetensors` is renamed into place: its metadata names the state file that
belongs to it, which was written before, and the older state file is removed after. A write that is interrupted anywhere
leaves the older checkpoint whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..models.bridge_file import write_atomically

TRAINED_FILE = "trained.safetensors"
BEST_FILE = "best.safetensors"
SUMMARY_FILE = "training.json"
_STATES = "state-*.pt"


class RunExistsError(FileExistsError):
    """The folder already holds a run."""


class NoCheckpointError(FileNotFoundError):
    """The folder holds no checkpoint, or a damaged one."""


class RunMismatchError(ValueError):
    """A checkpoint belongs to another model, other data or other settings; the message lists every difference."""


@dataclass
class Checkpoint:
    """A run after `step` updates.

    Attributes:
        step: updates done.
        batches: forward passes done by each process, which is the position in the data.
        trained: the trained parameters, by name, whole and on the CPU.
        optimizer: its state of every trained parameter, by name.
        schedule: the schedule's state.
        random: the random states of every process.
        changed: parameters and buffers that training changed without a gradient (queues, running averages), by name.
        losses: of every update, fp64.
        history: see `TrainingResult`.
        best: {"step", "value", "since": evaluations since then}, or empty.
        identity: what a resumed run must have in common with this one.
    """

    step: int
    batches: int
    trained: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]
    schedule: dict[str, Any]
    random: list[dict[str, Any]]
    changed: dict[str, Tensor]
    losses: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)


def check_unused(folder: Path) -> None:
    """Refuse a folder that a run has written into. Other files in it are left alone.

    Raises:
        RunExistsError: there is a file of a run in it.
        NotADirectoryError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder for the run")
    found = [name for name in (TRAINED_FILE, BEST_FILE, SUMMARY_FILE) if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob(_STATES))
    if found:
        raise RunExistsError(
            f"{folder} already holds a run ({', '.join(found)}); go on with it by resume=True, or choose another folder"
        )


def write(folder: Path, checkpoint: Checkpoint, *, plan: str, summary: dict[str, Any]) -> None:
    """Write a checkpoint in the place of the one before.

    Args:
        folder: made where missing.
        checkpoint: what to write.
        plan: the table of the plan, for the metadata of the weights.
        summary: for `training.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / f"state-{checkpoint.step}.pt"
    rest = {name: value for name, value in vars(checkpoint).items() if name not in ("trained", "history", "identity")}
    # Text, so that what people may put among the metrics can always be read back.
    rest |= {"history": json.dumps(checkpoint.history), "identity": json.dumps(checkpoint.identity)}
    write_atomically(state, lambda path: torch.save(rest, path))
    metadata = {"step": str(checkpoint.step), "state": state.name, "plan": plan}
    write_trained(folder / TRAINED_FILE, checkpoint.trained, metadata)
    write_summary(folder, summary)
    for old in folder.glob(_STATES):
        if old != state:
            old.unlink(missing_ok=True)


def write_trained(path: Path, trained: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write trained parameters, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous().cpu() for name, value in trained.items()}
    write_atomically(path, lambda file: save_file(tensors, file, metadata={"format": "pt", **metadata}))


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write `training.json`, atomically."""
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(folder / SUMMARY_FILE, lambda path: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read(folder: Path, identity: dict[str, Any]) -> Checkpoint:
    """The checkpoint in `folder`, once it is known to belong to a run of this `identity`.

    Raises:
        NoCheckpointError: there is none, or a file of it is missing or damaged.
        RunMismatchError: it belongs to another run.
    """
    path = folder / TRAINED_FILE
    if not path.is_file():
        raise NoCheckpointError(f"no checkpoint in {folder}: {TRAINED_FILE} is missing; start without resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            trained = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise NoCheckpointError(f"{path} is damaged ({error}); start again in another folder") from error
    state = folder / metadata.get("state", "state-?.pt")
    if not state.is_file():
        raise NoCheckpointError(
            f"{path} has no {state.name} beside it; its weights can be loaded with load_trained, but not resumed from"
        )
    try:
        found = torch.load(state, map_location="cpu", weights_only=True)
        found |= {name: json.loads(found[name]) for name in ("history", "identity")}
        checkpoint = Checkpoint(trained=trained, **found)
    except Exception as error:
        # torch.load has no one error for what is not its file: pickle's, zip's, its own, EOFError, RuntimeError.
        raise NoCheckpointError(f"{state} is damaged ({error}); start again in another folder") from error
    wrong = differences(checkpoint.identity, json.loads(json.dumps(identity)))
    if wrong:
        raise RunMismatchError(
            f"the run in {folder} was another one; start in another folder, or undo:\n  " + "\n  ".join(wrong)
        )
    return checkpoint


def differences(saved: dict[str, Any], own: dict[str, Any], path: str = "") -> list[str]:
    """One line for every value that differs between two nested mappings."""
    lines = []
    for name in [*saved, *(key for key in own if key not in saved)]:
        theirs, ours = saved.get(name, "nothing"), own.get(name, "nothing")
        if isinstance(theirs, dict) and isinstance(ours, dict):
            lines += differences(theirs, ours, f"{path}{name}: ")
        elif theirs != ours:
            lines.append(f"{path}{name}: the run has {theirs}, now it is {ours}")
    return lines


def read_trained(folder: str | Path, *, best: bool = False) -> dict[str, Tensor]:
    """The trained parameters in a run's folder, by name, for `plan.load_trained`.

    Args:
        folder: of the run.
        best: those of the best evaluation instead of the last ones.

    Raises:
        NoCheckpointError: they are not there, or the file is damaged.
    """
    path = Path(folder) / (BEST_FILE if best else TRAINED_FILE)
    if not path.is_file():
        raise NoCheckpointError(f"no {path.name} in {folder}; expected the folder of a run")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise NoCheckpointError(f"{path} is damaged ({error}); expected a complete safetensors file") from error

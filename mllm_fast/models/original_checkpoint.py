"""Checkpoints in the layout of the project that trained them: read the files, rename the tensors, load them strictly."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

# What a folder may hold, in the order in which it is looked for: safetensors before pickles, whole before sharded.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
# Under which keys trainers put the parameters, next to optimiser states and settings.
NESTED = ("model", "model_state_dict", "state_dict")


class CheckpointMismatchError(ValueError):
    """An original checkpoint does not fit the model; the message lists every difference."""


class UnreadableCheckpointError(ValueError):
    """A file that is damaged, or no checkpoint, or holds what is not loaded; the message names it, in one line."""


@dataclass(frozen=True)
class KeyMap:
    """How the names of an original layout become the names of ours.

    Attributes:
        rules: pattern and replacement, as for `re.sub`; the first pattern that matches a name renames it.
        dropped: names in which this is found hold nothing that our model needs; None: there are none.
    """

    rules: tuple[tuple[re.Pattern[str], str], ...]
    dropped: re.Pattern[str] | None = None

    @classmethod
    def of(cls, *rules: tuple[str, str], dropped: str | None = None) -> KeyMap:
        """From patterns as strings."""
        compiled = tuple((re.compile(pattern), replacement) for pattern, replacement in rules)
        return cls(compiled, None if dropped is None else re.compile(dropped))

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under our names; a name that no rule knows stays as it is, for the caller to complain about."""
        renamed: dict[str, Tensor] = {}
        for name, value in state.items():
            if self.dropped is not None and self.dropped.search(name):
                continue
            rule = next(((p, r) for p, r in self.rules if p.match(name)), None)
            renamed[name if rule is None else rule[0].sub(rule[1], name)] = value
        return renamed


def read_checkpoint(path: str | Path, *, nested: Sequence[str] = NESTED, meta: bool = False) -> dict[str, Tensor]:
    """The tensors of an original checkpoint, on the CPU, by the names in the file.

    Args:
        path: a `.safetensors` file; any other file, read by `torch.load(weights_only=True)`; or a folder that holds one
            of `FOLDER_FILES`, whole or as shards with their index.
        nested: where the file holds one of these keys, the tensors are below it.
        meta: read names, shapes and dtypes only; the tensors are on the meta device.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no weights.
        UnreadableCheckpointError: the file holds more than tensors and plain values, is damaged or not a checkpoint, or has
            no tensors.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        try:
            tensors |= (
                _read_safetensors(file, meta) if file.suffix == ".safetensors" else _read_pickle(file, nested, meta)
            )
        except (UnreadableCheckpointError, PermissionError):
            raise
        except (
            Exception
        ) as error:  # of damaged bytes their readers raise anything: KeyError, struct.error, UnicodeDecodeError
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UnreadableCheckpointError(
                f"{file} is damaged or no checkpoint; copy it here again ({reason})"
            ) from error
    if not tensors:
        raise UnreadableCheckpointError(f"{path} holds no tensors; expected the parameters of a model")
    return tensors


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint at {path}")
        return [path]
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = _shards(index)
            missing = [shard for shard in shards if not (path / shard).is_file()]
            if missing:
                raise FileNotFoundError(f"{path} lacks {', '.join(missing)}, which {index.name} names")
            return [path / shard for shard in shards]
    raise FileNotFoundError(f"no weights in {path}; expected {' or '.join(FOLDER_FILES)}, whole or in shards")


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableCheckpointError(
            f"{index} is damaged; expected JSON whose weight_map says which file holds which tensor"
        ) from error
    if strange := [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]:
        raise UnreadableCheckpointError(f"{index} names {', '.join(map(str, strange))}; expected files beside it")
    return shards


def _read_safetensors(file: Path, meta: bool) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        if not meta:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _read_pickle(file: Path, nested: Sequence[str], meta: bool) -> dict[str, Tensor]:
    try:
        # Only the zip format can be mapped into memory; files from before PyTorch 1.6 have another.
        mapped = zipfile.is_zipfile(file) and not meta
        loaded = torch.load(file, map_location="meta" if meta else "cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UnreadableCheckpointError(
            f"{file} is not a checkpoint of tensors and plain values, and nothing else is loaded, because a pickle can run "
            f"code; convert it to safetensors where you trust it ({str(error).splitlines()[0]})"
        ) from error
    for key in nested:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise UnreadableCheckpointError(
            f"{file} holds a {type(loaded).__name__}; expected a mapping from names to tensors"
        )
    return {name: value.detach() for name, value in loaded.items() if isinstance(value, Tensor)}


def differences(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, needed: Iterable[str] | None = None
) -> list[str]:
    """What keeps the tensors `given` from being loaded as `own`, one line each, in order of the names.

    Args:
        needed: which of our names must be given; default all.
    """
    missing = sorted(set(own if needed is None else needed) - given.keys())
    problems = [f"missing: {name}" for name in missing]
    problems += [f"unexpected: {name}" for name in sorted(given.keys() - own.keys())]
    problems += [
        f"shape of {name}: the checkpoint has {tuple(given[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in sorted(given.keys() & own.keys())
        if given[name].shape != own[name].shape
    ]
    return problems


def load_strictly(
    model: nn.Module,
    given: Mapping[str, Tensor],
    source: str,
    *,
    needed: Callable[[str], bool] = lambda name: True,
    error: type[ValueError] = CheckpointMismatchError,
) -> None:
    """Load tensors that have our names already: either everything fits, or nothing is changed.

    Args:
        source: what the message calls the checkpoint.
        needed: which of the model's names must be given.
        error: what to raise.

    Raises:
        CheckpointMismatchError: tensors are missing, unexpected or of another shape; all are listed.
    """
    own = model.state_dict()
    problems = differences(own, given, needed=filter(needed, own))
    if problems:
        raise error(f"{source} does not fit this model:\n  " + "\n  ".join(problems))
    model.load_state_dict(given, strict=False)

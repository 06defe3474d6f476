"""Vision features on disk: what a frozen vision model makes of a picture is computed once, however many epochs follow.

    with FeatureCache(model, "features"):
        train(plan, ...)

What is kept is what the vision model gave, byte for byte: a run with a cache has the losses of one without, bit for bit on a
CPU. Where several samples share a picture they may differ in the last bit, because it is computed once, in the first of its
batches, and GEMM libraries round otherwise for another number of rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..families import class_path
from ..families.recipes import recipe_of, resolve, unwrapped

_SUFFIX = ".safetensors"
_CHECKSUM = "crc32"
# The name of a vision model's features where it returns a tensor and not an output with fields.
_TENSOR = "features"
_STATES = "hidden_states"
_KEPT = ("last_hidden_state", "pooler_output")
# Files are small, and reading them waits for the disk.
_THREADS = 8


class VisionIsTrainedError(ValueError):
    """The features change with every step."""


class DamagedFeaturesWarning(UserWarning):
    """A file of the cache is not what was written; its features are computed again."""


class FeatureCache:
    """Stands before a model's frozen vision model while it is entered, and keeps what that returns.

    A file a picture, in a folder named after the vision model's weights and configuration; a picture is known by a hash of the
    pixels that the vision model gets, which are its content after preprocessing. Files are written under another name and
    renamed, so several processes may share a cache. Damaged files are computed and written again, with a warning.

    Where only the norm after the vision model's layers is trained (BLIP-2), what is kept is what the norm reads.

    Args:
        model: a supported system, ready to be trained: what is frozen is read from `requires_grad` on entering.
        folder: of the cache; made where missing.

    Attributes:
        computed, read, damaged: numbers of pictures so far: computed by the vision model, read from disk, and those whose
            files were damaged.

    Raises (on entering):
        VisionIsTrainedError: the vision model is trained.
        ValueError: the model has none, or a cache stands before it already.
    """

    def __init__(self, model: nn.Module, folder: str | Path) -> None:
        self.model, self.root = unwrapped(model), Path(folder)
        self.computed = self.read = self.damaged = 0
        self._lock = threading.Lock()
        self._undo: contextlib.ExitStack | None = None

    def __enter__(self) -> FeatureCache:
        module = _frozen_vision(self.model)
        if isinstance(module.__dict__.get("forward"), _Cached):
            raise ValueError("a feature cache stands before this vision model already")
        self.folder = self.root / _fingerprint(module)
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            about = {"module": class_path(type(module)), "dtype": str(next(module.parameters()).dtype)}
            (self.folder / "about.json").write_text(json.dumps(about) + "\n")
        with contextlib.ExitStack() as undo:
            self._pool = undo.enter_context(ThreadPoolExecutor(_THREADS))
            before = module.__dict__.get("forward")
            module.__dict__["forward"] = _Cached(self, module, module.forward)
            undo.callback(_put_back, module, before)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *args: object) -> None:
        assert self._undo is not None
        self._undo.close()

    def features(self, module: nn.Module, forward: Any, pixels: Tensor, kwargs: dict[str, Any]) -> Any:
        """What `forward(pixels, **kwargs)` gives, from disk where it is there.

        Args:
            module: the vision model.
            forward: what computes it.
            pixels: [N, ...], a picture a row.
            kwargs: its other arguments; tensors among them that have N rows belong to the pictures.
        """
        keys = self._keys(pixels, kwargs)
        found = dict(zip(keys, self._pool.map(self._load, keys), strict=True))
        missing = [key for key, features in found.items() if features is None]
        self.read += len(keys) - sum(found[key] is None for key in keys)
        if missing:
            rows = torch.tensor([keys.index(key) for key in missing], device=pixels.device)
            if len(missing) < len(keys):
                kwargs = {name: _rows(value, rows, len(keys)) for name, value in kwargs.items()}
            with _evaluation(module), torch.no_grad():
                out = forward(pixels[rows] if len(missing) < len(keys) else pixels, **kwargs)
            self.computed += len(missing)
            fields, states = _taken_apart(out, self._states_read(out))
            made = [_Features({n: value[i] for n, value in fields.items()}, states) for i in range(len(missing))]
            list(self._pool.map(self._save, missing, made))
            found |= dict(zip(missing, made, strict=True))
        of_rows: list[Any] = [found[key] for key in keys]
        names = of_rows[0].fields
        whole = {name: torch.stack([own.fields[name].to(pixels.device) for own in of_rows]) for name in names}
        return _put_together(whole, of_rows[0].states)

    def _states_read(self, out: Any) -> Sequence[int] | None:
        """Which of the hidden states are read, counted from the front; None: nobody knows."""
        states = getattr(out, _STATES, None)
        layers: Any = getattr(getattr(self.model, "config", None), "vision_feature_layer", None)
        if not states or layers is None:
            return None
        asked: list[int] = [layers] if isinstance(layers, int) else list(layers)
        config: Any = self.model.config
        states_in_all = int(config.vision_config.num_hidden_layers) + 1
        # Fewer states than that: a fused model left out the layers behind the last one that is read.
        return sorted({i % states_in_all for i in asked})

    def _keys(self, pixels: Tensor, kwargs: Mapping[str, Any]) -> list[str]:
        """A key for each picture: of its pixels, of what else belongs to it, and of the arguments for all."""
        count = len(pixels)
        # Autocast decides what the vision model computes in.
        kind = pixels.device.type
        setting = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        shared = repr((str(setting), sorted((n, v) for n, v in kwargs.items() if not isinstance(v, Tensor))))
        parts = [pixels, *(v for _, v in sorted(kwargs.items()) if isinstance(v, Tensor))]
        by_row = [part.detach().contiguous().cpu() for part in parts if len(part) == count]
        common = [part.detach().contiguous().cpu() for part in parts if len(part) != count]

        def key(row: int) -> str:
            digest = hashlib.blake2b(shared.encode(), digest_size=20)
            for tensor in [*(part[row] for part in by_row), *common]:
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(_bytes(tensor))
            return digest.hexdigest()

        return list(self._pool.map(key, range(count)))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _load(self, key: str) -> _Features | None:
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                fields = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            if metadata.get(_CHECKSUM) != _checksum(fields):
                raise ValueError("its checksum is another")
            return _Features(fields, int(metadata[_STATES]))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            with self._lock:
                self.damaged += 1
            warnings.warn(
                f"{path} is damaged ({error}); its features are computed again", DamagedFeaturesWarning, stacklevel=2
            )
            return None

    def _save(self, key: str, features: _Features) -> None:
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        stage = path.with_name(f".{uuid.uuid4().hex}{_SUFFIX}")
        held = {name: value.detach().cpu().contiguous() for name, value in features.fields.items()}
        try:
            save_file(held, stage, {_CHECKSUM: _checksum(held), _STATES: str(features.states)})
            os.replace(stage, path)
        finally:
            stage.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Features:
    """Of one picture: fields of the output, and the number of its hidden states (-1: it is a tensor)."""

    fields: dict[str, Tensor]
    states: int


class _Cached:
    """What stands in the place of the vision model's forward."""

    def __init__(self, cache: FeatureCache, module: nn.Module, forward: Any) -> None:
        self.cache, self.module, self.forward = cache, module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = [name for name in ("pixel_values", "inputs_embeds", "images") if isinstance(kwargs.get(name), Tensor)]
        whole = kwargs.get("output_attentions") or kwargs.get("return_dict") is False
        if whole or len(args) > 1 or len(args) + len(named) != 1:
            return self.forward(*args, **kwargs)  # asked for something that is not kept
        if args:
            return self.cache.features(self.module, self.forward, args[0], kwargs)
        name = named[0]
        pixels = kwargs.pop(name)

        def forward(pixels: Tensor, **others: Any) -> Any:
            return self.forward(**{name: pixels}, **others)

        return self.cache.features(self.module, forward, pixels, kwargs)


class _States(Sequence[Tensor]):
    """Hidden states of which only those that are read were kept."""

    def __init__(self, length: int, kept: Mapping[int, Tensor]) -> None:
        self.length, self.kept = length, kept

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        at = range(self.length)[index]
        if at not in self.kept:
            raise IndexError(
                f"hidden state {at} was not kept; the cache holds {', '.join(map(str, self.kept))}, which the model's "
                "vision_feature_layer names"
            )
        return self.kept[at]


def _frozen_vision(model: nn.Module) -> nn.Module:
    path = recipe_of(model).vision
    found = [] if path is None else resolve(model, path)
    if not found or not isinstance(found[0], nn.Module):
        raise ValueError(f"{type(model).__name__} has no vision model whose features could be kept")
    vision = found[0]
    trained = [name for name, p in vision.named_parameters() if p.requires_grad]
    if not trained:
        return vision
    # The layers alone are what takes long; before them stand the patches, after them a norm.
    layers = vision._modules.get("encoder")
    if layers is not None and all(name.startswith("post_layernorm.") for name in trained):
        return layers
    raise VisionIsTrainedError(
        f"{path}.{trained[0]} and {len(trained) - 1} more are trained, so the vision model's features change with every step; "
        "train without the vision model, or without a feature cache"
    )


def _fingerprint(module: nn.Module) -> str:
    """Of class, configuration, and all weights."""
    config: Any = getattr(module, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else config
    digest = hashlib.blake2b(digest_size=10)
    # The class before fusing: the drop-ins' results are its own but for rounding.
    base = next(c for c in type(module).__mro__ if not class_path(c).startswith("mllm_fast.families"))
    digest.update(f"{class_path(base)} {json.dumps(said, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _checksum(fields: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(fields):
        value = zlib.crc32(_bytes(fields[name]), zlib.crc32(name.encode(), value))
    return str(value)


def _rows(value: Any, rows: Tensor, count: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and len(value) == count else value


def _taken_apart(out: Any, read: Sequence[int] | None) -> tuple[dict[str, Tensor], int]:
    """Fields of an output, each [N, ...], and how many hidden states it has; -1: it is a tensor."""
    if isinstance(out, Tensor):
        return {_TENSOR: out}, -1
    fields = {name: out[name] for name in _KEPT if isinstance(out.get(name), Tensor)}
    states = out.get(_STATES) or ()
    if read is not None and states:
        # Of a model that reads hidden states, the last one is not among them, or is the same as the last of these.
        fields = {}
    for i in range(len(states)) if read is None else read:
        fields[f"{_STATES}.{i}"] = states[i]
    return fields, len(states)


def _put_together(fields: dict[str, Tensor], states: int) -> Any:
    if states < 0:
        return fields[_TENSOR]
    kept = {int(n.removeprefix(f"{_STATES}.")): v for n, v in fields.items() if n.startswith(f"{_STATES}.")}
    out = BaseModelOutputWithPooling(**{name: value for name, value in fields.items() if name in _KEPT})
    if states:
        out[_STATES] = _States(states, kept)
    return out


def _put_back(module: nn.Module, before: Any) -> None:
    del module.__dict__["forward"]
    if before is not None:
        module.__dict__["forward"] = before


@contextlib.contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Without dropout, or what is kept would be one draw of many."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training

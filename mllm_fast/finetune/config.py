"""A fine-tuning run as a YAML file: read safely, every key and type checked before anything is loaded.

    stage: minigpt4-projection        # see `mllm-fast finetune --list`
    model: ./minigpt4                 # a folder (from this file's), or a name on the hub
    llm: nf4
    data: {path: ./pictures, held_out: 0.1}
    output: ./run
    settings: {steps: 500, batch_size: 8}

Paths begin at the file's own folder.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from .lora import Lora
from .settings import TrainingSettings


class ConfigError(ValueError):
    """A configuration that cannot be used: which key, and what was expected."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
        path: a folder with a captions file, a folder that `datasets` saved, or a name on the hub.
        captions: the captions file's name, where it is not the usual one.
        subset, split: of a `datasets` dataset.
        image_column, caption_column, prompt_column: of a `datasets` dataset.
        held_out: share or number of samples to evaluate on; None: all are trained on.
        seed: of that split.
        check: decode every picture of a folder before the run, not only when it is met.
    """

    path: str
    captions: str | None = None
    subset: str | None = None
    split: str | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    prompt_column: str = "prompt"
    held_out: float | None = None
    seed: int = 0
    check: bool = True


@dataclass(frozen=True)
class FinetuneConfig:
    """A run.

    Attributes:
        stage: a name in `stages.STAGES`.
        model: a folder, or a name on the hub.
        data: what is trained on.
        output: the run's folder.
        llm: quantise the frozen language model while it is loaded.
        dtype: of what is neither quantised nor trained; None: bf16 where the device has it.
        device: None: the first GPU, or the CPU.
        train, lora, prompt, max_caption_tokens: in place of the stage's own.
        trained_dtype, checkpointing: of `prepare_finetuning`.
        features: folder for the frozen vision model's features.
        settings: of `TrainingSettings`, or `epochs`; what is not given is as published.
    """

    stage: str
    model: str
    data: DataConfig
    output: str
    llm: Literal["nf4", "fp4", "int8"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    train: str | None = None
    lora: Lora | None = None
    trained_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpointing: Literal["none", "recompute", "offload"] = "none"
    prompt: str | None = None
    max_caption_tokens: int | None = None
    features: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def read_config(path: str | Path) -> FinetuneConfig:
    """A configuration file, with its paths made independent of the working directory.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: no YAML, a key twice, an unknown key (names the nearest), a missing one, or a value of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a YAML file")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML that can be read: {' '.join(str(error).split())}") from error
    try:
        config: FinetuneConfig = _object(FinetuneConfig, raw, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return _placed(config, path.resolve().parent)


def _placed(config: FinetuneConfig, folder: Path) -> FinetuneConfig:
    from dataclasses import replace

    def near(name: str) -> str:
        # Else it is a name on the hub, unless it is written as a path.
        local = folder / Path(name).expanduser()
        return str(local) if local.exists() or name.startswith((".", "/", "~")) else name

    features = None if config.features is None else str(folder / Path(config.features).expanduser())
    return replace(
        config,
        model=near(config.model),
        data=replace(config.data, path=near(config.data.path)),
        output=str(folder / Path(config.output).expanduser()),
        features=features,
    )


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    "a mapping", node.start_mark, f"the key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _object(cls: type[Any], raw: Any, at: str) -> Any:
    """A dataclass from a mapping.

    Args:
        at: where it stands, as a prefix of its keys ("data.").
    """
    values = _checked(cls, raw, at)
    lacks = [
        f.name for f in fields(cls) if f.name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if lacks:
        raise ConfigError(f"{', '.join(at + name for name in lacks)} is missing; expected {_keys(cls)}")
    if cls is FinetuneConfig and "settings" in values:
        values["settings"] = _checked(TrainingSettings, values["settings"], "settings.", epochs=float)
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{at.removesuffix('.')}: {error}") from error


def _checked(cls: type[Any], raw: Any, at: str, **more: Any) -> dict[str, Any]:
    """The values of a mapping, each of its field's type."""
    if not isinstance(raw, Mapping):
        where = at.removesuffix(".") or "the file"
        raise ConfigError(f"{where} is {_shown(raw)}; expected keys with values: {_keys(cls, more)}")
    hints = typing.get_type_hints(cls) | more
    names = [*(f.name for f in fields(cls)), *more]
    for name in raw:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
            hint = f"did you mean {at}{close[0]}?" if close else f"expected {_keys(cls, more)}"
            raise ConfigError(f"unknown key {at}{name}; {hint}")
    return {name: _value(value, hints[name], f"{at}{name}") for name, value in raw.items()}


def _value(value: Any, hint: Any, at: str) -> Any:
    """A value as its type has it.

    Raises:
        ConfigError: it is of another type.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        first, *others = (each for each in inner if each is not type(None))
        word = next((each for each in others if value in typing.get_args(each)), first)
        return _value(value, word, at)
    if is_dataclass(hint):
        return _object(hint, value, f"{at}.")
    if origin is Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, list | tuple) and value:
        return tuple(_value(each, inner[0], f"{at}[{i}]") for i, each in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML takes 1e-4 for a text: it wants 1.0e-4.
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{at} is {_shown(value)}; expected {_kind(hint)}")


def _kind(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list, each of it {_kind(inner[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, "keys with values")


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    shown = repr(value)
    return f"{shown} ({type(value).__name__})" if len(shown) < 60 else f"a {type(value).__name__}"


def _keys(cls: type[Any], more: Mapping[str, Any] | None = None) -> str:
    return ", ".join([*(f.name for f in fields(cls)), *(more or {})])

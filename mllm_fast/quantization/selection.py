"""Which linear layers of a model belong to its language model, by name and by what they are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..families import class_path
from ..families.language_models import GATED_LAYERS, LANGUAGE_MODELS, LINEARS, QUANTIZED, USUAL_PATHS


class UnmatchedNameError(ValueError):
    """A name in `skip` or `include` that no module of the model has."""


class NothingToQuantizeError(ValueError):
    """No language model was found, or nothing of it is left to quantise."""


@dataclass(frozen=True)
class Target:
    """A linear layer to quantise, and every path under which the model has it."""

    module: nn.Module
    paths: tuple[str, ...]


@dataclass
class Selection:
    """What to quantise of a model.

    Attributes:
        targets: the layers, in the model's order.
        quantized: layers that are quantised already, by their first path.
        left: the layers of the language model that stay as they are: path and reason.
        adapted: layers inside PEFT's adapters that are not quantised.
        outside: paths of the largest modules with linear layers that lie outside the language model.
    """

    targets: list[Target] = field(default_factory=list)
    quantized: dict[str, Any] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


def select(
    model: nn.Module, *, skip: Iterable[str] = (), include: Iterable[str] = (), gated_layers: bool = False
) -> Selection:
    """Find the layers to quantise.

    Args:
        model: with or without weights (its parameters may be on the meta device).
        skip: names of modules to leave as they are: full paths, or the end of some ("q_proj", "layers.0").
        include: names of modules outside the language model to quantise as well.
        gated_layers: also quantise the gated cross-attention layers of a Flamingo-style model.

    Raises:
        UnmatchedNameError: a name that no module has, or one in `include` that holds no linear layer.
        NothingToQuantizeError: no language model, or no layer of it is left.
    """
    paths = _paths(model)
    names = [name for found in paths.values() for name in found]
    skipped, included = _resolve(model, skip, names, "skip"), _resolve(model, include, names, "include")
    roots = _language_model_paths(model, names)
    if not roots and not included:
        raise NothingToQuantizeError(
            f"no language model was found in {type(model).__name__}; name what to quantise with include=[...]"
        )
    modules = dict(model.named_modules())
    gated = {name for name in names if _is(model.get_submodule(name), GATED_LAYERS)}
    if gated_layers and not gated:
        raise NothingToQuantizeError(
            f"{type(model).__name__} has no gated cross-attention layers; drop gated_layers=True"
        )
    heads, tied, kept = _heads(model), _embedding_weights(model), _kept_in_fp32(model)
    adapters = {name for name in names if hasattr(model.get_submodule(name), "base_layer")}
    selection, outside = Selection(), []
    for module in modules.values():
        found = paths[id(module)]
        asked = any(_under(path, included) for path in found)
        inside = any(_under(path, roots) for path in found) or (gated_layers and any(_under(p, gated) for p in found))
        if _is(module, QUANTIZED):
            selection.quantized[found[0]] = module
        elif not isinstance(module, nn.Linear) and not _is(module, LINEARS):
            continue
        elif any(_under(path, adapters) for path in found):
            if (asked or inside) and found[0].endswith(".base_layer"):
                selection.adapted.append(found[0])
        elif not asked and id(module) in heads:
            selection.left.append((found[0], "the output head: name it in include to quantise it"))
        elif not asked and not inside:
            outside.append(found[0])
        elif any(_under(path, skipped) for path in found):
            selection.left.append((found[0], "named in skip"))
        elif not asked and not gated_layers and any(_under(path, gated) for path in found):
            selection.left.append((found[0], "a gated layer: gated_layers=True quantises it, for inference"))
        elif class_path(type(module)) not in LINEARS:
            selection.left.append((found[0], f"not a plain linear layer but a {type(module).__name__}"))
        elif id(module._parameters.get("weight")) in tied or (asked and id(module) in heads and _ties(model)):
            if included.intersection(found):
                raise UnmatchedNameError(f"{found[0]} cannot be quantised: its weight is that of the input embeddings")
            selection.left.append((found[0], "its weight is that of the input embeddings"))
        elif any(_kept(path, kept) for path in found):
            selection.left.append((found[0], "transformers reads its weight's dtype, and keeps it as it is"))
        else:
            selection.targets.append(Target(module, found))
    targets = [path for target in selection.targets for path in target.paths]
    if empty := [n for n in included if not any(_under(path, {n}) for path in (*targets, *selection.quantized))]:
        raise UnmatchedNameError(f"include names {', '.join(sorted(empty))}, which hold no linear layer to quantise")
    selection.outside = _largest(outside, [*targets, *selection.quantized, *(path for path, _ in selection.left)])
    return selection


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' quantised linear layers by path; one with several has them all, with ", " between."""
    paths = _paths(model)
    return {", ".join(paths[id(m)]): m for m in model.modules() if _is(m, QUANTIZED)}


def names_to_skip(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """A list for transformers' `llm_int8_skip_modules` by which exactly the linear layers at `wanted` are converted.

    transformers takes such a name as a pattern from the start of a path, and also as the end of any path without regard
    to the dots; the list is checked against its own matching.

    Args:
        model: the model that transformers will build or has built; its quantised layers count as the linear layers that
            they were made from.
    """
    wanted = set(wanted)
    candidates = [name for name, m in model.named_modules() if class_path(type(m)) in LINEARS or _is(m, QUANTIZED)]
    kept = _kept_in_fp32(model)
    others = [name for name in candidates if name not in wanted and not _kept(name, kept)]
    names = [
        name if all(_convertible(path, [name]) for path in wanted) else f"^{re.escape(name)}"
        for name in _largest(others, sorted(wanted))
    ]
    wrong = [name for name in candidates if _convertible(name, [*names, *kept]) != (name in wanted)]
    if wrong:
        raise ValueError(f"transformers cannot be told to leave exactly {', '.join(wrong)} as it is")
    return names


def _paths(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """All paths of every module; OpenFlamingo registers its decoder layers twice."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return {key: tuple(paths) for key, paths in found.items()}


def _resolve(model: nn.Module, wanted: Iterable[str], names: Sequence[str], argument: str) -> set[str]:
    if isinstance(wanted, str):
        raise TypeError(f"{argument} is the string {wanted!r}; expected a list of names")
    resolved: set[str] = set()
    for name in wanted:
        found = [path for path in names if path and (path == name or path.endswith(f".{name}"))]
        if not found:
            ends = {path.rpartition(".")[2] for path in names}
            close = difflib.get_close_matches(name, [*names, *ends], n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise UnmatchedNameError(f"{argument} names {name!r}, which no module of {type(model).__name__} has{hint}")
        resolved.update(found)
    return resolved


def _language_model_paths(model: nn.Module, names: Sequence[str]) -> set[str]:
    # Inside PEFT's wrapper the model lies two levels down; its paths keep that prefix.
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    prefix = "" if base is model else next(name for name, m in model.named_modules() if m is base) + "."
    known = set(names)
    for cls in type(base).__mro__:
        if class_path(cls) in LANGUAGE_MODELS:
            return {prefix + LANGUAGE_MODELS[class_path(cls)]}
    for path in USUAL_PATHS:
        if prefix + path in known:
            return {prefix + path}
    config: Any = getattr(base, "config", None)
    is_text_model = hasattr(config, "get_text_config") and config.get_text_config() is config
    return {prefix.removesuffix(".")} if is_text_model and _head(base) is not None else set()


def _under(path: str, roots: Iterable[str]) -> bool:
    return any(not root or path == root or path.startswith(f"{root}.") for root in roots)


def _is(module: nn.Module, classes: Iterable[str]) -> bool:
    return any(class_path(cls) in classes for cls in type(module).__mro__)


def _heads(model: nn.Module) -> set[int]:
    """The modules that turn hidden states into scores of tokens."""
    return {id(head) for module in model.modules() if (head := _head(module)) is not None}


def _head(module: Any) -> nn.Module | None:
    try:
        return module.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # of a module that has none, or a model without one
        return None


def _embedding_weights(model: nn.Module) -> set[int]:
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}


def _ties(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(bool(getattr(c, "tie_word_embeddings", False)) for c in (config, text))


def _kept_in_fp32(model: nn.Module) -> list[str]:
    return sorted({name for m in model.modules() for name in (getattr(m, "_keep_in_fp32_modules", None) or ())})


def _kept(path: str, kept: Sequence[str]) -> bool:
    return bool(kept) and not _convertible(path, kept)


def _convertible(path: str, patterns: Sequence[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return bool(should_convert_module(path, list(patterns)))


def _largest(paths: Sequence[str], others: Sequence[str]) -> list[str]:
    """The fewest subtrees that hold all of `paths` and none of `others`."""
    shared = {other[:i] for other in others for i in range(len(other) + 1) if i == len(other) or other[i] == "."}
    largest: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        largest[next((prefix for prefix in prefixes if prefix not in shared), path)] = None
    return list(largest)

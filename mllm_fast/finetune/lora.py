"""LoRA on linear layers of the language model and nowhere else: PEFT's own layers, at exactly the paths that were chosen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..families import class_path
from ..families.language_models import GATED_LAYERS, LINEARS, QUANTIZED

ALL_LINEAR = "all-linear"
ADAPTER = "default"


@dataclass(frozen=True)
class Lora:
    """Low-rank terms beside frozen linear layers (arXiv 2106.09685): y = x W^T + (alpha / r) (x A^T) B^T.

    Attributes:
        r: rank; A is [r, in], B is [out, r].
        alpha: numerator of the scale.
        dropout: of x before A, in training.
        targets: the layers' names, or ends of their paths ("q_proj", "self_attn.q_proj"), in the language model; or
            "all-linear" for all of them but the output head.

    Raises:
        ValueError: numbers out of range, or no targets.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.targets == ALL_LINEAR:
            object.__setattr__(self, "targets", (ALL_LINEAR,))
        if isinstance(self.targets, str):
            raise ValueError(f"targets is the string {self.targets!r}; expected a tuple of names, ({self.targets!r},)")
        if self.r < 1 or not self.targets:
            raise ValueError(f"LoRA needs r >= 1 and at least one target; got r={self.r} and targets={self.targets}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA's dropout is {self.dropout}; expected a number from 0 to below 1")


def lora_layers(root: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers in `root`, by path."""
    return {name: m for name, m in root.named_modules() if "lora_A" in m._modules and "base_layer" in m._modules}


def lora_parameters(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The low-rank matrices of the adapters that are active in PEFT's layers."""
    found = []
    for layer in layers:
        active: Any = layer.active_adapters
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer.") and any(f".{adapter}." in f".{name}." for adapter in active):
                found.append(parameter)
    return found


def find_targets(model: nn.Module, roots: Sequence[nn.Module], excluded: Iterable[nn.Module], lora: Lora) -> list[str]:
    """Paths in `model` of the linear layers that get a low-rank term.

    Args:
        roots: the language model, or its layers.
        excluded: modules in it that are not the language model's own: parts of the bridge.

    Raises:
        ValueError: a target that no linear layer of the language model has, or a layer of the bridge only.
    """
    inside = {id(m) for root in roots for m in root.modules()}
    outside = {id(m) for other in excluded for m in other.modules()}
    outside |= {
        id(child)
        for m in model.modules()
        if any(class_path(c) in GATED_LAYERS for c in type(m).__mro__)
        for child in m.modules()
    }
    adapted = lora_layers(model)  # which stand for the layers inside them
    outside |= {id(child) for layer in adapted.values() for child in layer.modules() if child is not layer}
    head = _head(model)
    linears = {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside - outside and (name in adapted or _linear(module)) and module is not head
    }
    unmatched = [t for t in lora.targets if t != ALL_LINEAR and not any(_named(name, t) for name in linears)]
    if unmatched or not linears:
        names = sorted({name.rpartition(".")[2] for name in linears if not name.rpartition(".")[2].isdigit()})
        raise ValueError(
            f"no linear layer of {type(model).__name__}'s language model is called {' or '.join(unmatched)}; its layers "
            f"are {', '.join(names) or 'not linear'}. Give some of these as Lora(targets=(...,))"
        )
    if ALL_LINEAR in lora.targets:
        return list(linears)
    return [name for name in linears if any(_named(name, target) for target in lora.targets)]


def same_lora(layers: dict[str, nn.Module], lora: Lora, wanted: Iterable[str]) -> bool:
    """Whether the model's LoRA layers are those that `lora` asks for."""
    if set(layers) != set(wanted):
        return False
    for layer in layers.values():
        of: Any = layer
        for name in of.active_adapters:
            dropout = getattr(of.lora_dropout[name], "p", 0.0)
            if (of.r[name], of.lora_alpha[name], dropout) != (lora.r, lora.alpha, lora.dropout):
                return False
    return True


def inject(model: nn.Module, names: Sequence[str], lora: Lora) -> Callable[[], None]:
    """Put PEFT's LoRA layers around the linear layers at `names`, in place.

    PEFT leaves nothing but the new matrices trainable.

    Returns:
        what takes them off again.
    """
    import peft

    pattern = "|".join(re.escape(name) for name in names)
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=pattern)
    kinds = {class_path(c) for name in names for c in type(model.get_submodule(name)).__mro__}
    # PEFT asks the model, not the layer, whether the layer is quantised; transformers alone sets these.
    flags = {
        "is_loaded_in_4bit": any(kind.endswith(".Linear4bit") for kind in kinds & QUANTIZED),
        "is_loaded_in_8bit": any(kind.endswith(".Linear8bitLt") for kind in kinds & QUANTIZED),
    }
    before = {flag: model.__dict__[flag] for flag in flags if flag in model.__dict__}
    model.__dict__.update({flag: True for flag, on in flags.items() if on})
    try:
        peft.inject_adapter_in_model(config, model, ADAPTER)
    finally:
        for flag in flags:
            model.__dict__.pop(flag, None)
        model.__dict__.update(before)

    def undo() -> None:
        for name, layer in lora_layers(model).items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.base_layer)
        model.__dict__.pop("peft_config", None)

    return undo


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or class_path(type(module)) in LINEARS


def _named(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _head(model: Any) -> nn.Module | None:
    for holder in (model, *(model.children())):
        try:
            head = holder.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module):
            return head
    return None

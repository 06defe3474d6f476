"""What every drop-in for a transformers model class needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from transformers import activations
from transformers.utils import output_capturing
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..modules import children
from ..modules.graphs import PASSIVE_HOOKS
from . import CannotFuseError, named_like_upstream

T = TypeVar("T")

PASSIVE_HOOKS.add(output_capturing.__name__)

# Attention implementations of transformers that compute plain softmax attention, so that ours may stand in for them.
KNOWN_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.SiLUActivation: "silu",
    activations.ReLUSquaredActivation: "squared_relu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


def model_dropin(dropin: type[T]) -> type[T]:
    """Class decorator for a drop-in of a `PreTrainedModel` class.

    transformers looks up which outputs a model can record by `str(type(model))`, in a table that each model enters when
    it is built. A drop-in's class appears later, so it enters its own line.
    """
    dropin = named_like_upstream(dropin)
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(dropin), getattr(dropin, "_can_record_outputs"))  # noqa: B009
    return dropin


def activation_name(activation: nn.Module) -> str:
    """The name that `ops.norm_linear` has for an activation module of transformers.

    Raises:
        CannotFuseError: it has none.
    """
    name = _ACTIVATIONS.get(type(activation))
    if name is None:
        raise CannotFuseError(f"its activation is {type(activation).__name__}, which no kernel computes")
    return "gelu_tanh" if name == "gelu" and getattr(activation, "approximate", "none") == "tanh" else name


def hooked(module: nn.Module) -> bool:
    """`children.hooked`, but for the hooks by which transformers records outputs.

    The first request for hidden states or attentions leaves them on the modules for good; they do nothing until the
    next, and a request for attentions runs the original path (`asked_for`).
    """
    if not children.hooked(module):
        return False
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or "forward" in module.__dict__:
        return True
    recorder = output_capturing.__name__
    return any(getattr(hook, "__module__", None) != recorder for hook in module._forward_hooks.values())


def watched(modules: Iterable[nn.Module]) -> bool:
    """Whether anybody sees what these modules are given or hand on: a hook, also of all modules, or a recording."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return any(
        hooked(module) or output_capturing._active_collector.get()  # which is empty where nothing is recorded
        for module in modules
        if children.hooked(module)
    )


def asked_for(output: str, module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller or the config wants `output` ("output_attentions", "output_hidden_states")."""
    wanted = kwargs.get(output)
    config = getattr(module, "config", None)
    return bool(getattr(config, output, False) if wanted is None else wanted)


def runs_plain(attention: nn.Module, bypassed: Iterable[nn.Module], kwargs: dict[str, Any]) -> bool:
    """Whether what is asked of a layer, or what hangs on modules that its drop-in does not call, is beyond the kernels.

    Args:
        attention: the layer's, which has the config.
        bypassed: the modules that the drop-in does not call.
        kwargs: of the layer's forward.
    """
    return (
        asked_for("output_attentions", attention, kwargs)
        or attention.config._attn_implementation not in KNOWN_ATTENTION
        or any(map(hooked, bypassed))
    )

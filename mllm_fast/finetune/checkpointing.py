"""Checkpointing per block: keep a block's input instead of its activations, and compute these again in backward.

Blocks of transformers take the function to checkpoint with from outside, and get ours; blocks of other projects and our
own get it around their forward. It is torch's non-reentrant checkpoint: blocks below the first trained layer keep nothing,
and need no input that asks for a gradient. (transformers' own switch makes the embeddings ask for one, and thereby every
layer keep its input.) Random numbers are those of the forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..families.recipes import Recipe, resolve
from ..models.conditioning import recompute_contexts

Checkpointing = Literal["none", "recompute", "offload"]

_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


@dataclass
class Blocks:
    """The blocks of a model that can be checkpointed.

    Attributes:
        switched: modules of transformers, which have a switch.
        wrapped: other modules, whose forward gets a wrapper on the instance.
    """

    switched: list[nn.Module] = field(default_factory=list)
    wrapped: list[nn.Module] = field(default_factory=list)


class Recompute:
    """Run a function without keeping what it computes; backward runs it again.

    Args:
        offload: keep the first argument, the hidden states, in CPU memory (pinned, where they come from a GPU).
    """

    def __init__(self, offload: bool = False) -> None:
        self.offload = offload

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`."""
        if not torch.is_grad_enabled() or not _asks_for_a_graph(function, args, kwargs):
            return function(*args, **kwargs)
        if not self.offload or not args or not isinstance(args[0], Tensor):
            return checkpoint(function, *args, use_reentrant=False, context_fn=recompute_contexts, **kwargs)
        with _offloaded(args[0]):
            return checkpoint(function, *args, use_reentrant=False, context_fn=recompute_contexts, **kwargs)


class RecomputedForward:
    """Takes the place of `module.forward` on one instance: in training, the forward of its class through `Recompute`.

    It holds the module, so that a deep copy of the model has one of its own.
    """

    def __init__(self, module: nn.Module, run: Recompute) -> None:
        self.module, self.run = module, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward of the module's class."""
        module: Any = self.module
        forward = type(module).forward
        if not module.training:
            return forward(module, *args, **kwargs)
        return self.run(forward.__get__(module), *args, **kwargs)


def _asks_for_a_graph(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether autograd keeps anything of the call; a block that is called so needs no checkpoint."""
    given = [*args, *kwargs.values(), getattr(function, "__self__", None)]
    if isinstance(function, functools.partial):
        given += [*function.args, *function.keywords.values(), getattr(function.func, "__self__", None)]
    if not any(isinstance(x, nn.Module) for x in given):
        return True  # who can say what it holds
    parameters = (p for module in given if isinstance(module, nn.Module) for p in module.parameters())
    return any(t.requires_grad for t in (*tree_leaves(given), *parameters) if isinstance(t, Tensor))


def find(model: nn.Module, recipe: Recipe) -> Blocks:
    """The blocks of a model of the system that `recipe` is of.

    Raises:
        ValueError: it has none that can be checkpointed.
    """
    blocks = Blocks([m for m in model.modules() if hasattr(m, _FLAG)])
    inside = {id(m) for m in blocks.switched}
    for path in recipe.blocks:
        for block in resolve(model, path):
            if id(block) not in inside and isinstance(block, nn.Module):
                blocks.wrapped.append(block)
    if not blocks.switched and not blocks.wrapped:
        raise ValueError(f"{type(model).__name__} has no blocks that can be checkpointed; use checkpointing='none'")
    return blocks


def apply(model: nn.Module, blocks: Blocks | None, how: Checkpointing) -> None:
    """Checkpoint the blocks of a model so, or, with None, keep all activations again.

    Other checkpointing of the model ends: transformers' switch, with its embeddings that ask for gradients, and that of
    `models.Flamingo`.
    """
    for module in model.modules():
        if getattr(module, "_require_grads_hooks", None):
            cast(Any, module).disable_input_require_grads()
        for hook in module.__dict__.get("_layer_hooks", ()):
            hook.checkpoint = False
        if isinstance(module.__dict__.get("forward"), RecomputedForward):
            del module.__dict__["forward"]
        if getattr(module, _FLAG, False):
            setattr(module, _FLAG, False)
    if blocks is None:
        return
    run = Recompute(how == "offload")
    for module in blocks.switched:
        setattr(module, _FLAG, True)
        setattr(module, _FUNCTION, run)
    for module in blocks.wrapped:
        module.__dict__["forward"] = RecomputedForward(module, run)


def _offloaded(hidden: Tensor) -> Any:
    """While it lasts, what autograd keeps of these bytes lies in CPU memory; other tensors stay where they are.

    Copies run on the current stream, in order with the kernels that write and overwrite the bytes.
    """
    storage, device = hidden.untyped_storage()._cdata, hidden.device

    def pack(t: Tensor) -> Tensor | tuple[Tensor]:
        if t.untyped_storage()._cdata != storage:
            return t
        if device.type == "cpu":
            return (t.detach(),)
        kept = torch.empty(t.shape, dtype=t.dtype, layout=t.layout, pin_memory=True)
        return (kept.copy_(t.detach(), non_blocking=True),)

    def unpack(packed: Tensor | tuple[Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

"""Which modules of a model FSDP2 may gather and let go one by one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..families.recipes import recipe_of, resolve, unwrapped


def layers_to_shard(model: nn.Module) -> list[nn.Module]:
    """The language model's layers, without what a bridge put among them.

    Drop-ins of a bridge read the weights of several blocks at once (keys and values of the image for all of them), so
    a layer that holds such a block is not taken as a whole, but those of its children that hold none.
    """
    base, recipe = unwrapped(model), recipe_of(model)
    if recipe.language_model is None:
        return []
    roots = [found for found in resolve(base, recipe.language_model) if isinstance(found, nn.Module)]
    inside = {id(module) for root in roots for module in root.modules()} - {id(root) for root in roots}
    bridge: set[int] = set()
    for paths in recipe.parts.values():
        for member in (member for path in paths for member in resolve(base, path)):
            if isinstance(member, nn.Module) and id(member) in inside:
                bridge |= {id(parameter) for parameter in member.parameters()}
            elif isinstance(member, nn.Parameter):
                bridge.add(id(member))
    lists = [stack for root in roots for stack in _outermost_lists(root)]
    return [layer for stack in lists for child in stack.children() for layer in _without(child, bridge)]


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    if isinstance(module, nn.ModuleList):
        yield module
        return
    for child in module.children():
        yield from _outermost_lists(child)


def _without(module: nn.Module, bridge: set[int]) -> Iterator[nn.Module]:
    own = [id(parameter) for parameter in module.parameters()]
    if not own:
        return
    if not any(parameter in bridge for parameter in own):
        yield module
    elif not all(parameter in bridge for parameter in own):
        for child in module.children():
            yield from _without(child, bridge)

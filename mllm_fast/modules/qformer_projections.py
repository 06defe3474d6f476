"""The projections of a Q-Former: several linear layers that read one input as one GEMM, images for all layers at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.linear import StackedWeight, pack_weight, packed_linear, stack_weights
from . import children
from .qformer_spec import Layer, QFormerLayerSpec, Stacks, attention_p
from .rows import Parts, Rows, joined
from .state import FusedState, needs_graph

KeysValues = tuple[Tensor, Tensor]

# Above so many bytes the C library takes a tensor from the system each time, and zeroed pages cost more than one GEMM
# for all layers saves: on a CPU, inference then projects the image layer by layer.
LARGEST = 32 << 20


def project_images(
    layers: Sequence[Layer], state: FusedState, image: Tensor, stacks: Stacks | None = None
) -> list[Tensor | None]:
    """Keys and values of the image for all layers that read it, in one GEMM.

    Args:
        layers: of the Q-Former, in order.
        state: keeps the stacked weight.
        image: [I, M, D_image] features of the unique images.
        stacks: as in `LayerCall`.

    Returns:
        for each layer [I, M, 2 * heads * head_dim], keys then values, a view of one buffer; None for layers without
        cross-attention and for those that project the image themselves: all of them where the buffer would be too large
        (`LARGEST`), and those whose projections have to be called (LoRA, quantised, sharded).
    """
    names = [layer.spec.cross for layer in layers]
    pairs = [
        None if cross is None else [children.resolve(layer.module, path) for path in (cross.key, cross.value)]
        for layer, cross in zip(layers, names, strict=True)
    ]
    readable = [pair is not None and all(children.readable_linear(p) for p in pair) for pair in pairs]
    linears = [p for pair, read in zip(pairs, readable, strict=True) if read and pair is not None for p in pair]
    size = image.shape[:-1].numel() * sum(linear.weight.shape[0] for linear in linears) * image.element_size()
    graph = needs_graph(image, *(linear.weight for linear in linears))
    if not linears or (size > LARGEST and image.device.type == "cpu" and not graph):
        return [None] * len(layers)
    parts = iter(project(state, ("image", tuple(readable)), (Rows(image),), linears, stacks, together=2))
    return [next(parts) if read else None for read in readable]


def absorbs(layers: Sequence[Layer], x: Tensor, image: Tensor, query_length: int) -> bool:
    """Whether the layers had better read images [B, M, D_image] by `ops.absorbed_attention` than by keys and values.

    So it is for inference on a CPU where each row reads an image of its own: exact but for the order of rounding, and
    0.6 of the operations for 32 queries, 257 image tokens and heads of 64.
    """
    if (
        image.device.type != "cpu"
        or image.shape[0] != x.shape[0]
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return False
    for layer in layers:
        names, size = layer.spec.cross, layer.spec.head_dim
        if names is None:
            continue
        linears = [children.resolve(layer.module, path) for path in (names.key, names.value)]
        # Compare query_length * (keys + size) with keys * size, and leave a fifth for the smaller GEMMs.
        if (
            layer.state.options.level < 1
            or not all(children.readable_linear(linear) for linear in linears)
            or needs_graph(x, image, *(t for linear in linears for t in (linear.weight, linear.bias)))
            or attention_p(layer.module, names) > 0
            or 5 * query_length * (image.shape[1] + size) > 4 * image.shape[1] * size
        ):
            return False
    return True


def heads_of(x: Tensor, spec: QFormerLayerSpec) -> Tensor:
    """[..., heads * head_dim] -> [..., heads, head_dim], a view."""
    return x.unflatten(-1, (spec.heads, spec.head_dim))


def keys_values(image: Tensor, spec: QFormerLayerSpec) -> KeysValues:
    """A layer's slice of `project_images` as keys and values [I, M, heads, head_dim]."""
    return heads_of(image[..., : spec.width], spec), heads_of(image[..., spec.width :], spec)


def project(
    state: FusedState,
    name: Hashable,
    parts: Parts,
    linears: Sequence[nn.Module],
    stacks: Stacks | None,
    together: int = 1,
) -> tuple[Tensor, ...]:
    """The linears' outputs on all rows in one GEMM: views of one buffer, each of `together` neighbouring linears.

    Args:
        state: keeps the stacked weight, under `name`.
        parts: rows [B, S, D] each; where there are several, norms are pending.
        linears: readable ones.
        stacks: as in `LayerCall`.
    """
    weights = [linear.weight for linear in linears]
    sources = [*weights, *(linear.bias for linear in linears)]
    biases = None if all(bias is None for bias in sources[len(weights) :]) else sources[len(weights) :]
    sizes = [weight.shape[0] for weight in weights]
    sizes = [sum(sizes[i : i + together]) for i in range(0, len(sizes), together)]

    def stack() -> StackedWeight:
        whole = stack_weights(weights, biases)
        return StackedWeight(whole.weight, whole.bias, tuple(sizes))

    def pack() -> tuple[Tensor, Tensor | None]:
        whole = stack_weights(weights, biases)
        return pack_weight(whole.weight), whole.bias

    if children.serves_packed(state.packs, parts[0].values, *linears, names=[(name, children.PACKED)]):
        assert state.packs is not None
        return packed_linear(joined(parts), *state.packs.get((name, children.PACKED), sources, pack)).split(
            sizes, dim=-1
        )
    key = (id(state), name)
    if stacks is None:
        stacked = state.derived.get(name, sources, stack)
    else:
        if key not in stacks:
            stacks[key] = state.derived.get(name, sources, stack)
        stacked = stacks[key]
    if len(parts) == 1:
        return ops.stacked_linear(parts[0].values, stacked, norm=parts[0].norm)
    groups, count = [part.values for part in parts], len(parts)
    norms = [part.norm for part in parts]
    whole = ops.grouped_linear(groups, [stacked.weight] * count, [stacked.bias] * count, input_norms=norms)
    return whole.split(sizes, dim=-1)

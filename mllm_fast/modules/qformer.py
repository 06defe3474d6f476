"""The Q-Former: a BERT whose query rows also read an image (BLIP-2, arXiv 2301.12597, section 3.1).

    x = LN(x + W_o attention(x W_q, x W_k, x W_v))                   queries and text together
    q = LN(q + W_o' attention(q W_q', image W_k', image W_v'))       query rows, in every second layer
    q = LN(q + W_2q gelu(W_1q q)),  t = LN(t + W_2t gelu(W_1t t))    query and text rows, each their own network

What upstream computes again and again is computed once: the keys and values of all layers that read the image come from
one GEMM over the unique images, and rows find theirs by index; in the first layer, queries that the whole batch shares
are computed for one row; in the last layer, text rows that nobody reads are only keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels.attention import Mask
from ..kernels.linear import StackedWeight, pack_weight, packed_linear, stack_weights
from ..kernels.norm import Norm
from . import children
from .state import Derived, FusedState, needs_graph

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
KeysValues = tuple[Tensor, Tensor]
Stacks = dict[Hashable, StackedWeight]

# Above so many bytes the C library takes a tensor from the system each time, and zeroed pages cost more than one GEMM
# for all layers saves: on a CPU, inference then projects the image layer by layer.
LARGEST = 32 << 20


@dataclass(frozen=True)
class FfnNames:
    """Dotted paths of the children of one feed-forward network with its post-norm."""

    up: str
    down: str
    norm: str
    dropout: str


@dataclass(frozen=True)
class AttentionNames:
    """Dotted paths of the children of one attention branch with its post-norm.

    `module` holds `attention_dropout`, the dropout on the probabilities.
    """

    module: str
    query: str
    key: str
    value: str
    out: str
    norm: str
    dropout: str


@dataclass(frozen=True)
class QFormerLayerSpec:
    """What one layer computes.

    Attributes:
        heads, head_dim: of both attentions.
        activation: of both feed-forward networks, a name of `ops.norm_linear`.
        attention: self-attention of queries and text.
        cross: attention of the query rows to the image; None where the layer has none.
        query_ffn: network of the query rows.
        text_ffn: network of the text rows; None in a Q-Former that was built without.
    """

    heads: int
    head_dim: int
    activation: str
    attention: AttentionNames
    cross: AttentionNames | None
    query_ffn: FfnNames
    text_ffn: FfnNames | None

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What a forward pass tells its layers. Tensors that may need gradients are arguments of `run_layer` instead.

    Attributes:
        query_length: the first so many rows of a sequence are queries, the rest is text.
        mask: of the self-attention; None: everything is visible.
        image_mask: of the cross-attention; None: everything is visible.
        image_index: [B], the image that each batch row reads; None: images are shared by equally many neighbours.
        projected: whether the image comes as this layer's keys and values instead of features.
        absorbed: whether features are to be read without forming keys and values (`absorbs`).
        past: whether, in place of an image, keys and values come that the self-attention sees before its own.
        rows: how many rows of each sequence to return; None is all of them. Those left out are still keys and values.
        keep: return the self-attention's keys and values too.
        attend: takes the place of the self-attention's core: queries, keys and values [B, S, heads, head_dim] and dropout
            to [B, rows, heads, head_dim]. For keys that are cached.
        stacks: stacked weights that several passes of one step share; None: each call makes or finds its own.
    """

    query_length: int
    mask: Mask | None = None
    image_mask: Mask | None = None
    image_index: Tensor | None = None
    projected: bool = False
    absorbed: bool = False
    past: bool = False
    rows: int | None = None
    keep: bool = False
    attend: Attend | None = None
    stacks: Stacks | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a Q-Former: the module that holds its children, what it computes, and what it keeps."""

    module: nn.Module
    spec: QFormerLayerSpec
    state: FusedState = field(repr=False)


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
    parts = iter(_project(state, ("image", tuple(readable)), image, linears, stacks, together=2))
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
            or _attention_p(layer.module, names) > 0
            or 5 * query_length * (image.shape[1] + size) > 4 * image.shape[1] * size
        ):
            return False
    return True


def run_layer(layer: Layer, x: Tensor, source: Tensor | None, call: LayerCall) -> Tensor | tuple[Tensor, Tensor]:
    """One layer.

    Args:
        x: [B, S, D], queries first. A batch of stride 0 is one row that all share, and is computed once where that is
            exact.
        source: the image, [I, M, 2 * heads * head_dim] keys and values if `call.projected`, else [I, M, D_image] features;
            or, if `call.past`, [B, P, 2 * heads * head_dim]. None only where nothing reads it.

    Returns:
        [B, S or call.rows, D]; with `call.keep` also the keys and values, [B, S, 2 * heads * head_dim].
    """
    names, batch, length = layer.spec.attention, *x.shape[:2]
    count = length if call.rows is None else min(call.rows, length)
    if call.mask is None and call.attend is None and not call.past and _one_row(layer, x):
        x = x[:1]
    q, k, v = _self_projections(layer, x, count, call.stacks)
    attended = _self_attention(layer, q, k, v, source, call)
    x = _post_norm(layer, attended.flatten(-2), names, x[:, :count])
    queries, text = x[:, : call.query_length], x[:, call.query_length :]
    if layer.spec.cross is not None and call.query_length:
        queries = _cross_attention(layer, queries, source, call, batch)
    if call.query_length == 0:
        x = _ffn(layer, x, layer.spec.text_ffn)
    elif text.shape[1] == 0:
        x = _ffn(layer, queries, layer.spec.query_ffn)
    else:
        x = _both_ffns(layer, queries, text.expand(queries.shape[0], -1, -1))
    x = x.expand(batch, -1, -1)
    return (x, torch.cat((k.flatten(-2), v.flatten(-2)), dim=-1).expand(batch, -1, -1)) if call.keep else x


def _self_attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor, source: Tensor | None, call: LayerCall) -> Tensor:
    probability = _attention_p(layer.module, layer.spec.attention)
    if call.attend is not None:
        return call.attend(q, k, v, probability)
    extra_k, extra_v = keys_values(source, layer.spec) if call.past and source is not None else (None, None)
    return ops.attention(q, k, v, extra_k=extra_k, extra_v=extra_v, mask=call.mask, dropout_p=probability)


def _one_row(layer: Layer, x: Tensor) -> bool:
    """Whether all batch rows of x [B, S, D] are one row in memory, and stay equal: then it is computed for one."""
    return layer.state.options.level >= 1 and x.shape[0] > 1 and x.stride(0) == 0 and not _drops(layer)


def heads_of(x: Tensor, spec: QFormerLayerSpec) -> Tensor:
    """[..., heads * head_dim] -> [..., heads, head_dim], a view."""
    return x.unflatten(-1, (spec.heads, spec.head_dim))


def keys_values(image: Tensor, spec: QFormerLayerSpec) -> KeysValues:
    """A layer's slice of `project_images` as keys and values [I, M, heads, head_dim]."""
    return heads_of(image[..., : spec.width], spec), heads_of(image[..., spec.width :], spec)


def _self_projections(layer: Layer, x: Tensor, count: int, stacks: Stacks | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the first `count` rows, keys and values of all: [B, rows, heads, head_dim] each."""
    names, state = layer.spec.attention, layer.state
    linears = [children.resolve(layer.module, path) for path in (names.query, names.key, names.value)]
    parts: list[Tensor] = []
    if count < x.shape[1]:
        parts.append(children.norm_linear(x[:, :count], None, linears.pop(0), packs=state.packs))
    if all(children.readable_linear(linear) for linear in linears):
        # Queries are among the stacked or not, so the name tells how many are.
        parts += _project(state, ("self", len(linears)), x, linears, stacks)
    else:
        parts += [children.norm_linear(x, None, linear, packs=state.packs) for linear in linears]
    q, k, v = (heads_of(part, layer.spec) for part in parts)
    return q, k, v


def _cross_attention(layer: Layer, queries: Tensor, image: Tensor | None, call: LayerCall, batch: int) -> Tensor:
    """LN(queries + W_o attention(queries, image)) [B, Lq, D], from queries [B or 1, Lq, D]."""
    block, spec, names = layer.module, layer.spec, layer.spec.cross
    assert names is not None
    if image is None:
        raise ValueError("the Q-Former's queries read an image: pass encoder_hidden_states, the features of the images")
    packs = layer.state.packs
    q = heads_of(children.norm_linear(queries, None, children.resolve(block, names.query), packs=packs), spec)
    key, value = children.resolve(block, names.key), children.resolve(block, names.value)
    if call.absorbed:
        padding = None if call.image_mask is None else call.image_mask.key_padding
        q = q.expand(batch, -1, -1, -1)
        attended = ops.absorbed_attention(q, image, key.weight, value.weight, value.bias, key_padding=padding)
        return _post_norm(layer, attended.flatten(-2), names, queries.expand(batch, -1, -1))
    if call.projected:
        k, v = keys_values(image, spec)
    elif children.readable_linear(key) and children.readable_linear(value):
        k, v = keys_values(_project(layer.state, "image", image, (key, value), call.stacks, together=2)[0], spec)
    else:
        k, v = (heads_of(children.norm_linear(image, None, p, packs=packs), spec) for p in (key, value))
    attended = ops.attention(
        q.expand(batch, -1, -1, -1),
        k,
        v,
        mask=call.image_mask,
        kv_index=call.image_index,
        dropout_p=_attention_p(block, names),
    ).flatten(-2)
    return _post_norm(layer, attended, names, queries.expand(batch, -1, -1))


def _ffn(layer: Layer, x: Tensor, names: FfnNames | None) -> Tensor:
    if names is None:
        raise ValueError(
            "this Q-Former has no feed-forward network for text rows, but was given some; build it with "
            "use_qformer_text_input=True"
        )
    up = children.resolve(layer.module, names.up)
    hidden = children.norm_linear(x, None, up, activation=layer.spec.activation, packs=layer.state.packs)
    return _post_norm(layer, hidden, names, x)


def _both_ffns(layer: Layer, queries: Tensor, text: Tensor) -> Tensor:
    """The two feed-forward networks, into one tensor [B, Lq + T, D]."""
    block, spec = layer.module, layer.spec
    both = [spec.query_ffn, spec.text_ffn]
    read = [_read_ffn(block, names) for names in both if names is not None]
    drops = {_p(block, names.dropout) for names in both if names is not None}
    # Packed weights have no grouped form: one GEMM a group is what the op would do on a CPU anyway.
    if len(read) < 2 or None in read or len(drops) > 1 or layer.state.packs is not None:
        return torch.cat((_ffn(layer, queries, spec.query_ffn), _ffn(layer, text, spec.text_ffn)), dim=1)
    ups, downs, norms = zip(*read, strict=True)
    hidden = ops.grouped_linear(
        (queries, text), [up.weight for up in ups], [up.bias for up in ups], activation=spec.activation, joined=False
    )
    return ops.grouped_linear(
        hidden,
        [down.weight for down in downs],
        [down.bias for down in downs],
        residual=(queries, text),
        norms=norms,
        dropout_p=drops.pop(),
    )


def _read_ffn(block: nn.Module, names: FfnNames) -> tuple[nn.Linear, nn.Linear, Norm] | None:
    """The network's children where a kernel can read them all."""
    up, down, norm = (children.resolve(block, path) for path in (names.up, names.down, names.norm))
    read = children.read_norm(norm)
    if read is None or not (children.readable_linear(up) and children.readable_linear(down)):
        return None
    return up, down, read


def _post_norm(layer: Layer, x: Tensor, names: AttentionNames | FfnNames, residual: Tensor) -> Tensor:
    linear = children.resolve(layer.module, names.out if isinstance(names, AttentionNames) else names.down)
    norm = children.resolve(layer.module, names.norm)
    return linear_post_norm(
        x, linear, norm, residual, dropout_p=_p(layer.module, names.dropout), packs=layer.state.packs
    )


def linear_post_norm(
    x: Tensor,
    linear: nn.Module,
    norm: nn.Module,
    residual: Tensor,
    *,
    dropout_p: float = 0.0,
    packs: Derived | None = None,
) -> Tensor:
    """norm(residual + dropout(linear(x))), the post-norm edge of a BERT block; one op where both children can be read.

    Args:
        x: [..., K].
        residual: [..., N].
        dropout_p: 0 in evaluation.
        packs: keeps the linear's packed weight, where the model was fused with it.

    Returns:
        [..., N].
    """
    read, readable = children.read_norm(norm), children.readable_linear(linear)
    packed = packs is not None and readable and children.serves_packed(x, linear)
    if read is None or packed or not readable:
        y = children.norm_linear(x, None, linear, packs=packs)
        if read is not None:
            return ops.layer_norm(y, read.weight, read.bias, read.eps, residual=residual, dropout_p=dropout_p)
        return norm(residual + F.dropout(y, dropout_p, dropout_p > 0))
    return ops.linear_residual(x, linear.weight, linear.bias, residual=residual, norm=read, dropout_p=dropout_p)


def _p(block: nn.Module, path: str) -> float:
    """The probability of the dropout module at `path`, 0 in evaluation."""
    dropout = children.resolve(block, path)
    return float(dropout.p) if dropout.training else 0.0


def _attention_p(block: nn.Module, names: AttentionNames) -> float:
    """The dropout on the probabilities of an attention branch, 0 in evaluation."""
    attention = children.resolve(block, names.module)
    return float(attention.attention_dropout) if attention.training else 0.0


def _drops(layer: Layer) -> bool:
    """Whether any dropout of the layer is active, so that equal rows do not stay equal."""
    block, spec = layer.module, layer.spec
    branches = [names for names in (spec.attention, spec.cross, spec.query_ffn, spec.text_ffn) if names is not None]
    attentions = [names for names in branches if isinstance(names, AttentionNames)]
    return any(_p(block, names.dropout) for names in branches) or any(_attention_p(block, a) for a in attentions)


def _project(
    state: FusedState,
    name: Hashable,
    x: Tensor,
    linears: Sequence[nn.Module],
    stacks: Stacks | None,
    together: int = 1,
) -> tuple[Tensor, ...]:
    """The linears' outputs on x in one GEMM: views of one buffer, each of `together` neighbouring linears."""
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

    if state.packs is not None and children.serves_packed(x, *linears):
        return packed_linear(x, *state.packs.get((name, "packed"), sources, pack)).split(sizes, dim=-1)
    key = (id(state), name)
    if stacks is None:
        return ops.stacked_linear(x, state.derived.get(name, sources, stack))
    if key not in stacks:
        stacks[key] = state.derived.get(name, sources, stack)
    return ops.stacked_linear(x, stacks[key])

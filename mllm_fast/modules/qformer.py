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
from ..kernels.linear import StackedWeight, stack_weights
from ..kernels.norm import Norm
from . import children
from .state import FusedState

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
KeysValues = tuple[Tensor, Tensor]
Stacks = dict[Hashable, StackedWeight]


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
        rows: how many rows of each sequence to return; None is all of them. Those left out are still keys and values.
        stacks: stacked weights that several passes of one step share; None: each call makes or finds its own.
    """

    query_length: int
    mask: Mask | None = None
    image_mask: Mask | None = None
    image_index: Tensor | None = None
    projected: bool = False
    rows: int | None = None
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
        cross-attention and for those whose projections have to be called (LoRA, quantised, sharded): these are given the
        features.
    """
    names = [layer.spec.cross for layer in layers]
    pairs = [
        None if cross is None else [children.resolve(layer.module, path) for path in (cross.key, cross.value)]
        for layer, cross in zip(layers, names, strict=True)
    ]
    readable = [pair is not None and all(children.readable_linear(p) for p in pair) for pair in pairs]
    linears = [p for pair, read in zip(pairs, readable, strict=True) if read and pair is not None for p in pair]
    if not linears:
        return [None] * len(layers)
    whole = _stacked(state, "image", linears, stacks)
    joined = tuple(k + v for k, v in zip(whole.sizes[::2], whole.sizes[1::2], strict=True))
    parts = iter(ops.stacked_linear(image, StackedWeight(whole.weight, whole.bias, joined)))
    return [next(parts) if read else None for read in readable]


def run_layer(
    layer: Layer,
    x: Tensor,
    image: Tensor | None,
    call: LayerCall,
    attend: Attend | None = None,
    keep: list[KeysValues] | None = None,
) -> Tensor:
    """One layer.

    Args:
        x: [B, S, D], queries first. A batch of stride 0 is one row that all share, and is computed once where that is
            exact.
        image: [I, M, 2 * heads * head_dim] keys and values if `call.projected`, else [I, M, D_image] features; None only
            without queries, or in a layer without cross-attention.
        attend: what takes the place of the masked self-attention: queries, keys, values [B, S, heads, head_dim] and
            dropout to [B, rows, heads, head_dim]. For keys from elsewhere.
        keep: gets the keys and values of the self-attention appended, [B, S, heads, head_dim] each.

    Returns:
        [B, S or call.rows, D].
    """
    block, spec = layer.module, layer.spec
    batch, length = x.shape[:2]
    count = length if call.rows is None else min(call.rows, length)
    names = spec.attention
    probability = _attention_p(block, names)
    if call.mask is None and attend is None and _one_row(layer, x):
        x = x[:1]
    q, k, v = _self_projections(layer, x, count, call.stacks)
    if keep is not None:
        keep.append((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)))
    if attend is None:
        attended = ops.attention(q, k, v, mask=call.mask, dropout_p=probability)
    else:
        attended = attend(q, k, v, probability)
    x = _post_norm(block, attended.flatten(-2), names, x[:, :count], _p(block, names.dropout))
    queries, text = x[:, : call.query_length], x[:, call.query_length :]
    if spec.cross is not None and call.query_length:
        queries = _cross_attention(layer, queries, image, call, batch)
    if call.query_length == 0:
        x = _ffn(layer, x, spec.text_ffn)
    elif text.shape[1] == 0:
        x = _ffn(layer, queries, spec.query_ffn)
    else:
        x = _both_ffns(layer, queries, text.expand(queries.shape[0], -1, -1))
    return x.expand(batch, -1, -1)


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
    names = layer.spec.attention
    linears = [children.resolve(layer.module, path) for path in (names.query, names.key, names.value)]
    parts: list[Tensor] = []
    if count < x.shape[1]:
        parts.append(children.norm_linear(x[:, :count], None, linears.pop(0)))
    if all(children.readable_linear(linear) for linear in linears):
        # Queries are stacked too or not, so the name tells how many are.
        parts += ops.stacked_linear(x, _stacked(layer.state, ("self", len(linears)), linears, stacks))
    else:
        parts += [children.norm_linear(x, None, linear) for linear in linears]
    q, k, v = (heads_of(part, layer.spec) for part in parts)
    return q, k, v


def _cross_attention(layer: Layer, queries: Tensor, image: Tensor | None, call: LayerCall, batch: int) -> Tensor:
    """LN(queries + W_o attention(queries, image)) [B, Lq, D], from queries [B or 1, Lq, D]."""
    block, spec, names = layer.module, layer.spec, layer.spec.cross
    assert names is not None
    if image is None:
        raise ValueError("the Q-Former's queries read an image: pass encoder_hidden_states, the features of the images")
    q = heads_of(children.norm_linear(queries, None, children.resolve(block, names.query)), spec)
    if call.projected:
        k, v = keys_values(image, spec)
    else:
        k, v = (
            heads_of(children.norm_linear(image, None, children.resolve(block, path)), spec)
            for path in (names.key, names.value)
        )
    attended = ops.attention(
        q.expand(batch, -1, -1, -1),
        k,
        v,
        mask=call.image_mask,
        kv_index=call.image_index,
        dropout_p=_attention_p(block, names),
    ).flatten(-2)
    return _post_norm(block, attended, names, queries.expand(batch, -1, -1), _p(block, names.dropout))


def _ffn(layer: Layer, x: Tensor, names: FfnNames | None) -> Tensor:
    if names is None:
        raise ValueError(
            "this Q-Former has no feed-forward network for text rows, but was given some; build it with "
            "use_qformer_text_input=True"
        )
    block = layer.module
    hidden = children.norm_linear(x, None, children.resolve(block, names.up), activation=layer.spec.activation)
    return _post_norm(block, hidden, names, x, _p(block, names.dropout))


def _both_ffns(layer: Layer, queries: Tensor, text: Tensor) -> Tensor:
    """The two feed-forward networks, into one tensor [B, Lq + T, D]."""
    block, spec = layer.module, layer.spec
    both = [spec.query_ffn, spec.text_ffn]
    read = [_read_ffn(block, names) for names in both if names is not None]
    drops = {_p(block, names.dropout) for names in both if names is not None}
    if len(read) < 2 or None in read or len(drops) > 1:
        return torch.cat((_ffn(layer, queries, spec.query_ffn), _ffn(layer, text, spec.text_ffn)), dim=1)
    ups, downs, norms = zip(*read, strict=True)  # type: ignore[arg-type]
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


def _post_norm(
    block: nn.Module, x: Tensor, names: AttentionNames | FfnNames, residual: Tensor, dropout_p: float
) -> Tensor:
    path = names.out if isinstance(names, AttentionNames) else names.down
    return linear_post_norm(
        x, children.resolve(block, path), children.resolve(block, names.norm), residual, dropout_p=dropout_p
    )


def linear_post_norm(
    x: Tensor, linear: nn.Module, norm: nn.Module, residual: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    """norm(residual + dropout(linear(x))), the post-norm edge of a BERT block; one op where both children can be read.

    Args:
        x: [..., K]. residual: [..., N]. dropout_p: 0 in evaluation.

    Returns:
        [..., N].
    """
    read = children.read_norm(norm)
    if read is not None and children.readable_linear(linear):
        return ops.linear_residual(x, linear.weight, linear.bias, residual=residual, norm=read, dropout_p=dropout_p)
    y = F.dropout(linear(x), dropout_p, dropout_p > 0)
    return norm(residual + y)


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


def _stacked(state: FusedState, name: Hashable, linears: Sequence[nn.Module], stacks: Stacks | None) -> StackedWeight:
    """The linears' weights as one; kept until one of them changes, or in `stacks`."""
    key = (id(state), name)
    if stacks is not None and key in stacks:
        return stacks[key]
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    all_biases = None if all(bias is None for bias in biases) else biases
    stack = state.derived.get(name, [*weights, *biases], lambda: stack_weights(weights, all_biases))
    if stacks is not None:
        stacks[key] = stack
    return stack

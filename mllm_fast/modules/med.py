"""MED, BLIP's mixture of encoder and decoder (arXiv 2201.12086, section 3.1): one post-norm BERT layer in three roles.

    x = LN(x + W_o attention(x W_q, x W_k, x W_v))
    x = LN(x + W_o' attention(x W_q', image W_k', image W_v'))      # where there is an image
    x = LN(x + W_2 act(W_1 x))

The unimodal encoder runs it without an image, the image-grounded encoder with one, the image-grounded decoder with one and
with causal self-attention. The layer is written once, over child modules found by role; the families tell which child of an
upstream class plays which role.

The last norm of each step may be left pending (`rows`).

Images are read by row, not copied: text row b reads the image row b // (B / B_image), or the one that an index names, so
beams and the texts that are matched with one image share its keys and values. Those of all layers come from one GEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.attention import Mask, MediaRanges
from . import children
from .rows import Rows
from .state import FusedState, needs_graph

KeysValues = tuple[Tensor, Tensor]
MakeMask = Callable[[int], Mask | None]


@dataclass(frozen=True)
class AttentionNames:
    """Dotted paths of the children that play each role in one attention of a layer."""

    query: str
    key: str
    value: str
    dropout: str
    out: str
    out_dropout: str
    norm: str


@dataclass(frozen=True)
class MedLayerSpec:
    """What a layer computes.

    Attributes:
        heads, head_dim: of both attentions.
        activation: of the feed-forward network, a name of `ops.norm_linear`.
        self_attention, cross_attention: which child plays which role; the latter is None in a layer that reads no image.
        ffn_up, ffn_down, ffn_dropout, ffn_norm: paths of the feed-forward network's children.
    """

    heads: int
    head_dim: int
    activation: str
    self_attention: AttentionNames
    cross_attention: AttentionNames | None
    ffn_up: str
    ffn_down: str
    ffn_dropout: str
    ffn_norm: str


@dataclass(eq=False)
class MedPass:
    """What one forward pass of the model tells each of its layers.

    Attributes:
        mask: of the self-attention, made for the number of text rows that ask (where not all, then `rows` of them); None:
            all see all.
        image_mask: of the cross-attention, likewise.
        image_index: [B] int64, the image row that each text row reads; None: row b // (B / B_image).
        image_keys_values: keys and values of the image for each layer, [B_image, T, heads, head_dim]; None: they are in the
            cache, or the layer projects them itself.
        last: the last layer, the only one that may compute fewer rows.
        rows: the text rows that somebody reads of the last layer's output; None: all.
        defers: whether a layer but the last may hand on rows whose norm is pending.
    """

    mask: MakeMask | None = None
    image_mask: MakeMask | None = None
    image_index: Tensor | None = None
    image_keys_values: list[KeysValues] | None = None
    last: nn.Module | None = None
    rows: slice | None = None
    defers: bool = False


def self_attention(
    layer: nn.Module,
    spec: MedLayerSpec,
    state: FusedState,
    x: Rows,
    mask: Mask | None,
    *,
    extend: Callable[[Tensor, Tensor], KeysValues] | None = None,
    rows: slice | None = None,
) -> Rows:
    """LN(x + W_o attention(x, x)).

    Args:
        x: [B, L, D].
        mask: who sees what; rows that see nothing get 0 from the attention.
        extend: puts cached keys and values [B, *, heads, head_dim] in front of the new ones.
        rows: compute only these rows of the output; keys and values are those of all of x.

    Returns:
        [B, L or rows, D].
    """
    names = spec.self_attention
    query, key, value = (children.resolve(layer, path) for path in (names.query, names.key, names.value))
    x = _read_by(x, query, key, value)
    read = x if rows is None else x.of(x.values[:, rows])
    if rows is None:
        q, k, v = _project(state, "self", x, (query, key, value))
    else:
        q = children.norm_linear(read.values, read.norm, query, packs=state.packs)
        k, v = _project(state, "self k, v", x, (key, value))
    q, k, v = (t.unflatten(-1, (spec.heads, spec.head_dim)) for t in (q, k, v))
    if extend is not None:
        k, v = extend(k, v)
    attended = ops.attention(q, k, v, mask=mask, dropout_p=_dropout(layer, names.dropout))
    return _add_and_norm(layer, state, attended.flatten(-2), names.out, names.out_dropout, names.norm, read)


def cross_attention(
    layer: nn.Module,
    spec: MedLayerSpec,
    state: FusedState,
    x: Rows,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    image_index: Tensor | None = None,
) -> Rows:
    """LN(x + W_o attention(x, image)).

    Args:
        x: [B, L, D] text.
        k, v: [B_image, T, heads, head_dim]; see `ops.attention` for how text rows find their image.

    Returns:
        [B, L, D].
    """
    names = spec.cross_attention
    assert names is not None, "a layer without cross-attention was given an image"
    query = children.resolve(layer, names.query)
    x = _read_by(x, query)
    q = children.norm_linear(x.values, x.norm, query, packs=state.packs)
    q = q.unflatten(-1, (spec.heads, spec.head_dim))
    attended = ops.attention(q, k, v, mask=mask, kv_index=image_index, dropout_p=_dropout(layer, names.dropout))
    return _add_and_norm(layer, state, attended.flatten(-2), names.out, names.out_dropout, names.norm, x)


def feed_forward(layer: nn.Module, spec: MedLayerSpec, state: FusedState, x: Rows) -> Rows:
    """LN(x + W_2 act(W_1 x)), x [..., D]."""
    up = children.resolve(layer, spec.ffn_up)
    x = _read_by(x, up)
    hidden = children.norm_linear(x.values, x.norm, up, activation=spec.activation, packs=state.packs)
    return _add_and_norm(layer, state, hidden, spec.ffn_down, spec.ffn_dropout, spec.ffn_norm, x)


def image_keys_values(
    layers: Sequence[tuple[nn.Module, MedLayerSpec]],
    state: FusedState,
    image: Tensor,
    *,
    reused: bool = False,
    keep: bool = False,
) -> list[KeysValues]:
    """Keys and values of the image for each layer, one GEMM for all projections that can be read.

    Args:
        layers: each layer with its spec; their heads agree.
        state: of the module that owns the layers; it keeps the stacked weights.
        image: [B_image, T, D_image].
        reused: they will be read at many steps, and are worth a layout in which the tokens of a head are neighbours.
        keep: hand out the same tensors again while the image and the weights stay the same.

    Returns:
        for each layer keys and values [B_image, T, heads, head_dim].
    """
    paths = [(layer, spec.cross_attention) for layer, spec in layers]
    flat = [children.resolve(layer, path) for layer, names in paths if names for path in (names.key, names.value)]
    shape = (layers[0][1].heads, layers[0][1].head_dim)

    def project(image: Tensor) -> list[Tensor]:
        if state.options.level == 0:
            parts = [children.norm_linear(image, None, p) for p in flat]
        else:
            parts = project_stacked(state, "image", Rows(image), flat)
        return [part.unflatten(-1, shape) for part in parts]

    weights = children.weights_of(flat)
    if (not reused and not keep) or weights is None or needs_graph(image, *weights[0]):
        parts = project(image)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def project_in_order(image: Tensor) -> KeysValues:
        parts = [part.transpose(1, 2) for part in project(image.squeeze(1))]
        return torch.stack(parts[::2]), torch.stack(parts[1::2])

    image = image.unsqueeze(1)
    if keep:
        keys, values = state.shared.keys_values(("image", id(state)), image, weights, project_in_order)
    else:
        keys, values = project_in_order(image)
    return [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(keys, values, strict=True)]


def own_image_keys_values(layer: nn.Module, spec: MedLayerSpec, image: Tensor) -> KeysValues:
    """Keys and values of the image [B_image, T, D_image] for one layer alone, [B_image, T, heads, head_dim] each."""
    names = spec.cross_attention
    assert names is not None, "a layer without cross-attention was given an image"
    k, v = (children.norm_linear(image, None, children.resolve(layer, path)) for path in (names.key, names.value))
    return k.unflatten(-1, (spec.heads, spec.head_dim)), v.unflatten(-1, (spec.heads, spec.head_dim))


def project_stacked(state: FusedState, name: Hashable, x: Rows, linears: Sequence[nn.Module]) -> list[Tensor]:
    """The output of each linear on x: one GEMM for all that can be read, a call for each of the others."""
    x = _read_by(x, *linears)
    readable = [children.readable_linear(linear) for linear in linears]
    together = [linear for linear, read in zip(linears, readable, strict=True) if read]
    if len(together) < 2:
        return [children.norm_linear(x.values, x.norm, linear) for linear in linears]
    weights, biases = [linear.weight for linear in together], [linear.bias for linear in together]
    bias = None if all(b is None for b in biases) else biases
    # The pattern of readable ones is part of the name: a LoRA that comes and goes must not meet the other's weights.
    stacked = state.derived.get((name, tuple(readable)), [*weights, *biases], lambda: ops.stack_weights(weights, bias))
    outputs = iter(ops.stacked_linear(x.values, stacked, norm=x.norm))
    return [next(outputs) if read else linear(x.values) for linear, read in zip(linears, readable, strict=True)]


def visible_mask(visible: Tensor | None, queries: int, keys: int, *, causal: bool = False) -> Mask | None:
    """The mask of `queries` rows over `keys` keys, [B, keys] of which `visible` shows; None where all is seen.

    Upstream adds the lowest number of the type to the scores of hidden keys. A row that sees nothing, such as one of left
    padding, thereby attends to all keys alike, hidden ones too. Such rows do so here, but no gradient flows through their
    scores (upstream's goes through an addition that rounding undid).
    """
    decode = causal and queries == 1
    causal = causal and not decode
    if visible is None:
        return Mask(causal=True) if causal else None
    if visible.device.type != "cpu" or torch.compiler.is_compiling():
        # Nothing is read back from a device. A decode step sees its own token at least.
        blind = None if decode else _blind_rows(visible, queries, keys, causal)
    elif bool(visible.all()):
        return Mask(causal=True) if causal else None
    else:
        blind = _blind_rows(visible, queries, keys, causal)
        blind = blind if bool(blind.any()) else None
    if blind is None:
        return Mask(key_padding=visible, causal=causal)
    # One image of all keys, so that a kernel's blocks of keys are as wide as without it: rows either see it or lie beyond.
    first = blind.long()
    everything = MediaRanges(first, first + 1, 1, keys, beyond="mean")
    return Mask(key_padding=visible, causal=causal, media=everything)


def _blind_rows(visible: Tensor, queries: int, keys: int, causal: bool) -> Tensor:
    """Which rows see no key at all, [B, queries] bool."""
    if causal:
        return visible.cumsum(1)[:, keys - queries :] == 0
    return (~visible.any(1, keepdim=True)).expand(-1, queries)


def _read_by(x: Rows, *linears: nn.Module) -> Rows:
    """x with no norm pending, unless all of these can apply it."""
    return x if x.norm is None or all(map(children.readable_linear, linears)) else Rows(x.normalized())


def _project(state: FusedState, name: str, x: Rows, linears: Sequence[nn.Module]) -> list[Tensor]:
    """The output of each linear on x, in one GEMM where that costs no copy of the weights at every call."""
    if state.options.level == 0 or state.packs is not None or torch.compiler.is_compiling():
        together = False
    else:
        together = all(map(children.readable_linear, linears)) and not needs_graph(
            *(t for linear in linears for t in (linear.weight, linear.bias))
        )
    if together:
        return project_stacked(state, name, x, linears)
    return [children.norm_linear(x.values, x.norm, linear, packs=state.packs) for linear in linears]


def _dropout(layer: nn.Module, path: str) -> float:
    dropout = children.resolve(layer, path)
    assert isinstance(dropout, nn.Dropout)
    return dropout.p if dropout.training else 0.0


def _add_and_norm(
    layer: nn.Module, state: FusedState, x: Tensor, out: str, dropout: str, norm: str, residual: Rows
) -> Rows:
    """norm(residual + dropout(out(x))); the norm may be left pending."""
    return children.linear_post_norm(
        x,
        children.resolve(layer, out),
        children.resolve(layer, norm),
        residual,
        dropout_p=_dropout(layer, dropout),
        packs=state.packs,
        defer=state.options.level >= 1,
    )

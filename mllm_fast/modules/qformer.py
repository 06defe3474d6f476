"""The Q-Former: a BERT whose query rows also read an image (BLIP-2, arXiv 2301.12597, section 3.1).

    x = LN(x + W_o attention(x W_q, x W_k, x W_v))                   queries and text together
    q = LN(q + W_o' attention(q W_q', image W_k', image W_v'))       query rows, in every second layer
    q = LN(q + W_2q gelu(W_1q q)),  t = LN(t + W_2t gelu(W_1t t))    query and text rows, each their own network

What upstream computes again and again is computed once: the keys and values of all layers that read the image come from
one GEMM over the unique images, and rows find theirs by index; in the first layer, queries that the whole batch shares
are computed for one row; in the last layer, text rows that nobody reads are only keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.norm import Norm
from . import children
from .qformer_projections import heads_of, keys_values, project
from .qformer_spec import AttentionNames, FfnNames, Layer, LayerCall, Stacks, attention_p, dropout_p, drops
from .rows import Parts, Rows, defers_norm, joined


def run_layer(
    layer: Layer, x: Tensor | Parts, source: Tensor | None, call: LayerCall
) -> Tensor | Parts | tuple[Tensor | Parts, Tensor]:
    """One layer.

    Args:
        x: [B, S, D], queries first; or what another layer handed out with `call.defers`. A batch of stride 0 is one row
            that all share, and is computed once where that is exact.
        source: the image, [I, M, 2 * heads * head_dim] keys and values if `call.projected`, else [I, M, D_image] features;
            or, if `call.past`, [B, P, 2 * heads * head_dim]. None only where nothing reads it.

    Returns:
        [B, S or call.rows, D]; with `call.defers` as rows whose norms may be pending; with `call.keep` also the keys and
        values, [B, S, 2 * heads * head_dim].
    """
    parts = (Rows(x),) if isinstance(x, Tensor) else x
    names, batch = layer.spec.attention, parts[0].values.shape[0]
    length = sum(part.length for part in parts)
    count = length if call.rows is None else min(call.rows, length)
    if call.mask is None and call.attend is None and not call.past and _one_row(layer, parts):
        parts = tuple(part.of(part.values[:1]) for part in parts)
    q, k, v, parts = _self_projections(layer, parts, count, call.stacks)
    attended = _self_attention(layer, q, k, v, source, call)
    rows = _post_norm_parts(layer, attended.flatten(-2), names, _first(parts, count))
    queries = rows.of(rows.values[:, : call.query_length])
    text = rows.of(rows.values[:, call.query_length :])
    if layer.spec.cross is not None and call.query_length:
        queries = _cross_attention(layer, queries, source, call, batch)
    if call.query_length == 0:
        parts = (_ffn(layer, rows, layer.spec.text_ffn),)
    elif text.length == 0:
        parts = (_ffn(layer, queries, layer.spec.query_ffn),)
    else:
        parts = _both_ffns(layer, queries, text.of(text.values.expand(queries.values.shape[0], -1, -1)))
    parts = tuple(part.of(part.values.expand(batch, -1, -1)) for part in parts)
    out = parts if call.defers else joined(parts)
    return (out, torch.cat((k.flatten(-2), v.flatten(-2)), dim=-1).expand(batch, -1, -1)) if call.keep else out


def _one_row(layer: Layer, parts: Parts) -> bool:
    """Whether all batch rows [B, S, D] are one row in memory, and stay equal: then it is computed for one."""
    if layer.state.options.level < 1:
        return False
    return all(p.values.shape[0] > 1 and p.values.stride(0) == 0 for p in parts) and not drops(layer)


def _first(parts: Parts, count: int) -> Parts:
    """The first `count` rows of each sequence."""
    if len(parts) > 1 and count == parts[0].length:
        return parts[:1]
    return parts if count == sum(part.length for part in parts) else (Rows(joined(parts)[:, :count]),)


def _self_projections(
    layer: Layer, parts: Parts, count: int, stacks: Stacks | None
) -> tuple[Tensor, Tensor, Tensor, Parts]:
    """Queries of the first `count` rows, keys and values of all, [B, rows, heads, head_dim] each; and the rows.

    Those have no norm pending any more if the projections could not apply it.
    """
    names, state = layer.spec.attention, layer.state
    linears = [children.resolve(layer.module, path) for path in (names.query, names.key, names.value)]
    readable = all(children.readable_linear(linear) for linear in linears)
    whole = count == sum(part.length for part in parts)
    if not readable or not (whole or len(parts) == 1 or count == parts[0].length):
        parts = (Rows(joined(parts)),)
    outputs: list[Tensor] = []
    if not whole:
        rows = parts[0].values[:, :count]
        outputs.append(children.norm_linear(rows, parts[0].norm, linears.pop(0), packs=state.packs))
    if readable:
        # Queries are among the stacked or not, so the name tells how many are.
        outputs += project(state, ("self", len(linears)), parts, linears, stacks)
    else:
        outputs += [children.norm_linear(parts[0].values, None, linear, packs=state.packs) for linear in linears]
    q, k, v = (heads_of(output, layer.spec) for output in outputs)
    return q, k, v, parts


def _self_attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor, source: Tensor | None, call: LayerCall) -> Tensor:
    probability = attention_p(layer.module, layer.spec.attention)
    if call.attend is not None:
        return call.attend(q, k, v, probability)
    extra_k, extra_v = keys_values(source, layer.spec) if call.past and source is not None else (None, None)
    return ops.attention(q, k, v, extra_k=extra_k, extra_v=extra_v, mask=call.mask, dropout_p=probability)


def _cross_attention(layer: Layer, queries: Rows, image: Tensor | None, call: LayerCall, batch: int) -> Rows:
    """LN(queries + W_o attention(queries, image)) [B, Lq, D], from queries [B or 1, Lq, D]."""
    block, spec, names = layer.module, layer.spec, layer.spec.cross
    assert names is not None
    if image is None:
        raise ValueError("the Q-Former's queries read an image: pass encoder_hidden_states, the features of the images")
    packs, linear = layer.state.packs, children.resolve(block, names.query)
    if not children.readable_linear(linear):
        queries = Rows(queries.normalized())
    q = heads_of(children.norm_linear(queries.values, queries.norm, linear, packs=packs), spec)
    queries = queries.of(queries.values.expand(batch, -1, -1))
    rows = q.shape[1]
    if call.sequences is not None:
        q = q.reshape(call.sequences, -1, spec.heads, spec.head_dim)
        batch = call.sequences
    key, value = children.resolve(block, names.key), children.resolve(block, names.value)
    if call.absorbed:
        padding = None if call.image_mask is None else call.image_mask.key_padding
        q = q.expand(batch, -1, -1, -1)
        attended = ops.absorbed_attention(q, image, key.weight, value.weight, value.bias, key_padding=padding)
        return _post_norm(layer, attended.flatten(-2), names, queries)
    if call.projected:
        k, v = keys_values(image, spec)
    elif children.readable_linear(key) and children.readable_linear(value):
        both = project(layer.state, "image", (Rows(image),), (key, value), call.stacks, together=2)
        k, v = keys_values(both[0], spec)
    else:
        k, v = (heads_of(children.norm_linear(image, None, p, packs=packs), spec) for p in (key, value))
    attended = ops.attention(
        q.expand(batch, -1, -1, -1),
        k,
        v,
        mask=call.image_mask,
        kv_index=call.image_index,
        dropout_p=attention_p(block, names),
    )
    return _post_norm(layer, attended.reshape(-1, rows, spec.width), names, queries)


def _ffn(layer: Layer, x: Rows, names: FfnNames | None) -> Rows:
    if names is None:
        raise ValueError(
            "this Q-Former has no feed-forward network for text rows, but was given some; build it with "
            "use_qformer_text_input=True"
        )
    up = children.resolve(layer.module, names.up)
    if not children.readable_linear(up):
        x = Rows(x.normalized())
    hidden = children.norm_linear(x.values, x.norm, up, activation=layer.spec.activation, packs=layer.state.packs)
    return _post_norm(layer, hidden, names, x)


def _both_ffns(layer: Layer, queries: Rows, text: Rows) -> Parts:
    """The two feed-forward networks [B, Lq, D] and [B, T, D]: one tensor of both, or a part each with its norm pending."""
    block, spec = layer.module, layer.spec
    both = [spec.query_ffn, spec.text_ffn]
    read = [_read_ffn(block, names) for names in both if names is not None]
    drops = {dropout_p(block, names.dropout) for names in both if names is not None}
    # Packed weights have no grouped form: one GEMM a group is what the op would do on a CPU anyway.
    if len(read) < 2 or None in read or len(drops) > 1 or layer.state.packs is not None:
        return _ffn(layer, queries, spec.query_ffn), _ffn(layer, text, spec.text_ffn)
    ups, downs, norms = zip(*read, strict=True)
    groups, pending = (queries.values, text.values), (queries.norm, text.norm)
    hidden = ops.grouped_linear(
        groups,
        [up.weight for up in ups],
        [up.bias for up in ups],
        activation=spec.activation,
        input_norms=pending,
        joined=False,
    )
    sources = [
        t for down, norm in zip(downs, norms, strict=True) for t in (down.weight, down.bias, norm.weight, norm.bias)
    ]
    deferred = _defers(layer) and drops == {0.0} and defers_norm(hidden[0], hidden[1], *groups, *sources)
    outputs = ops.grouped_linear(
        hidden,
        [down.weight for down in downs],
        [down.bias for down in downs],
        residual=groups,
        residual_norms=pending,
        norms=None if deferred else norms,
        dropout_p=drops.pop(),
        joined=not deferred,
    )
    if not deferred:
        return (Rows(outputs),)
    return tuple(Rows(values, norm) for values, norm in zip(outputs, norms, strict=True))


def _read_ffn(block: nn.Module, names: FfnNames) -> tuple[nn.Linear, nn.Linear, Norm] | None:
    """The network's children where a kernel can read them all."""
    up, down, norm = (children.resolve(block, path) for path in (names.up, names.down, names.norm))
    read = children.read_norm(norm)
    if read is None or not (children.readable_linear(up) and children.readable_linear(down)):
        return None
    return up, down, read


def _defers(layer: Layer) -> bool:
    """Whether the layer may leave norms pending: the order of rounding changes."""
    return layer.state.options.level >= 1


def _post_norm_parts(layer: Layer, x: Tensor, names: AttentionNames, residual: Parts) -> Rows:
    """`_post_norm` of several parts, x [B, sum of S, K]: in one launch where that leaves the norm pending."""
    if len(residual) == 1:
        return _post_norm(layer, x, names, residual[0])
    linear, norm = (children.resolve(layer.module, path) for path in (names.out, names.norm))
    read, count = children.read_norm(norm), len(residual)
    sources = [] if read is None else [read.weight, read.bias, *(part.values for part in residual)]
    if (
        read is None
        or not children.readable_linear(linear)
        or dropout_p(layer.module, names.dropout) > 0
        or not defers_norm(x, linear.weight, linear.bias, *sources)
    ):
        return _post_norm(layer, x, names, Rows(joined(residual)))
    values = ops.grouped_linear(
        x,
        [linear.weight] * count,
        [linear.bias] * count,
        sizes=[part.length for part in residual],
        residual=[part.values for part in residual],
        residual_norms=[part.norm for part in residual],
    )
    return Rows(values, read)


def _post_norm(layer: Layer, x: Tensor, names: AttentionNames | FfnNames, residual: Rows) -> Rows:
    """norm(residual + dropout(linear(x))); the norm may be left pending."""
    linear = children.resolve(layer.module, names.out if isinstance(names, AttentionNames) else names.down)
    return children.linear_post_norm(
        x,
        linear,
        children.resolve(layer.module, names.norm),
        residual,
        dropout_p=dropout_p(layer.module, names.dropout),
        packs=layer.state.packs,
        defer=_defers(layer),
    )

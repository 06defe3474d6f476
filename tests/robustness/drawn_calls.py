"""Calls of every public op, drawn: lengths 0, 1 and primes, strides of every kind, masks that hide everything.

Each strategy gives a `Call`: our op, its peer, and what draws their inputs in a dtype. The peers are those of the ops'
own tests. What lies between the elements of a strided input is NaN, so that an op that reads it is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast import ops
from tests.kernels import (
    test_absorbed_attention,
    test_attention,
    test_attention_media,
    test_gated_residual,
    test_grouped_linear,
    test_linear,
    test_norm,
    test_splice,
    test_stacked,
)
from tests.kernels.attention_dense import dense_attention
from tests.kernels.op_checks import Inputs, Op
from tests.kernels.quantized_weights import definition, mapped_weight, ours, weight_4bit, weight_8bit

BEYOND = 10**6  # no index or label is so large
LAYOUTS = ("contiguous", "transposed", "columns", "every other row", "one row for all")
layouts = st.sampled_from(LAYOUTS)
leading = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3).map(tuple)


@dataclass(frozen=True)
class Call:
    """One call: `inputs(dtype)` draws new values of the same shapes and strides each time."""

    ours: Op
    theirs: Op
    inputs: Callable[[torch.dtype], Inputs]


def arranged(x: Tensor, layout: str) -> Tensor:
    """`x` in other strides; for "one row for all" its first row, with stride 0."""
    if x.ndim == 0 or layout == "contiguous":
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    filling = torch.nan if x.is_floating_point() else BEYOND if x.dtype != torch.bool else True
    if layout == "columns":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), filling)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "every other row":
        wide = x.new_full((2 * x.shape[0], *x.shape[1:]), filling)
        wide[::2] = x
        return wide[::2]
    return x[:1].expand_as(x)


def strided(names: tuple[str, ...], draw: st.DrawFn, values: Callable[[], Inputs]) -> Callable[[torch.dtype], Inputs]:
    """What draws `values()` in a dtype, the tensors of these names each in a layout of its own."""
    chosen = {name: draw(layouts, label=f"layout of {name}") for name in names}

    def inputs(dtype: torch.dtype) -> Inputs:
        drawn = {name: t.to(dtype) if t.is_floating_point() else t for name, t in values().items()}
        return {name: arranged(t, chosen.get(name, "contiguous")) for name, t in drawn.items()}

    return inputs


@st.composite
def norms(draw: st.DrawFn, kind: str) -> Call:
    shape, residual = (*draw(leading), draw(st.sampled_from([3, 7, 13, 32]))), draw(st.booleans())
    inputs = strided(
        ("x", "residual"), draw, lambda: test_norm.draw_inputs(*shape, bias=kind == "layer_norm", residual=residual)
    )
    if kind == "layer_norm":
        return Call(ops.layer_norm, test_norm.their_layer_norm, inputs)
    return Call(ops.rms_norm, test_norm.their_rms_norm, inputs)


@st.composite
def gated_residuals(draw: st.DrawFn) -> Call:
    shape = (*draw(leading), draw(st.sampled_from([1, 2, 7, 32])))
    gate, masked = draw(st.sampled_from(test_gated_residual.GATES)), draw(st.sampled_from(["no", "some", "all"]))
    gate = "[D]" if len(shape) < 3 and gate == "[1, 1, D]" else gate

    def values() -> Inputs:
        drawn = test_gated_residual.draw_inputs(*shape, gate=gate, masked=masked != "no")
        return drawn | ({"row_mask": torch.zeros(shape[:-1], dtype=torch.bool)} if masked == "all" else {})

    return Call(
        ops.gated_residual, test_gated_residual.upstream, strided(("residual", "branch", "row_mask"), draw, values)
    )


@st.composite
def norm_linears(draw: st.DrawFn) -> Call:
    norm = draw(st.sampled_from([None, "layer_norm", "rms_norm"]))
    activation = draw(st.sampled_from(list(test_linear.UPSTREAM_ACTIVATIONS)))
    rows, k = draw(leading), draw(st.sampled_from([7, 13, 32] if norm else [1, 2, 7, 32]))
    n, bias = draw(st.sampled_from([1, 3, 11, 16])), draw(st.booleans())

    def values() -> Inputs:
        drawn = test_linear.draw_linear(rows, k, n, bias=bias, norm=norm)
        if activation in test_linear.GATED:
            drawn |= {"gate_weight": torch.randn(n, k) * k**-0.5} | ({"gate_bias": torch.randn(n)} if bias else {})
        return drawn

    return Call(*test_linear.norm_linear_pair(norm, activation), strided(("x", "weight", "gate_weight"), draw, values))


@st.composite
def linear_residuals(draw: st.DrawFn) -> Call:
    rows, k, n = draw(leading), draw(st.sampled_from([1, 7, 32])), draw(st.sampled_from([3, 11, 16]))
    gate, masked, bias = draw(st.sampled_from(["no", "scalar", "vector"])), draw(st.booleans()), draw(st.booleans())

    def values() -> Inputs:
        drawn = test_linear.draw_linear(rows, k, n, bias=bias) | {"residual": torch.randn(*rows, n)}
        drawn |= {} if gate == "no" else {"gate": torch.randn(n if gate == "vector" else 1)}
        return drawn | ({"row_mask": torch.rand(rows) < 0.5} if masked else {})

    return Call(*test_linear.linear_residual_pair(), strided(("x", "weight", "residual"), draw, values))


@st.composite
def stacked_linears(draw: st.DrawFn) -> Call:
    family = draw(st.sampled_from(["layer_norm", "rms_norm"]))
    parts = [test_stacked.SCALE, test_stacked.PLAIN, test_stacked.NOTHING]
    parts += [test_stacked.FULL, test_stacked.SHIFT] if family == "layer_norm" else []
    kinds = draw(st.tuples(*[st.sampled_from(parts)] * 3))
    biases, rows = draw(st.tuples(*[st.booleans()] * 3)), draw(leading)
    k = draw(st.sampled_from([7, 16]))
    names = ("x", "weight0", "weight1", "weight2")
    return Call(
        *test_stacked.pair(kinds, family),
        strided(names, draw, lambda: test_stacked.draw_layers(kinds, biases, k, rows)),
    )


@st.composite
def grouped_linears(draw: st.DrawFn) -> Call:
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any).map(tuple))
    k, n, batch = draw(st.integers(1, 9)), draw(st.integers(3, 9)), draw(st.integers(0, 3))
    split, activation = draw(st.booleans()), draw(st.sampled_from([None, "gelu", "relu", "quick_gelu"]))
    if draw(st.booleans()):
        pair = test_grouped_linear.first_half(sizes, activation, split), test_grouped_linear.plain(sizes, activation)
    else:
        pair = test_grouped_linear.second_half(sizes, split), test_grouped_linear.plain(sizes)
    residual = pair[0].__qualname__.startswith("second_half")
    names = ("x", "residual", "w0", "w1", "w2")
    return Call(*pair, strided(names, draw, lambda: test_grouped_linear.draw(sizes, k, n, batch, residual)))


@st.composite
def absorbed_attentions(draw: st.DrawFn) -> Call:
    batch, queries, keys = draw(st.sampled_from([1, 2, 5])), draw(st.integers(1, 5)), draw(st.integers(1, 13))
    heads, size, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 5])), draw(st.sampled_from([3, 13, 16]))
    padding = torch.rand(batch, keys, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) < 0.5
    padding[:, -1] = True
    given: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.3]))}
    if draw(st.booleans()):
        given["key_padding"] = padding

    shared = draw(st.booleans())  # one row of queries for the whole batch, expanded

    def call(attention: Op) -> Op:
        return lambda q, **inputs: attention(q.expand(batch, -1, -1, -1), **inputs, **given)

    def values() -> Inputs:
        drawn = test_absorbed_attention.draw(batch, queries, keys, heads, size, width)
        return drawn | ({"q": drawn["q"][:1]} if shared else {})

    inputs = strided(("x", "key_weight", "value_weight"), draw, values)
    return Call(call(ops.absorbed_attention), call(test_absorbed_attention.formed), inputs)


@st.composite
def attentions(draw: st.DrawFn, media: bool) -> Call:
    """The calls of attention's own tests, whose leaves have the strides that models produce."""
    batch, leaves, settings = None, [], {}  # type: ignore[var-annotated]
    if media:
        leaves, settings = draw(test_attention_media.media_calls())
    else:
        batch, leaves, settings = draw(test_attention.calls())
    names = ("q", "k", "v", "extra_k", "extra_v")[: len(leaves)]

    def inputs(dtype: torch.dtype) -> Inputs:
        drawn = {}
        for name, leaf in zip(names, leaves, strict=True):
            whole = 1 + sum((n - 1) * step for n, step in zip(leaf.shape, leaf.stride(), strict=True))
            storage = torch.full((whole if leaf.numel() else 0,), torch.nan, dtype=dtype)
            drawn[name] = storage.as_strided(leaf.shape, leaf.stride()).normal_()
        return drawn

    def call(attention: Any, q: Tensor, k: Tensor, v: Tensor, **extra: Tensor) -> Tensor:
        return attention(q if batch is None else q.expand(batch, -1, -1, -1), k, v, **extra, **settings)

    def theirs(**inputs: Tensor) -> Tensor:
        # Gradients of 0 for what nobody reads.
        return call(dense_attention, **inputs) + 0 * sum(x.sum() for x in inputs.values())

    return Call(lambda **inputs: call(ops.attention, **inputs), theirs, inputs)


@st.composite
def splices(draw: st.DrawFn) -> Call:
    case = draw(test_splice.splices())
    kept = {name: case[name] for name in ("index", "ids") if case[name] is not None}

    def values() -> Inputs:
        return {name: torch.randn(case[name].shape) for name in ("text", "features")} | kept

    return Call(test_splice.as_op, test_splice.gather, strided(("text", "features"), draw, values))


@st.composite
def cross_entropies(draw: st.DrawFn) -> Call:
    """The head is fixed and holds numbers that every dtype has: only the hidden states get a gradient."""
    rows, classes, width = draw(leading), draw(st.sampled_from([1, 2, 37])), draw(st.sampled_from([1, 7, 16]))
    supervised = draw(st.sampled_from([0.0, 0.4, 1.0]))
    options: dict[str, Any] = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "reduction": "sum" if supervised < 1 or 0 in rows else draw(st.sampled_from(["sum", "mean"])),
    }
    softcap = draw(st.sampled_from([None, 2.0]))
    weight = arranged(torch.randn(classes, width).bfloat16().half().double(), draw(layouts))
    bias = torch.randn(classes).bfloat16().half().double() if draw(st.booleans()) else None

    def head(dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def mine(hidden: Tensor, labels: Tensor) -> Tensor:
        w, b = head(hidden.dtype)
        return ops.frozen_cross_entropy(hidden, w, labels, bias=b, softcap=softcap, **options)

    def theirs(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, *head(hidden.dtype))
        logits = logits if hidden.dtype == torch.float64 else logits.float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.reshape(-1, classes), labels.flatten(), **options)

    def values() -> Inputs:
        labels = torch.where(torch.rand(rows) < supervised, torch.randint(classes, rows), -100)
        return {"hidden": torch.randn(*rows, width), "labels": labels}

    return Call(mine, theirs, strided(("hidden", "labels"), draw, values))


@st.composite
def quantized_weights(draw: st.DrawFn) -> Any:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    kind = draw(st.sampled_from(["nf4", "fp4", "nested", "any map", "int8"]))
    if kind == "int8":
        return weight_8bit(rows, columns)
    if kind == "any map":
        return mapped_weight(rows, columns, draw(st.sampled_from([2, 32, 64])))
    return weight_4bit(rows, columns, "fp4" if kind == "fp4" else "nf4", 64, kind == "nested")


@st.composite
def quantized_linears(draw: st.DrawFn) -> Call:
    weight, rows, rank = draw(quantized_weights()), draw(leading), draw(st.sampled_from([0, 0, 3]))
    width, columns = weight.shape

    def theirs(x: Tensor, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        y = F.linear(x, definition(weight, x.dtype), bias)
        return y if a is None or b is None else y + 0.5 * F.linear(F.linear(x, a), b)

    def values() -> Inputs:
        drawn = {"x": torch.randn(*rows, columns), "bias": torch.randn(width)}
        if rank:
            drawn |= {"a": torch.randn(rank, columns) * columns**-0.5, "b": torch.randn(width, rank)}
        return drawn

    return Call(ours(weight), theirs, strided(("x", "a", "b"), draw, values))


CALLS: dict[str, st.SearchStrategy[Call]] = {
    "layer_norm": norms("layer_norm"),
    "rms_norm": norms("rms_norm"),
    "gated_residual": gated_residuals(),
    "norm_linear": norm_linears(),
    "linear_residual": linear_residuals(),
    "stacked_linear": stacked_linears(),
    "grouped_linear": grouped_linears(),
    "attention": attentions(media=False),
    "attention of media": attentions(media=True),
    "absorbed_attention": absorbed_attentions(),
    "splice_rows": splices(),
    "frozen_cross_entropy": cross_entropies(),
    "quantized_linear": quantized_linears(),
}

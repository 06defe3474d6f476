"""grouped_linear against a linear layer for each group and their concatenation, as a Q-Former layer does it upstream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerLayer

from mllm_fast.kernels import runtime
from mllm_fast.kernels.linear import ACTIVATIONS, grouped_linear
from mllm_fast.kernels.norm import Norm
from tests.kernels.op_checks import Inputs, check_exact, check_low_precision, check_pure

Op = Callable[..., Tensor]


def draw(sizes: tuple[int, ...], k: int = 6, n: int = 9, batch: int = 2, residual: bool = False) -> Inputs:
    inputs = {"x": torch.randn(batch, sum(sizes), k)}
    for i in range(len(sizes)):
        inputs |= {f"w{i}": torch.randn(n, k) / k**0.5, f"b{i}": torch.randn(n)}
        if residual:
            inputs |= {f"g{i}": torch.randn(n), f"s{i}": torch.randn(n)}
    return inputs | ({"residual": torch.randn(batch, sum(sizes), n)} if residual else {})


def first_half(sizes: tuple[int, ...], activation: str | None, split: bool) -> Op:
    def op(x: Tensor, **p: Tensor) -> Tensor:
        count = len(sizes)
        weights, biases = [p[f"w{i}"] for i in range(count)], [p[f"b{i}"] for i in range(count)]
        groups = x.split(sizes, dim=1) if split else x
        given = None if split else sizes
        return grouped_linear(groups, weights, biases, sizes=given, activation=activation)

    return op


def second_half(sizes: tuple[int, ...], split: bool) -> Op:
    def op(x: Tensor, residual: Tensor, **p: Tensor) -> Tensor:
        count = len(sizes)
        norms = [Norm("layer_norm", p[f"g{i}"], p[f"s{i}"], 1e-12) for i in range(count)]
        weights, biases = [p[f"w{i}"] for i in range(count)], [p[f"b{i}"] for i in range(count)]
        rows = (x.split(sizes, 1), residual.split(sizes, 1)) if split else (x, residual)
        given = None if split else sizes
        return grouped_linear(rows[0], weights, biases, sizes=given, residual=rows[1], norms=norms)

    return op


def plain(sizes: tuple[int, ...], activation: str | None = None) -> Op:
    """Slice, compute, concatenate."""

    def op(x: Tensor, residual: Tensor | None = None, **p: Tensor) -> Tensor:
        parts, start = [], 0
        for i, size in enumerate(sizes):
            y = F.linear(x[:, start : start + size], p[f"w{i}"], p[f"b{i}"])
            if activation is not None:
                y = ACTIVATIONS[activation](y)
            if residual is not None:
                y = F.layer_norm(residual[:, start : start + size] + y, y.shape[-1:], p[f"g{i}"], p[f"s{i}"], 1e-12)
            parts.append(y)
            start += size
        return torch.cat(parts, 1)

    return op


@pytest.mark.parametrize("sizes", [(4,), (3, 5), (1, 1), (2, 0), (0, 3), (2, 3, 4)])
@pytest.mark.parametrize("split", [False, True])
def test_equals_the_definition_in_fp64(sizes: tuple[int, ...], split: bool) -> None:
    for activation in (None, "gelu", "relu", "quick_gelu"):
        check_exact(first_half(sizes, activation, split), plain(sizes, activation), draw(sizes))
    check_exact(second_half(sizes, split), plain(sizes), draw(sizes, residual=True))


@settings(max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_any_sizes(sizes: list[int], k: int, n: int, batch: int) -> None:
    if sum(sizes) == 0:
        sizes[0] = 1
    inputs = draw(tuple(sizes), k, n, batch)
    check_exact(first_half(tuple(sizes), "gelu", False), plain(tuple(sizes), "gelu"), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    sizes = (4, 7)
    check_low_precision(first_half(sizes, "gelu", True), plain(sizes, "gelu"), lambda: draw(sizes, 40, 24), dtype)
    check_low_precision(
        second_half(sizes, True), plain(sizes), lambda: draw(sizes, 40, 24, residual=True), dtype, draws=6
    )


def deferred(sizes: tuple[int, ...]) -> Op:
    """Both linear layers of a feed-forward network whose post-norms are left to the readers."""

    def op(x: Tensor, **p: Tensor) -> Tensor:
        count = len(sizes)
        norms = [Norm("layer_norm", p[f"g{i}"], p[f"s{i}"], 1e-12) for i in range(count)]
        ups, downs = ([p[f"{name}{i}"] for i in range(count)] for name in ("w", "v"))
        hidden = grouped_linear(x, ups, sizes=sizes, activation="gelu", input_norms=norms)
        return grouped_linear(hidden, downs, sizes=sizes, residual=x, residual_norms=norms)

    return op


def undeferred(sizes: tuple[int, ...]) -> Op:
    def op(x: Tensor, **p: Tensor) -> Tensor:
        parts = []
        for i, rows in enumerate(x.split(sizes, 1)):
            rows = F.layer_norm(rows, rows.shape[-1:], p[f"g{i}"], p[f"s{i}"], 1e-12)
            parts.append(rows + F.linear(F.gelu(F.linear(rows, p[f"w{i}"])), p[f"v{i}"]))
        return torch.cat(parts, 1)

    return op


def draw_deferred(sizes: tuple[int, ...], k: int) -> Inputs:
    inputs = {"x": torch.randn(2, sum(sizes), k) + 1}
    for i in range(len(sizes)):
        inputs |= {f"w{i}": torch.randn(2 * k, k) / k**0.5, f"v{i}": torch.randn(k, 2 * k) / k}
        inputs |= {f"g{i}": torch.randn(k), f"s{i}": torch.randn(k)}
    return inputs


@pytest.mark.parametrize("sizes", [(3, 5), (0, 2), (2, 1, 4)])
def test_deferred_post_norms(sizes: tuple[int, ...]) -> None:
    check_exact(deferred(sizes), undeferred(sizes), draw_deferred(sizes, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deferred_post_norms_low_precision(dtype: torch.dtype) -> None:
    check_low_precision(deferred((4, 7)), undeferred((4, 7)), lambda: draw_deferred((4, 7), 32), dtype)


def test_two_calls_are_the_networks_of_a_qformer_layer() -> None:
    config = Blip2QFormerConfig(
        hidden_size=24, num_attention_heads=4, intermediate_size=40, use_qformer_text_input=True
    )
    layer = Blip2QFormerLayer(config, 0).double().eval()
    x = torch.randn(3, 9, 24, dtype=torch.float64)
    expected = torch.cat((layer.feed_forward_chunk_query(x[:, :4]), layer.feed_forward_chunk(x[:, 4:])), 1)
    ups, downs = [layer.intermediate_query.dense, layer.intermediate.dense], [layer.output_query, layer.output]
    groups = x.split((4, 5), 1)
    hidden = grouped_linear(groups, [u.weight for u in ups], [u.bias for u in ups], activation="gelu", joined=False)
    assert [h.shape for h in hidden] == [(3, 4, 40), (3, 5, 40)]
    ours = grouped_linear(
        hidden,
        [d.dense.weight for d in downs],
        [d.dense.bias for d in downs],
        residual=groups,
        norms=[Norm("layer_norm", d.LayerNorm.weight, d.LayerNorm.bias, d.LayerNorm.eps) for d in downs],
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_dropout_is_a_function_of_the_seed() -> None:
    inputs = draw((3, 4), residual=True)
    x, residual = inputs.pop("x"), inputs.pop("residual")
    weights = [inputs["w0"], inputs["w1"]]

    def run(seed: int | None, p: float = 0.5) -> Tensor:
        return grouped_linear(x, weights, sizes=(3, 4), residual=residual, dropout_p=p, seed=seed)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(None), run(None))
    torch.testing.assert_close(run(1, 1.0), residual)
    dropped = (run(1) - residual == 0).float().mean()
    assert 0.3 < dropped < 0.7


def test_strides_autocast_compile_and_names() -> None:
    sizes, inputs = (3, 4), draw((3, 4))
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    check_pure(first_half(sizes, "gelu", True), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert first_half(sizes, "gelu", True)(**inputs).dtype == torch.bfloat16
    compiled = torch.compile(first_half(sizes, "gelu", True), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), first_half(sizes, "gelu", True)(**inputs))
    assert "grouped_linear" in {op.name for op in runtime.ops()}


def test_errors() -> None:
    x, w = torch.randn(2, 5, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="say with sizes how many rows"):
        grouped_linear(x, [w, w])
    with pytest.raises(ValueError, match=r"shape \(2, 5, 4\), but sizes is \[2, 4\]"):
        grouped_linear(x, [w, w], sizes=(2, 4))
    with pytest.raises(ValueError, match="x has 2 groups, but there are 1 weights"):
        grouped_linear(x, [w], sizes=(2, 3))
    with pytest.raises(ValueError, match="the same number of output features"):
        grouped_linear(x, [w, w[:2]], sizes=(2, 3))
    with pytest.raises(ValueError, match="group 1: weight has shape"):
        grouped_linear(x, [w, w[:, :3]], sizes=(2, 3))
    with pytest.raises(ValueError, match="activation is 'swiglu'"):
        grouped_linear(x, [w, w], sizes=(2, 3), activation="swiglu")
    with pytest.raises(ValueError, match="belong to a residual"):
        grouped_linear(x, [w, w], sizes=(2, 3), dropout_p=0.5)
    residual = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="excludes residual"):
        grouped_linear(x, [w, w], sizes=(2, 3), residual=residual, activation="gelu")
    with pytest.raises(ValueError, match="belong to a residual"):
        grouped_linear(x, [w, w], sizes=(2, 3), residual_norms=[None, Norm("rms_norm")])
    with pytest.raises(ValueError, match=r"group 1: x has shape \(2, 3, 4\)"):
        grouped_linear(x, [w, w], sizes=(2, 3), input_norms=[None, Norm("rms_norm", torch.ones(3))])
    with pytest.raises(ValueError, match="2 norms, 1 input_norms and 2 residual_norms"):
        grouped_linear(x, [w, w], sizes=(2, 3), input_norms=[None])
    with pytest.raises(ValueError, match="group 0: residual has shape"):
        grouped_linear(x, [w, w], sizes=(2, 3), residual=residual[..., :2])
    with pytest.raises(ValueError, match="x has 2 groups, but residual has 1"):
        grouped_linear(x.split((2, 3), 1), [w, w], residual=(residual[:, :2],))
    with pytest.raises(ValueError, match=r"have \[2, 3\] rows, but sizes is \[3, 2\]"):
        grouped_linear(x.split((2, 3), 1), [w, w], sizes=(3, 2))
    with pytest.raises(ValueError, match="dropout_p must lie in"):
        grouped_linear(x, [w, w], sizes=(2, 3), residual=residual, dropout_p=2.0)

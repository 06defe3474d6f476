"""stack_weights and stacked_linear against one norm and one linear for each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_flamingo.src.helpers import PerceiverAttention
from torch import Tensor

from mllm_fast.kernels.linear import StackedWeight, stack_weights, stacked_linear
from mllm_fast.kernels.norm import Norm
from tests.kernels.op_checks import CountOps, Inputs, check_exact, check_low_precision, check_pure, leaves

LOW = [torch.bfloat16, torch.float16]
SIZES = (5, 3, 8)
# What stands before each of the three layers: nothing, or a norm, with an affine part or without.
FULL, SCALE, SHIFT, PLAIN, NOTHING = "scale and shift", "scale", "shift", "affine-free", "no norm"


def draw_layers(
    kinds: tuple[str, ...], biases: tuple[bool, ...] = (False, True, False), k: int = 7, rows: tuple[int, ...] = (2, 4)
) -> Inputs:
    inputs = {"x": torch.randn(*rows, k) + 0.5}
    for i, (kind, bias, size) in enumerate(zip(kinds, biases, SIZES, strict=True)):
        inputs[f"weight{i}"] = torch.randn(size, k) * k**-0.5
        if bias:
            inputs[f"bias{i}"] = torch.randn(size)
        if kind in (FULL, SCALE):
            inputs[f"gain{i}"] = torch.randn(k)
        if kind in (FULL, SHIFT):
            inputs[f"shift{i}"] = torch.randn(k)
    return inputs


def norm_of(kind: str, family: str, i: int, kw: dict[str, Tensor]) -> Norm | None:
    return None if kind == NOTHING else Norm(family, kw.get(f"gain{i}"), kw.get(f"shift{i}"), 1e-5)  # type: ignore[arg-type]


def stack(kinds: tuple[str, ...], family: str, kw: dict[str, Tensor]) -> StackedWeight:
    layers = range(len(kinds))
    return stack_weights(
        [kw[f"weight{i}"] for i in layers],
        [kw.get(f"bias{i}") for i in layers],
        [norm_of(kind, family, i, kw) for i, kind in enumerate(kinds)],
    )


def pair(kinds: tuple[str, ...], family: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Stacked, and layer by layer; a layer without a norm reads the normalised x as it is, like an affine-free one."""

    def ours(x: Tensor, **kw: Tensor) -> tuple[Tensor, ...]:
        return stacked_linear(x, stack(kinds, family, kw), norm=Norm(family, eps=1e-5))  # type: ignore[arg-type]

    def theirs(x: Tensor, **kw: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for i in range(len(kinds)):
            gain, shift = kw.get(f"gain{i}"), kw.get(f"shift{i}")
            if family == "layer_norm":
                normed = F.layer_norm(x, x.shape[-1:], gain, shift, 1e-5)
            else:
                normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
                normed = normed if gain is None else normed * gain
            outputs.append(F.linear(normed, kw[f"weight{i}"], kw.get(f"bias{i}")))
        return tuple(outputs)

    return ours, theirs


LAYER_NORMS = [(FULL, FULL, FULL), (FULL, NOTHING, SCALE), (SHIFT, PLAIN, FULL), (NOTHING, NOTHING, NOTHING)]
RMS_NORMS = [(SCALE, SCALE, SCALE), (SCALE, NOTHING, PLAIN)]
CASES = [("layer_norm", kinds) for kinds in LAYER_NORMS] + [("rms_norm", kinds) for kinds in RMS_NORMS]


@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize(("family", "kinds"), CASES)
def test_equals_layer_by_layer_in_fp64(family: str, kinds: tuple[str, ...], biases: tuple[bool, ...]) -> None:
    for rows in [(2, 4), (1,), (0, 3)]:
        check_exact(*pair(kinds, family), draw_layers(kinds, biases, rows=rows))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("family", "kinds"), CASES)
def test_low_precision(family: str, kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    check_low_precision(*pair(kinds, family), lambda: draw_layers(kinds, k=64, rows=(4, 16)), dtype)


def test_media_keys_and_values_of_a_perceiver_resampler() -> None:
    layers = [PerceiverAttention(dim=24, dim_head=4, heads=2).double() for _ in range(3)]
    for layer in layers:
        layer.norm_media.weight.data.normal_()
        layer.norm_media.bias.data.normal_()
    media = torch.randn(2, 9, 24, dtype=torch.float64)
    theirs = [layer.to_kv(layer.norm_media(media)) for layer in layers]
    norms = [Norm("layer_norm", layer.norm_media.weight, layer.norm_media.bias, 1e-5) for layer in layers]
    stacked = stack_weights([layer.to_kv.weight for layer in layers], None, norms)
    ours = stacked_linear(media, stacked, norm=Norm("layer_norm", eps=1e-5))
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_fold_are_the_formulas() -> None:
    inputs = leaves(draw_layers((FULL, FULL, FULL), (True, True, True)), torch.float64)
    stacked = stack((FULL, FULL, FULL), "layer_norm", inputs)
    assert stacked.bias is not None
    d_weight, d_bias = torch.randn_like(stacked.weight), torch.randn_like(stacked.bias)
    torch.autograd.backward((stacked.weight, stacked.bias), (d_weight, d_bias))
    for i, (dw, db) in enumerate(zip(d_weight.split(SIZES), d_bias.split(SIZES), strict=True)):
        weight, gain, shift, bias = (inputs[f"{name}{i}"] for name in ("weight", "gain", "shift", "bias"))
        torch.testing.assert_close(weight.grad, dw * gain + torch.outer(db, shift))
        torch.testing.assert_close(gain.grad, (dw * weight).sum(0))
        torch.testing.assert_close(shift.grad, weight.t() @ db)
        torch.testing.assert_close(bias.grad, db)


@pytest.mark.parametrize("norm_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", LOW)
def test_fold_is_rounded_once(dtype: torch.dtype, norm_dtype: torch.dtype | None) -> None:
    inputs = {name: t.to(dtype) for name, t in draw_layers((FULL, FULL, FULL), k=96).items()}
    for name in inputs:
        if name.startswith(("gain", "shift")) and norm_dtype is not None:
            inputs[name] = torch.randn(96).to(norm_dtype)
    exact = stack((FULL, FULL, FULL), "layer_norm", {name: t.double() for name, t in inputs.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which must not lower the fold
        ours = stack((FULL, FULL, FULL), "layer_norm", inputs)
    assert ours.bias is not None
    assert exact.bias is not None
    assert ours.weight.dtype == ours.bias.dtype == dtype
    step = torch.finfo(dtype).eps / 2
    for mine, reference in ((ours.weight, exact.weight), (ours.bias, exact.bias)):
        assert ((mine.double() - reference).abs() <= 1.01 * step * reference.abs() + 1e-5).all()


def test_a_bias_is_made_only_where_one_is_needed() -> None:
    def bias_of(kinds: tuple[str, ...], family: str, biases: tuple[bool, ...]) -> Tensor | None:
        return stack(kinds, family, draw_layers(kinds, biases)).bias

    none = (False, False, False)
    assert bias_of((SCALE, SCALE, SCALE), "rms_norm", none) is None
    assert bias_of((SCALE, NOTHING, PLAIN), "layer_norm", none) is None
    assert bias_of((FULL, NOTHING, PLAIN), "layer_norm", none) is not None
    partial = bias_of((NOTHING, NOTHING, NOTHING), "layer_norm", (False, True, False))
    assert partial is not None
    assert (partial[:5] == 0).all()
    assert (partial[8:] == 0).all()


def test_one_gemm_one_norm_and_views_of_one_buffer() -> None:
    inputs = draw_layers((FULL, FULL, FULL))
    stacked = stack((FULL, FULL, FULL), "layer_norm", inputs)
    with torch.no_grad(), CountOps() as mode:
        outputs = stacked_linear(inputs["x"], stacked, norm=Norm("layer_norm"))
    assert mode.counts["native_layer_norm"] == 1
    assert mode.counts["addmm"] + mode.counts["mm"] == 1
    assert [o.shape for o in outputs] == [(2, 4, n) for n in SIZES]
    for output in outputs:
        assert output.untyped_storage().data_ptr() == outputs[0].untyped_storage().data_ptr()
        assert output.stride() == (4 * 16, 16, 1)


def test_stacked_weight_shares_no_memory_and_writes_nothing() -> None:
    for kinds in ((NOTHING, NOTHING, NOTHING), (FULL, PLAIN, SCALE)):

        def op(kinds: tuple[str, ...] = kinds, **kw: Tensor) -> tuple[Tensor, ...]:
            stacked = stack(kinds, "layer_norm", kw)
            assert stacked.bias is not None
            return stacked.weight, stacked.bias

        check_pure(op, draw_layers(kinds))
    weight = torch.randn(3, 4)
    assert stack_weights([weight]).weight.data_ptr() != weight.data_ptr()


def test_without_a_norm() -> None:
    x, weights = torch.randn(2, 3, 4), [torch.randn(5, 4), torch.randn(1, 4)]
    for mine, weight in zip(stacked_linear(x, stack_weights(weights)), weights, strict=True):
        torch.testing.assert_close(mine, F.linear(x, weight))


@settings(max_examples=30)
@given(
    rows=st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3).map(tuple),
    k=st.sampled_from([1, 2, 7, 16]),
    kinds=st.tuples(*[st.sampled_from([FULL, SCALE, SHIFT, PLAIN, NOTHING])] * 3),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_stack(rows: tuple[int, ...], k: int, kinds: tuple[str, ...], biases: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    check_exact(*pair(kinds, "layer_norm"), draw_layers(kinds, biases, k, rows))


def test_errors_name_what_was_wrong() -> None:
    weight, x = torch.randn(6, 8), torch.randn(2, 3, 8)
    cases: list[tuple[Any, str]] = [
        (lambda: stack_weights([]), "at least one weight"),
        (lambda: stack_weights([weight, weight], [None]), "2 weights, 1 biases and 2 norms"),
        (
            lambda: stack_weights([weight, weight[:, :7]]),
            r"weight 1 has shape \(6, 7\), but weight 0 has shape \(6, 8\)",
        ),
        (lambda: stack_weights([weight, weight.double()]), "weight 1 is torch.float64, but weight 0 is torch.float32"),
        (lambda: stack_weights([weight], [torch.ones(8)]), r"bias 0 has shape \(8,\), but weight 0 has shape \(6, 8\)"),
        (
            lambda: stack_weights([weight], None, [Norm("rms_norm", torch.ones(6))]),
            r"norm weight has shape \(6,\), but weight 0 has shape \(6, 8\)",
        ),
        (
            lambda: stack_weights([weight, weight], None, [Norm("rms_norm", eps=1e-5), Norm("layer_norm", eps=1e-5)]),
            "must agree in kind and eps",
        ),
        (
            lambda: stack_weights([weight, weight], None, [Norm("rms_norm", eps=1e-5), Norm("rms_norm", eps=1e-6)]),
            "must agree in kind and eps",
        ),
        (lambda: stacked_linear(x[..., :7], stack_weights([weight])), r"stacked weight has shape \(6, 8\), but x has"),
        (
            lambda: stacked_linear(x, stack_weights([weight]), norm=Norm("rms_norm", torch.ones(6))),
            r"norm weight has shape \(6,\)",
        ),
        (lambda: StackedWeight(weight, None, (3, 4)), r"sizes \(3, 4\) add up to 7, but weight has shape \(6, 8\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

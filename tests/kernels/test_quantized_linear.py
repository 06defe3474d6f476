"""quantized_linear on CPUs: against bitsandbytes' own bits, against the definition in fp64, and in 16 bit."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels.quantized_linear import (
    Lora,
    Weight4bit,
    Weight8bit,
    decode,
    dequantize,
    quantized_linear,
    reference,
)
from mllm_fast.kernels.quantized_linear.lowrank import LowRank
from tests.kernels.op_checks import check_exact, check_low_precision
from tests.kernels.quantized_weights import (
    WEIGHTS,
    definition,
    inputs,
    mapped_weight,
    ours,
    quantized,
    weight_4bit,
    weight_8bit,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
Weight = Weight4bit | Weight8bit


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels and steps of so few elements that the small weights of tests have several."""
    monkeypatch.setattr(reference, "PANEL", 2048)
    monkeypatch.setattr(reference, "LEAST_PANEL", 512)
    monkeypatch.setattr(decode, "STEP", 384)
    monkeypatch.setattr(reference, "FEW_ROWS", 8)


class TestDequantize:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize(
        ("rows", "columns", "blocksize"), [(1, 64, 64), (300, 128, 64), (96, 256, 32), (7, 1024, 1024)]
    )
    def test_bits_of_bitsandbytes(
        self, rows: int, columns: int, blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype
    ) -> None:
        weight, packed, state = quantized(rows, columns, quant_type, blocksize, nested, dtype)
        assert torch.equal(dequantize(weight, dtype), bnb.dequantize_4bit(packed, state))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bits_of_bitsandbytes_int8(self, dtype: torch.dtype) -> None:
        weight = weight_8bit(45, 67)
        theirs = bnb.int8_vectorwise_dequant(weight.values, weight.scale).to(dtype)
        assert torch.equal(dequantize(weight, dtype), theirs)

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("name", WEIGHTS)
    @pytest.mark.usefixtures("small_panels")
    def test_definition(self, name: str, dtype: torch.dtype) -> None:
        weight = WEIGHTS[name]()
        assert torch.equal(dequantize(weight, dtype), definition(weight, dtype))

    def test_blocks_that_straddle_rows_are_those_that_were_quantised(self) -> None:
        # bitsandbytes 0.50 on a CPU takes other scales for such rows, and is off by 0.25.
        original = torch.randn(33, 96)
        packed, state = bnb.quantize_4bit(original, blocksize=64, quant_type="nf4")
        weight = Weight4bit(packed.flatten(), state.absmax, state.code, 64, (33, 96))
        assert (dequantize(weight, torch.float32) - original).norm() < 0.1 * original.norm()

    def test_other_dtypes_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="int32"):
            dequantize(weight_8bit(3, 4), torch.int32)


def peer(weight: Weight) -> Callable[..., Tensor]:
    """The definition, on the inputs of `ours`: in each dtype with the weight rounded to that dtype."""

    def call(x: Tensor, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        y = F.linear(x, definition(weight, x.dtype), bias)
        return y + 0.5 * F.linear(F.linear(x, a), b) if a is not None and b is not None else y

    return call


@pytest.mark.usefixtures("small_panels")
class TestProductAndGradients:
    @pytest.mark.parametrize("name", WEIGHTS)
    @pytest.mark.parametrize("rows", [(), (1,), (3, 5), (2, 20)], ids=str)
    @pytest.mark.parametrize("rank", [0, 3])
    def test_exact_in_fp64(self, name: str, rows: tuple[int, ...], rank: int) -> None:
        weight = WEIGHTS[name]()
        check_exact(ours(weight), peer(weight), inputs(weight, rows, rank))

    @settings(max_examples=25)
    @given(st.data())
    def test_exact_for_drawn_shapes(self, data: st.DataObject) -> None:
        rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 200))
        blocksize = data.draw(st.sampled_from([2, 32, 64, 128]))
        if data.draw(st.booleans()):
            weight: Weight = mapped_weight(rows, columns, blocksize)
        else:
            weight = weight_8bit(rows, columns)
        x = inputs(weight, (data.draw(st.integers(0, 12)),), data.draw(st.integers(0, 4)))
        check_exact(ours(weight), peer(weight), x)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", WEIGHTS)
    @pytest.mark.parametrize("rows", [1, 7, 40])
    def test_no_less_accurate_than_the_dequantised_product(self, name: str, dtype: torch.dtype, rows: int) -> None:
        weight = WEIGHTS[name]()
        rank = 4 if rows == 7 else 0
        check_low_precision(ours(weight), peer(weight), lambda: inputs(weight, (rows,), rank), dtype, draws=3)

    @pytest.mark.parametrize("rows", [2, 40])
    def test_int8_in_fp16_neither_overflows_nor_underflows(self, rows: int) -> None:
        # As products with the bare integers would, and gradients times the bare scales.
        weight = weight_8bit(64, 512)
        x = torch.full((rows, 512), 200.0).half().requires_grad_()
        y = quantized_linear(x, weight)
        grad = torch.full_like(y, 1e-4)
        y.backward(grad)
        assert (127 * 200.0 * weight.values.double().sum(1)).abs().max() > torch.finfo(torch.float16).max
        exact = (x.detach().double() @ definition(weight).T, grad.double() @ definition(weight))
        for mine, theirs in zip((y, x.grad), exact, strict=True):
            assert mine is not None
            assert (mine.double() - theirs).norm() <= 2e-3 * theirs.norm()

    def test_strided_and_expanded_rows(self) -> None:
        weight = weight_4bit(48, 128)
        wide = torch.randn(4, 300, dtype=torch.float64)
        for x in (wide[:, 5:133], wide[:, :256:2], wide[:1, :128].expand(6, -1), torch.randn(128, 3).double().T):
            torch.testing.assert_close(quantized_linear(x, weight), F.linear(x, definition(weight)))

    @pytest.mark.parametrize("offset", [1, 4, 16])
    def test_odd_addresses(self, offset: int) -> None:
        # Where torch's own int8 product would crash.
        weight = weight_8bit(40, 128)
        values = torch.empty(40 * 128 + offset, dtype=torch.int8)[offset:].view(40, 128).copy_(weight.values)
        x = torch.randn(3 * 128 + offset).bfloat16()[offset:].view(3, 128)
        for moved in (weight, Weight8bit(values, weight.scale)):
            for placed in (x, x.clone()):
                exact = placed.double() @ definition(weight).T
                assert (quantized_linear(placed, moved).double() - exact).norm() <= 4e-3 * exact.norm()

    def test_bias_of_another_dtype(self) -> None:
        weight, bias = weight_4bit(48, 128), torch.randn(48, requires_grad=True)
        x = torch.randn(5, 128, dtype=torch.bfloat16)
        y = quantized_linear(x, weight, bias)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert bias.grad is not None and bias.grad.dtype == torch.float32
        assert torch.equal(bias.grad, torch.full((48,), 5.0))

    def test_lora_in_its_own_dtype(self) -> None:
        weight = weight_4bit(48, 128)
        drawn = inputs(weight, (6,), 4)
        a, b = (drawn[name].requires_grad_() for name in ("a", "b"))
        x = drawn["x"].bfloat16().requires_grad_()
        y = quantized_linear(x, weight, lora=Lora(a, b, 2.0))
        y.backward(torch.ones_like(y))
        exact = F.linear(x.double(), definition(weight)) + 2.0 * F.linear(F.linear(x.double(), a.double()), b.double())
        assert y.dtype == x.dtype
        assert (y.double() - exact).norm() < 4e-3 * exact.norm()
        found = torch.autograd.grad(exact.sum(), (x, a, b))
        for mine, theirs in zip((x.grad, a.grad, b.grad), found, strict=True):
            assert mine is not None and mine.dtype == theirs.dtype
            assert (mine - theirs).norm() < 4e-3 * theirs.norm()


class TestAgainstBitsandbytes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("rows", [1, 16, 100])
    def test_linear4bit(self, rows: int, nested: bool, dtype: torch.dtype) -> None:
        weight, packed, state = quantized(160, 256, "nf4", 64, nested, dtype)
        exact_weight = definition(weight, dtype).double()
        x, grad = torch.randn(rows, 256, dtype=dtype), torch.randn(rows, 160, dtype=dtype)
        exact = (x.double() @ exact_weight.T, grad.double() @ exact_weight)
        errors = []
        for call in (
            lambda t: quantized_linear(t, weight),
            lambda t: bitsandbytes.matmul_4bit(t, packed.t(), state),
        ):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.backward(grad)
            assert leaf.grad is not None
            errors.append([(t.double() - e).norm() / e.norm() for t, e in zip((y, leaf.grad), exact, strict=True)])
        for mine, theirs in zip(*errors, strict=True):
            assert mine <= 2 * theirs + 1e-7

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("threshold", [0.0, 2.5, 100.0])
    @pytest.mark.parametrize("rows", [1, 9])
    @pytest.mark.parametrize("biased", [False, True])
    def test_bits_of_llm_int8(self, rows: int, threshold: float, biased: bool, dtype: torch.dtype) -> None:
        weight = weight_8bit(48, 64)
        x, bias = torch.randn(rows, 64, dtype=dtype), torch.randn(48, dtype=dtype) if biased else None
        if rows > 1:
            x[1] = 0.0
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB, state.is_training, state.has_fp16_weights = weight.values, weight.scale, False, False
        state.threshold = threshold
        theirs = bitsandbytes.matmul(x.clone(), weight.values, bias=bias, state=state, threshold=threshold)
        kept = x.clone()
        assert torch.equal(quantized_linear(x, weight, bias, outliers="llm_int8", threshold=threshold), theirs)
        assert torch.equal(x, kept)

    def test_llm_int8_has_the_gradient_of_the_dequantised_product(self) -> None:
        weight = weight_8bit(48, 64)
        x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
        quantized_linear(x, weight, outliers="llm_int8").sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(5, 48, dtype=torch.float64) @ definition(weight))

    def test_gradients_flow_after_a_call_in_evaluation(self) -> None:
        weight = weight_4bit(64, 128)
        x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
        with torch.inference_mode():
            quantized_linear(torch.randn(3, 128, dtype=torch.bfloat16), weight)
        quantized_linear(x, weight).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


class TestDropout:
    def call(self, x: Tensor, seed: int | None, p: float = 0.4) -> Tensor:
        """The low-rank term alone, which shows what it reads of x: a and b are the identity, and the weight is 0."""
        weight = Weight8bit(torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.int8), torch.ones(x.shape[-1]))
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        return quantized_linear(x, weight, lora=Lora(eye, eye, 1.0, p), seed=seed)

    def test_rate_and_scale(self) -> None:
        y = self.call(torch.ones(100, 90), 3)
        assert set(y.unique().tolist()) == {0.0, (torch.ones(()) / 0.6).item()}
        assert abs((y == 0).double().mean() - 0.4) < 0.02

    def test_pattern_is_a_function_of_the_seed(self) -> None:
        x = torch.ones(20, 30)
        assert torch.equal(self.call(x, 5), self.call(x, 5))
        assert not torch.equal(self.call(x, 5), self.call(x, 6))
        torch.manual_seed(1)
        first, second = self.call(x, None), self.call(x, None)
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(first, self.call(x, None))

    def test_everything_dropped(self) -> None:
        assert (self.call(torch.ones(3, 8), 1, p=1.0) == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_gradients_have_the_pattern_of_the_forward(self, dtype: torch.dtype) -> None:
        x = torch.ones(12, 16, dtype=dtype, requires_grad=True)
        y = self.call(x, 8)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, y.detach())

    def test_gradient_of_the_factors(self) -> None:
        weight = mapped_weight(24, 64)
        x, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 64), (3, 64), (24, 3)))
        torch.autograd.gradcheck(
            lambda x, a, b: quantized_linear(x, weight, lora=Lora(a, b, 0.7, 0.3), seed=2), (x, a, b)
        )


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_input_gradient_can_be_added_to_another(bits: int, rows: int) -> None:
    weight = weight_4bit(60, 128) if bits == 4 else weight_8bit(60, 128)
    grad, other = torch.randn(rows, 60), torch.randn(rows, 128)
    term = LowRank(torch.randn(rows, 3), torch.randn(128, 3))
    into = other.clone()
    found = reference.input_gradient(grad, weight, term, into)
    assert found is into
    expected = other + reference.input_gradient(grad, weight, term)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)

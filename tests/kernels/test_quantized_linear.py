"""quantized_linear on CPUs: against bitsandbytes' own bits, against the definition in fp64, and in 16 bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.measure import peak_memory
from mllm_fast.kernels import runtime
from mllm_fast.kernels.quantized_linear import (
    Lora,
    Nested,
    Weight4bit,
    Weight8bit,
    decode,
    dequantize,
    quantized_linear,
    reference,
    register_decoder,
)
from tests.kernels.op_checks import Inputs, check_exact, check_low_precision, leaves
from tests.kernels.quantized_weights import definition, mapped_weight, nf4_map, quantized, weight_4bit, weight_8bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
Weight = Weight4bit | Weight8bit


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels and steps of so few elements that the small weights of tests have several."""
    monkeypatch.setattr(reference, "PANEL", 2048)
    monkeypatch.setattr(reference, "LEAST_PANEL", 512)
    monkeypatch.setattr(decode, "STEP", 384)
    monkeypatch.setattr(reference, "FEW_ROWS", (8, 8))


WEIGHTS: dict[str, Callable[[], Weight]] = {
    "nf4": lambda: weight_4bit(48, 192),
    "fp4": lambda: weight_4bit(40, 128, "fp4"),
    "nested": lambda: weight_4bit(90, 192, nested=True),
    "blocks of 128": lambda: weight_4bit(33, 384, "fp4", 128, nested=True),
    "straddling blocks": lambda: weight_4bit(70, 96),
    "odd": lambda: weight_4bit(37, 51, blocksize=32),
    "any map": lambda: mapped_weight(48, 128),
    "int8": lambda: weight_8bit(75, 130),
    "int8 in whole vectors": lambda: weight_8bit(75, 192),
}


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


def peer(weight: Weight, lora: bool) -> Callable[..., Tensor]:
    """The definition, on the inputs of `ours`: in each dtype with the weight rounded to that dtype."""

    def call(x: Tensor, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        y = F.linear(x, definition(weight, x.dtype), bias)
        return y + 0.5 * F.linear(F.linear(x, a), b) if a is not None and b is not None else y

    return call


def ours(weight: Weight, lora: bool) -> Callable[..., Tensor]:
    def call(x: Tensor, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return quantized_linear(x, weight, bias, lora=None if a is None or b is None else Lora(a, b, 0.5))

    return call


def inputs(weight: Weight, rows: tuple[int, ...], rank: int = 0) -> Inputs:
    width, columns = weight.shape
    drawn = {"x": torch.randn(*rows, columns), "bias": torch.randn(width)}
    if rank:
        drawn |= {"a": torch.randn(rank, columns) * columns**-0.5, "b": torch.randn(width, rank) * rank**-0.5}
    return drawn


@pytest.mark.usefixtures("small_panels")
class TestProductAndGradients:
    @pytest.mark.parametrize("name", WEIGHTS)
    @pytest.mark.parametrize("rows", [(), (1,), (3, 5), (2, 20)], ids=str)
    @pytest.mark.parametrize("rank", [0, 3])
    def test_exact_in_fp64(self, name: str, rows: tuple[int, ...], rank: int) -> None:
        weight = WEIGHTS[name]()
        check_exact(ours(weight, rank > 0), peer(weight, rank > 0), inputs(weight, rows, rank))

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
        check_exact(ours(weight, len(x) > 2), peer(weight, len(x) > 2), x)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", WEIGHTS)
    @pytest.mark.parametrize("rows", [1, 7, 40])
    def test_no_less_accurate_than_the_dequantised_product(self, name: str, dtype: torch.dtype, rows: int) -> None:
        weight = WEIGHTS[name]()
        rank = 4 if rows == 7 else 0
        check_low_precision(
            ours(weight, rank > 0), peer(weight, rank > 0), lambda: inputs(weight, (rows,), rank), dtype, draws=3
        )

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


class TestMemory:
    @pytest.mark.parametrize("rank", [0, 4])
    def test_x_is_saved_for_lora_only(self, rank: int) -> None:
        weight = weight_4bit(64, 128)
        saved: list[Tensor] = []
        arguments = leaves(inputs(weight, (10,), rank), torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            ours(weight, rank > 0)(**arguments).sum()
        sizes = sorted(tuple(t.shape) for t in saved)
        assert sizes == sorted([(10, 128), (4, 128), (64, 4), (10, 4)] if rank else [])

    def test_x_is_not_saved_where_lora_is_frozen(self) -> None:
        weight = weight_4bit(64, 128)
        drawn = inputs(weight, (10,), 4)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            quantized_linear(drawn["x"].requires_grad_(), weight, lora=Lora(drawn["a"], drawn["b"], 1.0)).sum()
        assert (10, 128) not in {tuple(t.shape) for t in saved}

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("rows", [16, 200])
    def test_a_step_takes_at_most_half_of_what_bitsandbytes_takes(self, bits: int, rows: int) -> None:
        size = 2048
        x = torch.randn(rows, size, dtype=torch.bfloat16, requires_grad=True)
        if bits == 4:
            weight, packed, state = quantized(size, size, dtype=torch.bfloat16)

            def theirs() -> Any:
                return bitsandbytes.matmul_4bit(x, packed.t(), state).sum().backward()

            mine: Weight = weight
        else:
            mine = weight_8bit(size, size)
            layer = bitsandbytes.MatmulLtState()
            layer.CB, layer.SCB, layer.has_fp16_weights = mine.values, mine.scale, False
            values = mine.values

            def theirs() -> Any:
                return bitsandbytes.matmul(x, values, state=layer).sum().backward()

        def step() -> None:
            quantized_linear(x, mine).sum().backward()

        step(), theirs()  # the gradient's own memory is there
        assert peak_memory(step, CPU).peak <= peak_memory(theirs, CPU).peak / 2


class TestDecoder:
    def test_bitsandbytes_own_decoder_gives_the_same_bits(self) -> None:
        calls: list[tuple[int, int]] = []

        def nf4(packed: Tensor, absmax: Tensor, blocksize: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
            calls.append(shape)
            return torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, blocksize, "nf4", shape, dtype)

        register_decoder("test nf4", nf4)
        for nested in (False, True):
            weight, packed, _ = quantized(1200, 128, nested=nested, dtype=torch.bfloat16)
            assert torch.equal(weight.code, nf4_map())
            fast = Weight4bit(packed.flatten(), weight.absmax, weight.code, 64, weight.shape, weight.nested, "test nf4")
            assert torch.equal(dequantize(fast, torch.bfloat16), dequantize(weight, torch.bfloat16))
            for rows in (3, 600):
                results = []
                for w in (weight, fast):
                    x = torch.ones(rows, 128, dtype=torch.bfloat16, requires_grad=True)
                    y = quantized_linear(x, w)
                    y.sum().backward()
                    results.append((y, x.grad))
                assert all(map(torch.equal, *results))
        assert {columns for _, columns in calls} == {128} and len({rows for rows, _ in calls}) > 1

    def test_rows_with_straddling_blocks_are_not_given_to_it(self) -> None:
        register_decoder("never", lambda *_: pytest.fail("called"))
        w = weight_4bit(20, 96)
        weight = Weight4bit(w.packed, w.absmax, w.code, 64, w.shape, None, "never")
        assert torch.equal(dequantize(weight, torch.float32), dequantize(w, torch.float32))


def test_autocast() -> None:
    weight, x = weight_4bit(48, 128), torch.randn(4, 128, requires_grad=True)
    drawn = inputs(weight, (4,), 2)
    a, b = (drawn[name].requires_grad_() for name in ("a", "b"))
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear(x, weight, lora=Lora(a, b, 1.0))
        plain = quantized_linear(x.double(), weight)
    assert y.dtype == torch.bfloat16 and plain.dtype == torch.float64
    y.sum().backward()
    for leaf in (x, a, b):
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32


class TestTraced:
    @pytest.mark.parametrize("name", ["nested", "int8", "straddling blocks"])
    @pytest.mark.parametrize("p", [0.0, 0.3])
    def test_one_graph_forward_and_backward(self, name: str, p: float) -> None:
        weight = WEIGHTS[name]()

        def call(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
            # As a module makes it, out of its parameters.
            w = weight
            if isinstance(weight, Weight4bit) and weight.nested is not None:
                n = weight.nested
                inner = Nested(n.code, n.absmax, n.offset)
                w = Weight4bit(weight.packed.view(-1), weight.absmax, weight.code, 64, weight.shape, inner)
            return quantized_linear(x * 2, w, bias, lora=Lora(a, b, 0.5, p), seed=3) + 1

        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        results = []
        for run in (call, compiled):
            arguments = leaves(inputs(weight, (2, 3), 4), torch.float32)
            torch.manual_seed(0)
            for leaf in arguments.values():
                leaf.data.normal_()
            y = run(**arguments)
            y.sum().backward()
            results.append([y, *(leaf.grad for leaf in arguments.values())])
        for mine, theirs in zip(*results, strict=True):
            assert mine is not None and theirs is not None and torch.equal(mine, theirs)

    @pytest.mark.parametrize("outliers", [None, "llm_int8"])
    def test_inference_and_llm_int8(self, outliers: Any) -> None:
        weight, x = weight_8bit(48, 64), torch.randn(5, 64)
        call = torch.compile(
            lambda x: quantized_linear(x, weight, outliers=outliers), backend="aot_eager", fullgraph=True
        )
        assert torch.equal(call(x), quantized_linear(x, weight, outliers=outliers))

    @pytest.mark.parametrize("name", ["nested", "int8"])
    @pytest.mark.parametrize("rank", [0, 3])
    def test_opcheck(self, name: str, rank: int) -> None:
        from mllm_fast.kernels.quantized_linear import autograd

        weight = WEIGHTS[name]()
        arguments = leaves(inputs(weight, (4,), rank), torch.float32)
        flat = autograd._flat(weight, autograd.Settings("torch", None, 0.5, 0.0), torch.tensor(7))
        tensors = [arguments.get(name) for name in ("x", "bias", "a", "b")]
        torch.library.opcheck(autograd.quantized_linear_op, (*tensors, *flat))

    def test_a_seed_is_drawn_anew_in_each_call(self) -> None:
        weight, drawn = weight_8bit(40, 64), inputs(weight_8bit(40, 64), (6,), 3)
        lora = Lora(drawn["a"], drawn["b"], 1.0, 0.5)
        call = torch.compile(lambda x: quantized_linear(x, weight, lora=lora), backend="aot_eager", fullgraph=True)
        assert not torch.equal(call(drawn["x"]), call(drawn["x"]))


class TestErrors:
    def test_shapes_and_kinds(self) -> None:
        weight, x = weight_4bit(48, 128), torch.randn(2, 128)
        a, b = torch.randn(3, 128), torch.randn(48, 3)
        with pytest.raises(ValueError, match=r"expected \[\.\.\., 128\]"):
            quantized_linear(torch.randn(2, 64), weight)
        with pytest.raises(ValueError, match=r"expected \(48,\)"):
            quantized_linear(x, weight, torch.randn(47))
        with pytest.raises(ValueError, match=r"expected \[r, 128\] and \[48, r\]"):
            quantized_linear(x, weight, lora=Lora(torch.randn(3, 64), b, 1.0))
        with pytest.raises(ValueError, match="int64"):
            quantized_linear(torch.ones(2, 128, dtype=torch.int64), weight)
        with pytest.raises(ValueError, match="'llm_int8' for int8"):
            quantized_linear(x, weight, outliers="llm_int8")
        with pytest.raises(ValueError, match="one floating-point dtype"):
            Lora(a, b.half(), 1.0)
        with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
            Lora(a, b, 1.0, 1.5)

    def test_weights(self) -> None:
        w = weight_4bit(48, 128, nested=True)
        n = w.nested
        assert n is not None
        for broken in (
            {"packed": w.packed[:-1]},
            {"packed": w.packed.view(torch.int8)},
            {"absmax": w.absmax.float()},
            {"code": w.code[:8]},
            {"blocksize": 63},
            {"nested": Nested(n.code, n.absmax, n.offset, 128)},
            {"nested": Nested(n.code[:9], n.absmax, n.offset)},
            {"nested": None},
        ):
            arguments = {
                "packed": w.packed, "absmax": w.absmax, "code": w.code, "blocksize": 64, "shape": w.shape, "nested": n,
            } | broken  # fmt: skip
            with pytest.raises(ValueError, match="expected"):
                Weight4bit(**arguments)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="scale"):
            Weight8bit(torch.zeros(3, 4, dtype=torch.int8), torch.ones(4))

    def test_triton_is_not_there(self) -> None:
        if runtime.triton_unavailable_reason() is None:
            pytest.skip("it is")
        with pytest.raises(runtime.BackendUnavailableError), runtime.backend("triton"):
            quantized_linear(torch.randn(2, 64), weight_8bit(3, 64))

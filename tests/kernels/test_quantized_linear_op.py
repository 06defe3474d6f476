"""quantized_linear as an op, on CPUs: memory, decoders, autocast, tracing and errors."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from bench.measure import peak_memory
from mllm_fast.kernels import runtime
from mllm_fast.kernels.quantized_linear import (
    Lora,
    Nested,
    Weight4bit,
    Weight8bit,
    dequantize,
    quantized_linear,
    register_decoder,
)
from tests.kernels.op_checks import leaves
from tests.kernels.quantized_weights import (
    WEIGHTS,
    inputs,
    nf4_map,
    ours,
    quantized,
    weight_4bit,
    weight_8bit,
)

CPU = torch.device("cpu")
Weight = Weight4bit | Weight8bit


class TestMemory:
    @pytest.mark.parametrize("rank", [0, 4])
    def test_x_is_saved_for_lora_only(self, rank: int) -> None:
        weight = weight_4bit(64, 128)
        saved: list[Tensor] = []
        arguments = leaves(inputs(weight, (10,), rank), torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            ours(weight)(**arguments).sum()
        sizes = sorted(tuple(t.shape) for t in saved)
        assert sizes == sorted([(10, 128), (4, 128), (64, 4), (10, 4)] if rank else [])

    def test_x_is_not_saved_where_lora_is_frozen(self) -> None:
        weight = weight_4bit(64, 128)
        drawn = inputs(weight, (10,), 4)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            quantized_linear(drawn["x"].requires_grad_(), weight, lora=Lora(drawn["a"], drawn["b"], 1.0)).sum()
        assert (10, 128) not in {tuple(t.shape) for t in saved}

    @pytest.mark.parametrize(("bits", "rows"), [(4, 16), (4, 200), (8, 16)])
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
        # Panels of rows, and for many rows of x panels of columns.
        assert {columns for _, columns in calls} == {64, 128} and len({rows for rows, _ in calls}) > 1

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

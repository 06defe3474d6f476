"""The Triton kernels of quantized_linear against the definition in fp64; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.quantized_linear import (
    Lora,
    Nested,
    Weight4bit,
    Weight8bit,
    configs,
    dequantize,
    quantized_linear,
    reference,
)
from tests.kernels import ptx
from tests.kernels.op_checks import Inputs, check_low_precision, leaves
from tests.kernels.quantized_weights import definition, mapped_weight, weight_4bit, weight_8bit
from tests.kernels.triton_device import DEVICE, INTERPRETING, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")

from mllm_fast.kernels.quantized_linear import triton_launch  # noqa: E402  # imports the kernels

EXAMPLES = settings(max_examples=8 if INTERPRETING else 200)
Weight = Weight4bit | Weight8bit


def on_device(weight: Weight) -> Weight:
    if isinstance(weight, Weight8bit):
        return Weight8bit(weight.values.to(DEVICE), weight.scale.to(DEVICE))
    nested = weight.nested
    if nested is not None:
        nested = Nested(nested.code.to(DEVICE), nested.absmax.to(DEVICE), nested.offset.to(DEVICE))
    moved = (t.to(DEVICE) for t in (weight.packed, weight.absmax, weight.code))
    return Weight4bit(*moved, weight.blocksize, weight.shape, nested)


WEIGHTS = {
    "nf4": lambda: weight_4bit(40, 192),
    "nested": lambda: weight_4bit(90, 192, "fp4", nested=True),
    "blocks of 32": lambda: weight_4bit(33, 96, blocksize=32),
    "blocks of 128": lambda: mapped_weight(40, 256, 128),
    "straddling blocks": lambda: weight_4bit(38, 96),
    "odd": lambda: weight_4bit(37, 51, blocksize=32),
    "int8": lambda: weight_8bit(43, 150),
}


def inputs(weight: Weight, rows: int, rank: int = 0) -> Inputs:
    width, columns = weight.shape
    drawn = {"x": torch.randn(rows, columns), "bias": torch.randn(width)}
    if rank:
        drawn |= {"a": torch.randn(rank, columns) * columns**-0.5, "b": torch.randn(width, rank) * rank**-0.5}
    return {name: t.to(DEVICE) for name, t in drawn.items()}


def on_triton(weight: Weight, **more: Any) -> Any:
    def call(x: Tensor, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        lora = None if a is None or b is None else Lora(a, b, 0.5)
        with runtime.backend("triton"):
            return quantized_linear(x, weight, bias, lora=lora, **more)

    return call


def exactly(weight: Weight) -> Any:
    """The definition, in the dtype of x and with the weight rounded to it."""

    def call(x: Tensor, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        y = F.linear(x, definition(weight, x.dtype), bias)
        return y + 0.5 * F.linear(F.linear(x, a), b) if a is not None and b is not None else y

    return call


def check(weight: Weight, rows: int, rank: int = 0) -> None:
    """Result and all gradients in fp32 equal the exact ones."""
    weight = on_device(weight)
    drawn, results = inputs(weight, rows, rank), []
    grad = torch.randn(rows, weight.shape[0])
    for call, dtype in ((on_triton(weight), torch.float32), (exactly(weight), torch.float64)):
        arguments = leaves(drawn, dtype)
        y = call(**arguments)
        results.append([y, *torch.autograd.grad(y, list(arguments.values()), grad.to(y))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("rows", "rank"), [(1, 0), (5, 3), (40, 20)])
def test_every_kind_of_weight(name: str, rows: int, rank: int) -> None:
    check(WEIGHTS[name](), rows, rank)


@EXAMPLES
@given(st.data())
def test_drawn_calls(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 80))
    if data.draw(st.booleans()):
        blocksize = data.draw(st.sampled_from([32, 64, 96, 128]))
        weight: Weight = mapped_weight(width, blocksize * data.draw(st.integers(1, 4)), blocksize)
    else:
        weight = weight_8bit(width, data.draw(st.integers(1, 200)))
    check(weight, rows, data.draw(st.sampled_from([0, 1, 17])))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("splits", [2, 4])
def test_sums_in_parts(bits: int, rows: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # More parts than there are steps, too.
    monkeypatch.setattr(configs, "splits_for", lambda *_: splits)
    check(weight_4bit(40, 192) if bits == 4 else weight_8bit(40, 192), rows, 5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_weight", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("tile", [(16, 32, 64), (32, 16, 32), (16, 64, 128)])
def test_every_kind_of_tile(
    bits: int, scale_weight: bool, flipped: bool, tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 128
    config = configs.Config(*tile, 4, 2, scale_weight, flipped)
    for name in ("product_config", "gradient_config"):
        monkeypatch.setattr(configs, name, lambda *_: config)
    check(mapped_weight(20, 128, block) if bits == 4 else weight_8bit(20, 70), 18, 3)


def test_a_tile_wider_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "gradient_config", lambda *_: configs.Config(16, 16, 128, 4, 2, scale_weight=True))
    check(weight_4bit(40, 192, nested=True), 5)
    check(weight_4bit(40, 96, blocksize=32), 5)
    check(mapped_weight(20, 192, 96), 5)


@pytest.mark.parametrize("name", ["nested", "int8", "straddling blocks"])
@pytest.mark.parametrize("workspace", [1, 1 << 26])
def test_many_rows_go_to_the_vendors_product(name: str, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "MAX_ROWS", 8)
    monkeypatch.setattr(configs, "WORKSPACE", workspace)
    monkeypatch.setattr(triton_launch, "product_tiles", None)
    check(weight_4bit(200, 96) if name == "straddling blocks" else WEIGHTS[name](), 12, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", WEIGHTS)
def test_dequantised_bits(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name]()
    with runtime.backend("triton"):
        found = dequantize(on_device(weight), dtype)
    assert torch.equal(found.cpu(), reference.dequantize(weight, dtype))


@pytest.mark.parametrize("name", ["nf4", "nested", "blocks of 32", "int8"])
@pytest.mark.parametrize("rows", [3, 40])
def test_fp16_is_no_less_accurate_than_the_dequantised_product(name: str, rows: int) -> None:
    weight = on_device(WEIGHTS[name]())
    check_low_precision(
        on_triton(weight), exactly(weight), lambda: inputs(weight, rows, 3 if rows == 3 else 0), torch.float16, draws=2
    )


@pytest.fixture
def permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look-ups as on NVIDIA, with the inline assembly of the kernels run one instruction at a time."""
    if INTERPRETING:
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", ptx.create_inline_asm)
    monkeypatch.setattr(triton_launch, "_lookup", lambda arch, dtype: "prmt")


@pytest.mark.parametrize("name", ["nf4", "nested", "blocks of 32"])
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.usefixtures("permutations")
def test_permutations_give_the_same(name: str, rows: int) -> None:
    weight = on_device(WEIGHTS[name]())
    check_low_precision(on_triton(weight), exactly(weight), lambda: inputs(weight, rows), torch.float16, draws=1)


def test_fp16_gradients_of_small_scales_do_not_underflow() -> None:
    for made in (weight_8bit(40, 64), weight_4bit(40, 64)):
        weight = on_device(made)
        grad = torch.full((3, 40), 1e-4, dtype=torch.float16, device=DEVICE)
        found = triton_launch.input_gradient(grad, weight, None)
        theirs = grad.double() @ definition(weight)
        assert (found - theirs).norm() <= 2e-3 * theirs.norm()


def test_rows_apart_and_across() -> None:
    weight = on_device(WEIGHTS["nf4"]())
    wide = torch.full((6, 300), torch.nan, device=DEVICE)
    wide[:, 20:212] = torch.randn(6, 192)
    for x in (wide[:, 20:212], wide[:1, 20:212].expand(4, -1), torch.randn(192, 3, device=DEVICE).T):
        with runtime.backend("triton"):
            found = quantized_linear(x, weight)
        torch.testing.assert_close(found.double(), x.double() @ definition(weight).T, rtol=1e-4, atol=1e-4)


def test_two_runs_are_bitwise_equal_and_write_into_nothing() -> None:
    weight = on_device(WEIGHTS["nested"]())
    assert isinstance(weight, Weight4bit)
    arguments = leaves(inputs(weight, 20, 3), torch.float32)
    before = [t.detach().clone() for t in (*arguments.values(), weight.packed, weight.absmax)]
    runs = []
    for _ in range(2):
        y = on_triton(weight)(**arguments)
        kept = y.detach().clone()
        runs += [[y, *torch.autograd.grad(y.sum(), list(arguments.values()), retain_graph=True)] for _ in range(2)]
        assert torch.equal(y, kept)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))
    assert all(map(torch.equal, before, (*arguments.values(), weight.packed, weight.absmax)))


class TestDropout:
    def call(self, x: Tensor, seed: int, p: float = 0.4) -> Tensor:
        """The low-rank term alone, which shows what it reads of x: a and b are the identity, and the weight is 0."""
        size = x.shape[-1]
        weight = Weight8bit(torch.zeros(size, size, dtype=torch.int8, device=DEVICE), torch.ones(size, device=DEVICE))
        eye = torch.eye(size, device=DEVICE)
        with runtime.backend("triton"):
            return quantized_linear(x, weight, lora=Lora(eye, eye, 1.0, p), seed=seed)

    @pytest.mark.parametrize("splits", [1, 2])
    @pytest.mark.parametrize("rows", [9, 40])
    def test_gradients_have_the_pattern_of_the_forward(
        self, rows: int, splits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(configs, "splits_for", lambda *_: splits)
        x = torch.ones(rows, 40, device=DEVICE, requires_grad=True)
        y = self.call(x, 1 << 40)
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, y.detach())
        assert set(y.double().round(decimals=4).unique().tolist()) == {0.0, round(1 / 0.6, 4)}
        assert abs((y == 0).double().mean() - 0.4) < 0.06

    def test_pattern_is_a_function_of_the_seed(self) -> None:
        x = torch.ones(12, 30, device=DEVICE)
        assert torch.equal(self.call(x, 5), self.call(x, 5))
        assert not torch.equal(self.call(x, 5), self.call(x, 6))
        assert not torch.equal(self.call(x, 5), self.call(x, 5 + (1 << 40)))

    def test_everything_dropped(self) -> None:
        assert (self.call(torch.ones(3, 16, device=DEVICE), 1, p=1.0) == 0).all()

    def test_gradient_of_the_factors(self) -> None:
        weight = on_device(WEIGHTS["straddling blocks"]())
        drawn = leaves(inputs(weight, 9, 3), torch.float32)
        x, a, b = (drawn[name] for name in ("x", "a", "b"))
        with runtime.backend("triton"):
            y = quantized_linear(x, weight, lora=Lora(a, b, 0.7, 0.5), seed=4)
        found = torch.autograd.grad(y.sum(), (x, a, b))
        with runtime.backend("triton"):
            dropped = triton_launch.dropout(torch.ones_like(x), 0.5, 4)
        exact = F.linear(x, definition(weight, x.dtype)) + 0.7 * F.linear(F.linear(x * dropped, a), b)
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(found, torch.autograd.grad(exact.sum(), (x, a, b)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


class TestTraced:
    @pytest.mark.parametrize("name", ["nested", "int8"])
    @pytest.mark.parametrize("p", [0.0, 0.3])
    def test_one_graph_forward_and_backward(self, name: str, p: float) -> None:
        weight = on_device(WEIGHTS[name]())

        def call(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return quantized_linear(x * 2, weight, bias, lora=Lora(a, b, 0.5, p), seed=5) + 1

        torch._dynamo.reset()
        arguments = leaves(inputs(weight, 6, 3), torch.float32)
        with runtime.backend("triton"):
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(**arguments)
            eager = call(**arguments)
        assert torch.equal(compiled, eager)
        grads = [torch.autograd.grad(y.sum(), list(arguments.values())) for y in (compiled, eager)]
        assert all(map(torch.equal, *grads))

    def test_opcheck(self) -> None:
        from mllm_fast.kernels.quantized_linear import autograd

        weight = on_device(WEIGHTS["nested"]())
        arguments = leaves(inputs(weight, 4, 2), torch.float32)
        flat = autograd._flat(weight, autograd.Settings("triton", None, 0.5, 0.2), torch.tensor(7))
        torch.library.opcheck(autograd.quantized_linear_op, (*arguments.values(), *flat))


class TestChoice:
    def test_fp64_goes_to_the_reference(self) -> None:
        weight = on_device(WEIGHTS["nf4"]())
        x = torch.randn(2, 192, dtype=torch.float64, device=DEVICE)
        with runtime.backend("triton"), pytest.raises(runtime.BackendUnavailableError, match="fp64"):
            quantized_linear(x, weight)
        torch.testing.assert_close(quantized_linear(x, weight), x @ definition(weight).T)

    def test_empty(self) -> None:
        for weight in (WEIGHTS["nf4"](), WEIGHTS["int8"](), WEIGHTS["odd"]()):
            x = torch.empty(0, weight.shape[1], device=DEVICE, requires_grad=True)
            with runtime.backend("triton"):
                y = quantized_linear(x, on_device(weight))
            assert y.shape == (0, weight.shape[0])
            assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape

    @pytest.mark.parametrize(
        ("tiles", "steps", "expected"), [(32, 64, 8), (300, 64, 1), (64, 64, 4), (32, 16, 2), (1, 4, 1)]
    )
    def test_splits(self, tiles: int, steps: int, expected: int) -> None:
        assert configs.splits_for("sm_90", tiles, steps) == expected

    def test_weights_at_odd_addresses_are_dequantised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = WEIGHTS["nf4"]()
        moved = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(weight.packed)
        odd = on_device(Weight4bit(moved, weight.absmax, weight.code, 64, weight.shape))
        if DEVICE != "cpu":
            pytest.skip("moving a weight to a GPU aligns it")
        monkeypatch.setattr(triton_launch, "product_tiles", None)
        check(odd, 3)


@pytest.mark.skipif(not INTERPRETING, reason="counts the launches of the interpreter")
def test_the_gradient_holds_no_part_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dequantize_4bit", "dequantize_8bit"):
        monkeypatch.setattr(triton_launch.triton_elementwise, name, None)
    for weight, rows in itertools.product((WEIGHTS["nf4"](), WEIGHTS["int8"]()), (1, 70)):
        triton_launch.input_gradient(torch.randn(rows, weight.shape[0]), weight, None)

"""The Triton kernels of layer_norm and rms_norm against torch's; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.norm import configs, layer_norm, rms_norm, triton_launch, triton_op
from mllm_fast.kernels.norm.triton_launch import Settings
from tests.kernels.triton_device import DEVICE, INTERPRETING, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")

Inputs = dict[str, Tensor | None]
KINDS = ["layer_norm", "rms_norm"]


def draw(
    *shape: int, kind: str = "layer_norm", residual: bool = True, weight: bool = True, bias: bool = True
) -> Inputs:
    """x with a mean and a spread of its own, and parameters that are not 1 and 0."""
    return {
        "x": 3 * torch.randn(shape) + 1.5,
        "residual": torch.randn(shape) if residual else None,
        "weight": torch.randn(shape[-1]) if weight else None,
        "bias": torch.randn(shape[-1]) if bias and kind == "layer_norm" else None,
    }


def moved(inputs: Inputs, dtype: torch.dtype | None, device: str = DEVICE) -> Inputs:
    """Leaves with the same values and strides."""
    return {
        name: None if t is None else t.detach().to(device, dtype or t.dtype).requires_grad_()
        for name, t in inputs.items()
    }


def apply(inputs: Inputs, kind: str, eps: float = 1e-5, **options: Any) -> Tensor:
    x, residual, weight, bias = inputs.values()
    assert x is not None
    if kind == "layer_norm":
        return layer_norm(x, weight, bias, eps, residual=residual, **options)
    return rms_norm(x, weight, eps, residual=residual, **options)


def on_triton(inputs: Inputs, kind: str, eps: float = 1e-5, **options: Any) -> Tensor:
    with runtime.backend("triton"):
        return apply(inputs, kind, eps, **options)


def exact(inputs: Inputs, kind: str, eps: float = 1e-5, factors: Tensor | None = None) -> Tensor:
    """The definition in torch; `factors` are what dropout multiplies x with."""
    x, residual, weight, bias = inputs.values()
    assert x is not None
    x = x if factors is None else x * factors
    x = x if residual is None else x + residual
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def gradients(out: Tensor, inputs: Inputs, grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [t for t in inputs.values() if t is not None], grad, retain_graph=True))


def check(inputs: Inputs, kind: str, eps: float = 1e-5, **options: Any) -> None:
    """Output and all gradients in fp32 equal those of the definition in fp64."""
    mine, theirs = moved(inputs, torch.float32), moved(inputs, torch.float64, "cpu")
    out, expected = on_triton(mine, kind, eps, **options), exact(theirs, kind, eps)
    assert out.shape == expected.shape
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    grad = torch.randn(expected.shape)
    results = [out, *gradients(out, mine, grad.to(DEVICE))]
    for ours, reference in zip(results, [expected, *gradients(expected, theirs, grad.double())], strict=True):
        scale = max(reference.abs().max().item(), 1.0) if reference.numel() else 1.0
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 768, 1025, 4096])
def test_widths(width: int, kind: str) -> None:
    check(draw(2, 3, width, kind=kind), kind)


@settings(max_examples=30 if INTERPRETING else 200)
@given(
    leading=st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3),
    width=st.sampled_from([1, 2, 13, 40]),
    kind=st.sampled_from(KINDS),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    layout=st.sampled_from(["contiguous", "transposed", "columns", "rows", "expanded"]),
    eps=st.sampled_from([1e-12, 1e-5, 0.5]),
)
def test_any_shape_and_layout(
    leading: list[int], width: int, kind: str, parts: tuple[bool, bool, bool], layout: str, eps: float
) -> None:
    torch.manual_seed(0)
    residual, weight, bias = parts
    inputs = draw(*leading, width, kind=kind, residual=residual, weight=weight, bias=bias)
    x = inputs["x"]
    assert x is not None
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "columns":  # what lies beyond a row must not be read
        x = torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., :width]
    elif layout == "rows" and leading:
        x = torch.cat([x, torch.full_like(x, torch.nan)], dim=len(leading) - 1).narrow(len(leading) - 1, 0, leading[-1])
    elif layout == "expanded" and leading:
        x = x[:1].expand_as(x)
    check(inputs | {"x": x}, kind, max(eps, 1e-5) if width == 1 else eps)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_a_slice(kind: str) -> None:
    """Queries out of a stacked projection: rows in two even steps."""
    whole = torch.randn(2, 5, 3 * 4 * 8)
    inputs = draw(2, 5, 4, 8, kind=kind, residual=False)
    check(inputs | {"x": whole[..., 32:64].unflatten(-1, (4, 8))}, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("BM", [1, 4])
def test_programs_share_out_the_rows(BM: int, programs: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "programs_for", lambda *_: programs)
    monkeypatch.setattr(configs, "backward_config", lambda *_: configs.Config(BM, 32, 4))
    check(draw(29, 20, kind=kind), kind)


def test_a_mean_far_from_zero() -> None:
    inputs = draw(5, 300, residual=False)
    x = inputs["x"]
    assert x is not None
    mine = moved(inputs | {"x": x + 1000}, torch.float32)
    theirs = moved({name: None if t is None else t.cpu() for name, t in mine.items()}, torch.float64, "cpu")
    # The rounding of x itself is 6e-5; a sum of squares in fp32 would be off by 0.1.
    torch.testing.assert_close(
        on_triton(mine, "layer_norm").cpu().double(), exact(theirs, "layer_norm"), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_fp16_is_as_good_as_torch(kind: str, residual: bool) -> None:
    inputs = moved(draw(4, 8, 96, kind=kind, residual=residual), torch.float16, "cpu")
    check_low_precision(inputs, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [128, 768, 2048, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_as_good_as_torch_on_a_gpu(dtype: torch.dtype, width: int, kind: str) -> None:
    check_low_precision(moved(draw(64, 33, width, kind=kind), dtype, "cpu"), kind)


def check_low_precision(inputs: Inputs, kind: str) -> None:
    """For output and gradients, our RMS error is at most twice that of torch's own norm in the same type."""
    x = inputs["x"]
    assert x is not None
    grad = torch.randn(x.shape).to(x.dtype)
    results = []
    for run, leaves in (
        (on_triton, moved(inputs, None)),
        (exact, moved(inputs, None, "cpu")),
        (exact, moved(inputs, torch.float64, "cpu")),
    ):
        out = run(leaves, kind)
        results.append([t.detach().cpu().double() for t in (out, *gradients(out, leaves, grad.to(out)))])
    for ours, theirs, reference in zip(*results, strict=True):
        assert ours.isfinite().all()
        # A weight gradient that torch sums without rounding in between is off by its own last rounding.
        rounding = torch.finfo(x.dtype).eps / 4 * reference.norm()
        assert (ours - reference).norm() <= 2 * (theirs - reference).norm() + rounding


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_mix(kind: str) -> None:
    inputs = draw(3, 24, kind=kind)
    x, residual = inputs["x"], inputs["residual"]
    assert x is not None
    assert residual is not None
    leaves = moved(inputs | {"x": x.half()}, None)
    out = on_triton(leaves, kind)
    assert out.dtype == torch.float32  # as torch promotes half + float
    found = gradients(out, leaves, torch.ones_like(out))
    assert [t.dtype for t in found] == [t.dtype for t in leaves.values() if t is not None]
    torch.testing.assert_close(out.cpu(), exact(inputs | {"x": x.half().float()}, kind))
    narrow = moved(inputs | {"x": x.half(), "residual": residual.half()}, None)
    out = on_triton(narrow, kind)
    assert out.dtype == torch.float16  # the parameters in fp32 do not widen it
    assert gradients(out, narrow, torch.ones_like(out))[2].dtype == torch.float32


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_only_the_gradients_that_are_wanted(wanted: str, dropout_p: float) -> None:
    inputs = draw(6, 20)
    everything = moved(inputs, torch.float32)
    options = {"dropout_p": dropout_p, "seed": 3}
    grad = torch.randn(6, 20, device=DEVICE)
    names = [name for name, t in everything.items() if t is not None]
    full = dict(zip(names, gradients(on_triton(everything, "layer_norm", **options), everything, grad), strict=True))
    only = {name: None if t is None else t.detach() for name, t in everything.items()}
    leaf = only[wanted]
    assert leaf is not None
    on_triton(only | {wanted: leaf.requires_grad_()}, "layer_norm", **options).backward(grad)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, full[wanted])


def test_statistics_can_be_found_again() -> None:
    x, grad = torch.randn(7, 33, device=DEVICE), torch.randn(7, 33, device=DEVICE)
    for rms in (False, True):
        numbers = Settings(rms, 1e-5)
        _, total, stats = triton_launch.forward(x, None, None, None, numbers, saving=True)
        assert total is None
        kinds = {"x_dtype": torch.float32, "residual_dtype": None}
        kept = triton_launch.backward(grad, x, None, stats, numbers, **kinds)[0]
        again = triton_launch.backward(grad, x, None, None, numbers, **kinds)[0]
        assert kept is not None
        assert again is not None
        torch.testing.assert_close(kept, again)


def test_two_runs_are_bitwise_equal_and_write_into_nothing() -> None:
    leaves = moved(draw(40, 24), torch.float32)
    before = [t.detach().clone() for t in leaves.values() if t is not None]
    runs = []
    for _ in range(2):
        out = on_triton(leaves, "layer_norm", dropout_p=0.2, seed=1)
        kept, grad = out.detach().clone(), torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        runs += [[out, *gradients(out, leaves, grad)] for _ in range(2)]
        assert torch.equal(out, kept)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))
    assert all(map(torch.equal, (t for t in leaves.values() if t is not None), before))


class TestDropout:
    @staticmethod
    def factors(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
        """What each element of x was multiplied with, read off the sum."""
        _, total, _ = triton_launch.forward(
            torch.ones(shape, device=DEVICE), None, None, None, Settings(False, 1e-5, p, seed), saving=True
        )
        assert total is not None
        return total.cpu()

    def test_rate_and_mean(self) -> None:
        factors = self.factors((150, 100), 0.3, 1)
        assert set(factors.double().round(decimals=4).unique().tolist()) == {0.0, round(1 / 0.7, 4)}
        assert abs((factors == 0).double().mean() - 0.3) < 0.01
        for dim in range(2):
            assert not torch.equal(factors.select(dim, 0), factors.select(dim, 1))

    def test_pattern_is_a_function_of_the_seed(self) -> None:
        first = self.factors((6, 9), 0.5, 3)
        assert torch.equal(first, self.factors((6, 9), 0.5, 3))
        assert torch.equal(first, self.factors((2, 3, 9), 0.5, 3).view(6, 9))
        assert not torch.equal(first, self.factors((6, 9), 0.5, 4))
        assert not torch.equal(first, self.factors((6, 9), 0.5, 3 + (1 << 40)))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("width", [20, 4100])  # the second adds up weight gradients apart
    def test_output_and_gradients_match_the_same_pattern(self, width: int, residual: bool, kind: str) -> None:
        inputs = draw(2, 3, width, kind=kind, residual=residual)
        factors = self.factors((2, 3, width), 0.4, 9).double()
        mine, theirs = moved(inputs, torch.float32), moved(inputs, torch.float64, "cpu")
        out, expected = on_triton(mine, kind, dropout_p=0.4, seed=9), exact(theirs, kind, factors=factors)
        grad = torch.randn(expected.shape)
        results = zip(
            [out, *gradients(out, mine, grad.to(DEVICE))],
            [expected, *gradients(expected, theirs, grad.double())],
            strict=True,
        )
        for ours, reference in results:
            torch.testing.assert_close(ours.cpu().double(), reference, rtol=1e-4, atol=2e-5)

    def test_everything_dropped(self) -> None:
        leaves = moved(draw(3, 8), torch.float32)
        out = on_triton(leaves, "layer_norm", dropout_p=1.0, seed=1)
        residual = leaves["residual"]
        assert residual is not None
        torch.testing.assert_close(out, on_triton(leaves | {"x": residual, "residual": None}, "layer_norm"))
        assert (gradients(out, leaves, torch.ones_like(out))[0] == 0).all()

    def test_a_seed_is_drawn_from_torch(self) -> None:
        leaves = moved(draw(4, 30), torch.float32)
        torch.manual_seed(5)
        first, second = (on_triton(leaves, "layer_norm", dropout_p=0.5) for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        assert torch.equal(first, on_triton(leaves, "layer_norm", dropout_p=0.5))


class TestTraced:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_one_graph_forward_and_backward(self, kind: str, residual: bool, dropout_p: float) -> None:
        leaves = moved(draw(3, 5, 16, kind=kind, residual=residual), torch.float32)

        def call(leaves: Inputs) -> Tensor:
            x = leaves["x"]
            assert x is not None
            return apply(leaves | {"x": x * 2}, kind, dropout_p=dropout_p, seed=5) + 1

        torch._dynamo.reset()
        with runtime.backend("triton"):
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(leaves)
            out = call(leaves)
        grad = torch.randn_like(out)
        assert torch.equal(out, compiled)
        assert all(map(torch.equal, gradients(out, leaves, grad), gradients(compiled, leaves, grad)))

    def test_a_seed_is_drawn_anew_in_each_call(self) -> None:
        leaves = moved(draw(3, 16), torch.float32)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda leaves: apply(leaves, "layer_norm", dropout_p=0.5), backend="aot_eager", fullgraph=True
        )
        with runtime.backend("triton"):
            assert not torch.equal(compiled(leaves), compiled(leaves))

    @pytest.mark.parametrize("dtype", [None, torch.float32])
    @pytest.mark.parametrize("parts", ["all", "x", "no bias"])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.2])
    def test_opcheck(self, parts: str, dropout_p: float, dtype: torch.dtype | None) -> None:
        leaves = list(moved(draw(2, 4, 16), torch.float16).values())
        if parts == "x":
            leaves[1:] = [None] * 3
        if parts == "no bias":
            leaves[3] = None
        arguments = (*leaves, torch.tensor(7), False, 1e-5, dropout_p, dtype)
        torch.library.opcheck(triton_op.norm_op, arguments)


class TestChoice:
    def test_fp64_and_long_rows_go_to_torch(self) -> None:
        for x in (torch.randn(2, 8).double(), torch.randn(2, configs.MAX_WIDTH + 1)):
            x = x.to(DEVICE)
            with runtime.backend("triton"), pytest.raises(runtime.BackendUnavailableError, match="the Triton kernels"):
                layer_norm(x)
            assert rms_norm(x).shape == x.shape

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_longest_row(self, kind: str) -> None:
        check(draw(2, configs.MAX_WIDTH, kind=kind, residual=False), kind)

    @pytest.mark.gpu
    def test_autocast_widens_on_a_gpu(self) -> None:
        x, weight = torch.randn(3, 16, device="cuda").bfloat16(), torch.randn(16, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert layer_norm(x, weight).dtype == F.layer_norm(x, (16,), weight).dtype
            assert rms_norm(x, weight).dtype == F.rms_norm(x, (16,), weight).dtype

"""The Triton kernels of norm_linear and linear_residual against compositions in fp64; on a GPU, or in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.linear import configs, linear_residual, norm_linear, registered, triton_launch
from mllm_fast.kernels.linear.call import Extras, Group, Numbers
from mllm_fast.kernels.linear.configs import Config
from mllm_fast.kernels.norm import Norm
from tests.kernels.op_checks import Inputs, Op, assert_close, check_low_precision, check_pure, run
from tests.kernels.test_linear import (
    EPILOGUES,
    UPSTREAM_ACTIVATIONS,
    draw_linear,
    draw_linear_residual,
    linear_residual_pair,
    norm_linear_pair,
    with_gate_weight,
)
from tests.kernels.test_linear_norms import draw_heads, draw_residual_norm, head_norm_pair, residual_norm_pair
from tests.kernels.triton_device import DEVICE, INTERPRETING, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")

EXAMPLES = settings(max_examples=8 if INTERPRETING else 200)
# Small tiles of every kind: with K shared out over the warps, over programs, and not at all.
CONFIGS = {
    "tiles": Config(16, 16, 16),
    "wide tiles": Config(32, 16, 32),
    "slices": Config(8, 16, 16, SLICES=2),
    "splits": Config(8, 16, 16, SPLITS=3),
    "slices and splits": Config(16, 32, 16, SLICES=2, SPLITS=2),
}


def on_triton(op: Op) -> Op:
    """`op` by the kernels, on the device that runs them."""

    def moved(**inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        with runtime.backend("triton"):
            out = op(**{name: t.to(DEVICE) for name, t in inputs.items()})
        return out.cpu() if isinstance(out, Tensor) else tuple(o.cpu() for o in out)

    return moved


def check(pair: tuple[Op, Op], inputs: Inputs, tolerance: float = 2e-5) -> None:
    """Output and all gradients in fp32 equal those of the peer in fp64, up to rounding."""
    ours, theirs = run(on_triton(pair[0]), inputs, torch.float32), run(pair[1], inputs, torch.float64)
    assert_close({name: t.double() for name, t in ours.items()}, theirs, tolerance)


@pytest.fixture(params=[None, *CONFIGS])
def each_config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen configuration, and each of `CONFIGS` instead."""
    if request.param is not None:
        monkeypatch.setattr(configs, "config_for", lambda *_: CONFIGS[request.param])


@pytest.fixture(params=["fused", "norm apart", "vendor"])
def each_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "plan", lambda *_: request.param)


@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", list(UPSTREAM_ACTIVATIONS))
def test_norms_and_activations(activation: str | None, norm: str | None) -> None:
    inputs = with_gate_weight(draw_linear((2, 5), 11, 13, bias=norm is not None, norm=norm), activation)
    check(norm_linear_pair(norm, activation), inputs)


@pytest.mark.usefixtures("each_config")
def test_configurations() -> None:
    inputs = with_gate_weight(draw_linear((3, 7), 67, 37, norm="layer_norm"), "swiglu")
    check(norm_linear_pair("layer_norm", "swiglu"), inputs)
    inputs = draw_residual_norm((3, 7), 67, "layer_norm", False)
    check(residual_norm_pair("layer_norm", False, 0.0), inputs)


@pytest.mark.usefixtures("each_plan")
@pytest.mark.parametrize("activation", [None, "quick_gelu", "geglu"])
def test_plans(activation: str | None) -> None:
    for norm in (None, "rms_norm"):
        inputs = with_gate_weight(draw_linear((3, 4), 19, 24, norm=norm), activation)
        check(norm_linear_pair(norm, activation), inputs)
    check(head_norm_pair("layer_norm", 8), draw_heads((3, 4), 11, 3, 8, "layer_norm"))
    for gate, masked in (((13,), True), (None, False)):
        check(linear_residual_pair(), draw_linear_residual((3, 4), 11, None, gate, masked))
    check(residual_norm_pair("rms_norm", True, 0.0), draw_residual_norm((3, 4), 11, "rms_norm", True))


@pytest.mark.parametrize(("norm", "gate", "masked"), EPILOGUES)
def test_epilogues(norm: str | None, gate: tuple[int, ...] | None, masked: bool) -> None:
    check(linear_residual_pair(norm), draw_linear_residual((2, 5), 11, norm, gate, masked))


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("post", [False, True])
def test_residual_norms(kind: str, post: bool) -> None:
    check(residual_norm_pair(kind, post, 0.0), draw_residual_norm((2, 5), 11, kind, post))


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 8), (2, 24), (1, 64), (5, 5), (2, 1), (1, 100)])
@pytest.mark.parametrize("kind", [None, "layer_norm"])
def test_heads(heads: int, head_dim: int, kind: str | None) -> None:
    # The norm of a single element is its sign, whose gradient is what eps leaves of a difference.
    tolerance = 2e-5 if head_dim > 1 else 1e-3
    check(head_norm_pair(kind, head_dim), draw_heads((2, 5), 11, heads, head_dim, kind), tolerance)


@EXAMPLES
@given(
    leading=st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3),
    k=st.sampled_from([1, 2, 7, 13, 32, 100]),
    n=st.sampled_from([1, 3, 11, 16, 70]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "rows sliced", "expanded"]),
    norm=st.sampled_from([None, "layer_norm", "rms_norm"]),
)
def test_any_shape_and_layout(leading: list[int], k: int, n: int, layout: str, norm: str | None) -> None:
    torch.manual_seed(0)
    inputs = draw_linear(tuple(leading), k, n, norm=norm)
    if norm is not None:
        inputs["x"] = inputs["x"] * 3 + 5
    for name, t in (("x", inputs["x"]), ("residual", torch.randn(*leading, n))):
        if layout == "transposed":
            t = t.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "sliced":
            t = torch.cat([t, t], dim=-1)[..., : t.shape[-1]]
        elif layout == "rows sliced" and len(leading) >= 2:
            t = torch.cat([t, t], dim=-2)[..., : t.shape[-2], :]
        elif layout == "expanded" and leading:
            t = t[:1].expand_as(t)
        inputs[name] = t
    residual = inputs.pop("residual")
    # A row of few elements may have nearly no variance, which a norm divides by.
    tolerance = 2e-5 if norm is None or k > 7 else 1e-2
    check(norm_linear_pair(norm, "gelu"), inputs, tolerance)
    inputs = {name: t for name, t in inputs.items() if not name.startswith("norm")}
    check(linear_residual_pair(), inputs | {"residual": residual, "row_mask": torch.rand(leading) < 0.5})


def test_a_mean_far_from_zero_cancels_nothing() -> None:
    x, weight = torch.randn(3, 700) + 1000, torch.randn(20, 700)
    with runtime.backend("triton"):
        ours = norm_linear(x.to(DEVICE), weight.to(DEVICE), norm=Norm("layer_norm")).cpu()
    exact = F.linear(F.layer_norm(x.double(), (700,)), weight.double())
    theirs = F.linear(F.layer_norm(x, (700,)), weight)
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


class TestDropout:
    @staticmethod
    def drop(x: Tensor, p: float, seed: int | None, **more: Any) -> Tensor:
        """The dropped x: the weight is the identity, and the residual 0."""
        eye, zero = torch.eye(x.shape[-1], device=DEVICE), torch.zeros_like(x)
        with runtime.backend("triton"):
            return linear_residual(x, eye, residual=zero, dropout_p=p, seed=seed, **more)

    def test_pattern(self) -> None:
        x = torch.ones(40, 33, device=DEVICE)
        out = self.drop(x, 0.3, 5)
        assert torch.equal(out, self.drop(x, 0.3, 5))
        assert not torch.equal(out, self.drop(x, 0.3, 6))
        assert not torch.equal(self.drop(x, 0.3, None), self.drop(x, 0.3, None))
        torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 0.7))
        assert 0.25 < (out == 0).float().mean() < 0.35
        assert (self.drop(x, 1.0, 5) == 0).all()

    @pytest.mark.parametrize("config", list(CONFIGS))
    def test_the_pattern_is_that_of_the_seed_alone(self, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.ones(20, 33, device=DEVICE)
        expected = self.drop(x, 0.3, 5)
        monkeypatch.setattr(configs, "config_for", lambda *_: CONFIGS[config])
        assert torch.equal(self.drop(x, 0.3, 5), expected)
        monkeypatch.setattr(configs, "plan", lambda *_: "vendor")
        assert torch.equal(self.drop(x, 0.3, 5), expected)

    @pytest.mark.parametrize("gate", [(), (33,)])
    def test_backward_drops_the_same(self, gate: tuple[int, ...]) -> None:
        x = torch.randn(12, 33, device=DEVICE, requires_grad=True)
        gates = torch.randn(gate, device=DEVICE, requires_grad=True)
        mask = torch.rand(12, device=DEVICE) < 0.6
        out = self.drop(x, 0.3, 5, gate=gates, row_mask=mask)
        kept = self.drop(torch.ones_like(x), 0.3, 5) * mask[:, None]
        expected = gates.tanh() * x * kept
        grad = torch.randn_like(out)
        torch.testing.assert_close(out, expected)
        for ours, theirs in zip(*(torch.autograd.grad(y, (x, gates), grad) for y in (out, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["norm_linear", "glu", "linear_residual", "residual_norm", "heads"])
def test_fp16_is_at_most_twice_as_wrong_as_the_peer(op: str) -> None:
    pairs = {
        "norm_linear": norm_linear_pair("layer_norm", "gelu"),
        "glu": norm_linear_pair("rms_norm", "swiglu"),
        "linear_residual": linear_residual_pair(),
        "residual_norm": residual_norm_pair("layer_norm", False, 0.0),
        "heads": head_norm_pair("rms_norm", 16),
    }

    def draw() -> Inputs:
        if op in ("norm_linear", "glu"):
            kind, activation = ("layer_norm", None) if op == "norm_linear" else ("rms_norm", "swiglu")
            return with_gate_weight(draw_linear((2, 8), 64, 48, norm=kind), activation)
        if op == "heads":
            return draw_heads((2, 8), 64, 3, 16, "rms_norm")
        if op == "linear_residual":
            return draw_linear_residual((2, 16), 64, None, (1,), True)
        return draw_residual_norm((2, 16), 64, "layer_norm", False)

    ours, theirs = pairs[op]
    check_low_precision(on_triton(ours), theirs, draw, torch.float16, draws=2)


def test_what_lies_beyond_is_not_read() -> None:
    def beyond(t: Tensor) -> Tensor:
        """The same values in the corner of a larger tensor of NaN."""
        larger = torch.full([size + 9 for size in t.shape], float("nan"), device=DEVICE)
        corner = larger[tuple(slice(size) for size in t.shape)]
        return corner.copy_(t)

    inputs = with_gate_weight(draw_linear((3, 5), 37, 41, norm="layer_norm"), "swiglu")
    clean = {name: t.to(DEVICE) for name, t in inputs.items()}
    ours = on_triton(norm_linear_pair("layer_norm", "swiglu")[0])
    assert torch.equal(ours(**clean), ours(**{name: beyond(t) for name, t in clean.items()}))
    inputs = draw_residual_norm((3, 5), 37, "layer_norm", False)
    clean = {name: t.to(DEVICE) for name, t in inputs.items()}
    dirty = {name: beyond(t) if t.is_floating_point() else t for name, t in clean.items()}
    ours = on_triton(residual_norm_pair("layer_norm", False, 0.0)[0])
    assert torch.equal(ours(**clean), ours(**dirty))


def test_the_branch_of_a_masked_row_may_be_nan() -> None:
    inputs = draw_linear_residual((4,), 11, None, (13,), True)
    inputs["row_mask"] = torch.tensor([True, False, True, False])
    inputs["x"][1] = float("nan")
    leaves = {name: t.to(DEVICE) for name, t in inputs.items()}
    for name in ("residual", "gate", "bias"):
        leaves[name].requires_grad_()
    with runtime.backend("triton"):
        out = linear_residual(**leaves)
    assert torch.equal(out[1::2], leaves["residual"][1::2])
    grads = torch.autograd.grad(out.sum(), [leaves[name] for name in ("residual", "gate", "bias")])
    assert all(g.isfinite().all() for g in grads)


def test_pure_and_repeatable() -> None:
    def twice(op: Op) -> Op:
        return lambda **inputs: op(**{name: t.float() if t.is_floating_point() else t for name, t in inputs.items()})

    check_pure(twice(on_triton(norm_linear_pair("layer_norm", "geglu")[0])),
               with_gate_weight(draw_linear((2, 5), 11, 13, norm="layer_norm"), "geglu"))  # fmt: skip
    inputs = draw_residual_norm((2, 5), 11, "rms_norm", False)
    check_pure(twice(on_triton(residual_norm_pair("rms_norm", False, 0.3)[0])), inputs)
    leaves = {name: t.to(DEVICE).requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    with runtime.backend("triton"):
        out = residual_norm_pair("rms_norm", False, 0.3)[0](**leaves)
    wanted = [t for t in leaves.values() if t.requires_grad]
    first, second = (torch.autograd.grad(out.square().sum(), wanted, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_frozen_weights_keep_nothing_of_x() -> None:
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    weight, kept = torch.randn(12, 16, device=DEVICE), []
    with (
        runtime.backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t),  # type: ignore[func-returns-value]
    ):
        out = linear_residual(x, weight, residual=torch.zeros(5, 12, device=DEVICE))
    assert kept == [weight.data_ptr()]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], weight.sum(0).expand(5, -1))


class TestTraced:
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_one_graph_forward_and_backward(self, dropout_p: float) -> None:
        inputs = draw_residual_norm((2, 5), 11, "layer_norm", False) | {"up": torch.randn(11, 13)}
        leaves = {name: t.to(DEVICE).requires_grad_(t.is_floating_point()) for name, t in inputs.items()}

        def call(up: Tensor, residual: Tensor, gain: Tensor, shift: Tensor, x: Tensor, **more: Tensor) -> Tensor:
            norm = Norm("layer_norm", gain, shift)
            hidden = norm_linear(residual, up, norm=norm, activation="gelu") + x
            return linear_residual(
                hidden, residual=residual, residual_norm=norm, dropout_p=dropout_p, seed=5, **more
            ) + 1  # fmt: skip

        torch._dynamo.reset()
        with runtime.backend("triton"):
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(**leaves)
            out = call(**leaves)
        wanted = [t for t in leaves.values() if t.requires_grad]
        assert torch.equal(out, compiled)
        grads = (torch.autograd.grad(y.square().sum(), wanted) for y in (out, compiled))
        assert all(map(torch.equal, *grads))

    def test_opcheck(self) -> None:
        def some(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE, requires_grad=True)

        x, weight, bias = some(2, 5, 12), some(16, 12), some(16)
        nothing = registered._NO_GROUP
        normed = Group(x, weight, bias, some(12), some(12))
        added = Group(x, weight, bias, None, None, some(2, 5, 16), some(16), some(16))
        plain = added._replace(rnorm_weight=None, rnorm_bias=None)
        mask = torch.rand(2, 5, device=DEVICE) < 0.5
        calls = (
            (*normed, *nothing, *Extras(), "layer_norm", "", "gelu", 0.0),
            (*normed, *nothing, *Extras(gate_weight=some(16, 12)), "layer_norm", "", "swiglu", 0.0),
            (*normed, *nothing, *Extras(head_weight=some(8)), "layer_norm", "", "", 0.0),
            (*plain, *nothing, *Extras(gate=some(16), row_mask=mask), "", "", "", 0.3),
            (*added, *added, *Extras(), "", "layer_norm", "", 0.3),
        )
        for *tensors, norm, rnorm, activation, dropout_p in calls:
            numbers = (torch.tensor(7), norm, 1e-5, 1e-5, rnorm, 1e-5, 1e-5, activation, 1e-6, dropout_p)
            torch.library.opcheck(registered.linear_op, (*tensors, *numbers, True, True))


def test_autocast_is_that_of_the_reference() -> None:
    x, residual = torch.randn(2, 5, 16, device=DEVICE), torch.randn(2, 5, 12, device=DEVICE)
    weight, bias, gain = (torch.randn(shape, device=DEVICE) for shape in ((12, 16), (12,), (16,)))
    for dtype in (torch.float32, torch.float16):
        outs = []
        for backend in ("torch", "triton"):
            with runtime.backend(backend), torch.autocast(DEVICE, torch.float16):
                h = norm_linear(x.to(dtype), weight, bias, norm=Norm("rms_norm", gain), activation="silu")
                outs.append((h, linear_residual(x.to(dtype), weight, bias, residual=residual)))
        for ours, theirs in zip(*outs, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=5e-3, atol=5e-3)


def test_what_the_kernels_cannot_serve_goes_to_the_reference() -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    wide = torch.randn(600, 8, device=DEVICE)
    calls: tuple[Any, ...] = (
        lambda: norm_linear(x.double(), weight.double()),
        lambda: norm_linear(x[:, :0], weight[:, :0]),
        lambda: norm_linear(x, wide, head_norm=Norm("rms_norm", wide[:300, 0])),
        lambda: linear_residual(x, weight, residual=x.double()[:, :6]),
    )
    for call in calls:
        with runtime.backend("triton"), pytest.raises(runtime.BackendUnavailableError, match="the Triton kernels"):
            call()
        assert call().isfinite().all()


def test_the_launchers_take_whole_calls() -> None:
    x, weight = torch.randn(2, 9, 32, device=DEVICE), torch.randn(16, 32, device=DEVICE)
    call = ((Group(x, weight),), Extras(), Numbers(activation="relu"))
    expected = F.relu(F.linear(x, weight))
    for config in CONFIGS.values():
        out, saved = triton_launch.forward(*call, saving=True, config=config)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert saved.pre is not None
        torch.testing.assert_close(saved.pre, F.linear(x, weight).view(18, 16), rtol=1e-4, atol=1e-4)


def test_choice() -> None:
    """One row streams W over about as many programs as there are multiprocessors; many rows fill tensor cores."""
    for features, width in ((2048, 8192), (8192, 2048), (4096, 16384)):
        config = configs.config_for("sm_90", configs.Problem((1,), features, width))
        assert config.BM == 8
        assert config.SPLITS == 1
        assert 100 <= -(-features // config.BN) <= 600
        assert (config.num_stages - 1) * config.step * config.BN * 2 >= 30_000  # bytes of W under way
    assert configs.config_for("sm_90", configs.Problem((2048,), 3072, 768)).BM == 128
    assert configs.config_for("gfx942", configs.Problem((1,), 2048, 2048)).BM == 16
    # Few heads and a long K: parts of it. With 32 heads a query projection stays one launch.
    assert configs.config_for("sm_90", configs.Problem((1,), 1024, 4096, head=128)).SPLITS > 1
    assert configs.config_for("sm_90", configs.Problem((1,), 4096, 4096, head=128)).SPLITS == 1
    few, many = (configs.Problem((rows,), 8192, 4096, normed=True, bent=True) for rows in (128, 8192))
    assert (configs.plan("sm_90", few), configs.plan("sm_90", many)) == ("fused", "vendor")

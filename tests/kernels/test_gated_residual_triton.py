"""The Triton kernels of gated_residual against the definition in fp64; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.gated_residual import configs, gated_residual, triton_op
from tests.kernels.test_gated_residual import GATES, draw_inputs, upstream
from tests.kernels.triton_device import DEVICE, INTERPRETING, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")

Inputs = dict[str, Tensor]
FLOATS = ("residual", "branch", "gate")


def on_triton(inputs: Inputs) -> Tensor:
    with runtime.backend("triton"):
        return gated_residual(**inputs)


def moved(inputs: Inputs, dtype: torch.dtype | None, device: str = DEVICE) -> Inputs:
    """Leaves of the same values and strides; the row mask as it is."""
    return {
        name: t.detach().to(device, dtype or t.dtype).requires_grad_() if name in FLOATS else t.to(device)
        for name, t in inputs.items()
    }


def results(out: Tensor, inputs: Inputs, grad: Tensor) -> list[Tensor]:
    """Output and gradients, in fp64 on the CPU."""
    found = torch.autograd.grad(out, [inputs[name] for name in FLOATS], grad.to(out), retain_graph=True)
    assert all(g.dtype == inputs[name].dtype for g, name in zip(found, FLOATS, strict=True))
    return [t.detach().cpu().double() for t in (out, *found)]


def check(inputs: Inputs) -> None:
    mine, theirs = moved(inputs, torch.float32), moved(inputs, torch.float64, "cpu")
    out, expected = on_triton(mine), upstream(**theirs)
    assert out.is_contiguous()
    grad = torch.randn(expected.shape)
    for ours, reference in zip(results(out, mine, grad), results(expected, theirs, grad), strict=True):
        scale = max(reference.abs().max().item(), 1.0) if reference.numel() else 1.0
        # A scalar gate's gradient is one sum of everything, much smaller than its terms.
        scale *= 10 if reference.numel() == 1 else 1
        torch.testing.assert_close(ours, reference, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 8), (1, 5, 37), (1, 7, 1030), (0, 3, 8), (2, 0, 5)])
def test_equals_the_definition(shape: tuple[int, ...], gate: str, masked: bool) -> None:
    check(draw_inputs(*shape, gate=gate, masked=masked))


@settings(max_examples=30 if INTERPRETING else 200)
@given(
    leading=st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3),
    width=st.sampled_from([1, 2, 13, 32]),
    gate=st.sampled_from(["[]", "[1]", "[D]"]),
    masked=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "columns", "rows", "expanded"]),
)
def test_any_shape_and_layout(leading: list[int], width: int, gate: str, masked: bool, layout: str) -> None:
    torch.manual_seed(0)
    inputs = draw_inputs(*leading, width, gate=gate, masked=masked)
    for name in ("residual", "branch"):
        t = inputs[name]
        last = len(leading) - 1
        if layout == "transposed":
            inputs[name] = t.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "columns":
            inputs[name] = torch.cat([t, torch.full_like(t, torch.nan)], dim=-1)[..., :width]
        elif layout == "rows" and leading:
            inputs[name] = torch.cat([t, torch.full_like(t, torch.nan)], dim=last).narrow(last, 0, leading[-1])
        elif layout == "expanded" and leading:
            inputs[name] = t[:1].expand_as(t)
    check(inputs)


@pytest.mark.parametrize("gate", ["[1]", "[D]"])
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("BM", [1, 4])
def test_programs_share_out_the_rows(BM: int, programs: int, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "programs_for", lambda *_: programs)
    monkeypatch.setattr(configs, "config_for", lambda *_: configs.Config(BM, 16, 4))
    check(draw_inputs(29, 40, gate=gate, masked=True))


@pytest.mark.parametrize("gate", GATES)
def test_masked_rows_are_the_residual_whatever_the_branch_holds(gate: str) -> None:
    inputs = draw_inputs(2, 6, 8, gate=gate, masked=True)
    hidden = ~inputs["row_mask"]
    clean = moved(inputs, torch.float32)
    inputs["branch"][hidden] = float("nan")
    dirty = moved(inputs, torch.float32)
    grad = torch.randn(2, 6, 8)
    mine, theirs = (results(on_triton(leaves), leaves, grad) for leaves in (dirty, clean))
    assert all(map(torch.equal, mine, theirs))
    assert torch.equal(mine[0][hidden], inputs["residual"].double()[hidden])
    assert (mine[2][hidden] == 0).all()


def test_all_rows_masked() -> None:
    inputs = draw_inputs(2, 3, 8, gate="[D]") | {"row_mask": torch.zeros(2, 3, dtype=torch.bool)}
    leaves = moved(inputs, torch.float32)
    out, d_residual, d_branch, d_gate = results(on_triton(leaves), leaves, torch.ones(2, 3, 8))
    assert torch.equal(out, inputs["residual"].double())
    assert (d_residual == 1).all()
    assert (d_branch == 0).all()
    assert (d_gate == 0).all()


@pytest.mark.parametrize("value", [-30.0, -0.3, -1e-4, 0.0, 1e-6, 0.2, 0.25, 4.0, 100.0])
def test_tanh(value: float) -> None:
    residual, branch = torch.zeros(1, 4, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    gate = torch.tensor([value], device=DEVICE)
    expected = gate.double().tanh().expand(1, 4)
    out = on_triton({"residual": residual, "branch": branch, "gate": gate})
    torch.testing.assert_close(out.double(), expected, rtol=4e-7, atol=0)


@pytest.mark.parametrize("gate", ["[1]", "[D]"])
def test_fp16_is_as_good_as_upstream(gate: str) -> None:
    for masked in (False, True):
        check_low_precision([draw_inputs(3, 16, 64, gate=gate, masked=masked) for _ in range(4)], torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["[1]", "[D]"])
@pytest.mark.parametrize("width", [2048, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_as_good_as_upstream_on_a_gpu(dtype: torch.dtype, width: int, gate: str) -> None:
    check_low_precision([draw_inputs(4, 200, width, gate=gate, masked=True) for _ in range(4)], dtype)


def check_low_precision(draws: list[Inputs], dtype: torch.dtype) -> None:
    """For output and gradients, our RMS error over all draws is at most twice upstream's own, but for a last rounding."""
    pooled = []
    for inputs in draws:
        rounded = {name: t.to(dtype) if name in FLOATS else t for name, t in inputs.items()}
        grad = torch.randn(inputs["residual"].shape).to(dtype)
        ours, theirs, wide = moved(rounded, None), moved(rounded, None, "cpu"), moved(rounded, torch.float64, "cpu")
        pooled.append(
            (
                results(on_triton(ours), ours, grad),
                results(upstream(**theirs), theirs, grad),
                results(upstream(**wide), wide, grad),
            )
        )
    for i in range(4):
        mine, upstreams, exact = (torch.cat([draw[k][i].flatten() for draw in pooled]) for k in range(3))
        rounding = torch.finfo(dtype).eps / 4 * exact.norm()
        assert (mine - exact).norm() <= 2 * (upstreams - exact).norm() + rounding


def test_dtypes_promote_without_the_gate() -> None:
    residual, branch = torch.randn(2, 3, 8, device=DEVICE), torch.randn(2, 3, 8, device=DEVICE).half()
    gate = torch.randn(1, device=DEVICE)
    inputs = {"residual": residual, "branch": branch, "gate": gate}
    mixed = on_triton(inputs)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, upstream(residual, branch.float(), gate))
    assert on_triton(inputs | {"residual": residual.half()}).dtype == torch.float16
    leaves = moved(inputs, None)
    results(on_triton(leaves), leaves, torch.ones(2, 3, 8))  # which checks the gradients' dtypes


@pytest.mark.parametrize("wanted", FLOATS)
def test_only_the_gradient_that_is_wanted(wanted: str) -> None:
    inputs = draw_inputs(2, 6, 8, masked=True)
    everything = moved(inputs, torch.float32)
    grad = torch.randn(2, 6, 8, device=DEVICE)
    on_triton(everything).backward(grad)
    only = {name: t.detach() for name, t in everything.items()}
    only[wanted].requires_grad_()
    on_triton(only).backward(grad)
    mine, theirs = only[wanted].grad, everything[wanted].grad
    assert mine is not None
    assert theirs is not None
    assert torch.equal(mine, theirs)


def test_two_runs_are_bitwise_equal_and_write_into_nothing() -> None:
    leaves = moved(draw_inputs(40, 24, gate="[D]", masked=True), torch.float32)
    before = {name: t.detach().clone() for name, t in leaves.items()}
    grad = torch.randn(40, 24)
    runs = [results(on_triton(leaves), leaves, grad) for _ in range(3)]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))
    assert all(torch.equal(t, before[name]) for name, t in leaves.items())


class TestTraced:
    @pytest.mark.parametrize("gate", ["[1]", "[1, 1, D]"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_one_graph_forward_and_backward(self, gate: str, masked: bool) -> None:
        leaves = moved(draw_inputs(2, 5, 8, gate=gate, masked=masked), torch.float32)

        def call(leaves: Inputs) -> Tensor:
            return gated_residual(**leaves | {"branch": leaves["branch"] * 2}) + 1

        torch._dynamo.reset()
        with runtime.backend("triton"):
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(leaves)
            out = call(leaves)
        grad = torch.randn(out.shape)
        assert torch.equal(out, compiled)
        assert all(map(torch.equal, results(out, leaves, grad), results(compiled, leaves, grad)))

    @pytest.mark.parametrize("gate", ["[]", "[D]"])
    @pytest.mark.parametrize("frozen", [(), ("gate",), ("branch",)])
    def test_opcheck(self, gate: str, frozen: tuple[str, ...]) -> None:
        leaves = moved(draw_inputs(2, 5, 8, gate=gate, masked=True), torch.float16)
        for name in frozen:
            leaves[name] = leaves[name].detach()
        torch.library.opcheck(triton_op.gated_residual_op, tuple(leaves.values()))


def test_fp64_goes_to_torch() -> None:
    inputs = {name: t.double().to(DEVICE) for name, t in draw_inputs(2, 3, 8).items()}
    with pytest.raises(runtime.BackendUnavailableError, match="the Triton kernels of gated_residual take"):
        on_triton(inputs)
    assert gated_residual(**inputs).dtype == torch.float64

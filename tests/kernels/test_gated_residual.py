"""gated_residual against the expressions of open_flamingo and Idefics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.gated_residual import gated_residual
from tests.kernels.op_checks import Inputs, check_exact, check_low_precision, check_pure, run

GATES = ["[]", "[1]", "[D]", "[1, 1, D]"]


def draw_inputs(*shape: int, gate: str = "[1]", masked: bool = False) -> Inputs:
    inputs = {"residual": torch.randn(shape), "branch": torch.randn(shape)}
    inputs["gate"] = torch.randn({"[]": (), "[1]": (1,), "[D]": (shape[-1],), "[1, 1, D]": (1, 1, shape[-1])}[gate])
    if masked:
        inputs["row_mask"] = torch.rand(shape[:-1]) < 0.5
    return inputs


def upstream(residual: Tensor, branch: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """The expression of Idefics, which has the row mask; without one, that of open_flamingo."""
    if row_mask is not None:
        branch = branch.masked_fill((~row_mask).unsqueeze(-1), 0.0)
        return residual + torch.tanh(gate) * branch
    return branch * gate.tanh() + residual


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 8), (2, 1, 4, 13), (1, 5, 37), (0, 3, 8), (2, 0, 5)])
def test_equals_upstream_in_fp64(shape: tuple[int, ...], gate: str, masked: bool) -> None:
    check_exact(gated_residual, upstream, draw_inputs(*shape, gate=gate, masked=masked))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, gate: str) -> None:
    for masked in (False, True):
        check_low_precision(
            gated_residual, upstream, lambda masked=masked: draw_inputs(3, 16, 64, gate=gate, masked=masked), dtype
        )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_same_with_and_without_gradients(dtype: torch.dtype, gate: str) -> None:
    inputs = {name: t.to(dtype) for name, t in draw_inputs(2, 5, 16, gate=gate).items()}
    with_grad = gated_residual(**inputs)
    with torch.no_grad():
        without = gated_residual(**inputs)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(without, with_grad, rtol=eps, atol=2 * eps)


def test_masked_rows_are_the_residual_whatever_the_branch_holds() -> None:
    inputs = draw_inputs(2, 6, 8, masked=True)
    hidden = ~inputs["row_mask"]
    inputs["branch"][hidden] = float("nan")
    results = run(gated_residual, inputs, torch.float64)
    assert torch.equal(results["output 0"][hidden], inputs["residual"].double()[hidden])
    assert all(t.isfinite().all() for t in results.values())
    assert (results["d branch"][hidden] == 0).all()
    with torch.no_grad():
        assert torch.equal(gated_residual(**inputs)[hidden], inputs["residual"][hidden])


def test_a_gate_of_zero_is_the_identity() -> None:
    inputs = draw_inputs(2, 3, 8)
    inputs["gate"].zero_()
    assert torch.equal(gated_residual(**inputs), inputs["residual"])


def test_tanh_is_taken_in_fp32() -> None:
    # tanh(4) = 0.99933 would be 1 in bf16, the dtype of the gate.
    residual, branch = torch.zeros(1, 8), torch.full((1, 8), 1000.0)
    gate = torch.tensor([4.0]).bfloat16()
    torch.testing.assert_close(gated_residual(residual, branch, gate), torch.full((1, 8), 999.3293))


@pytest.mark.parametrize("grad", [False, True])
def test_dtypes_promote_without_the_gate(grad: bool) -> None:
    residual, branch, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(1)
    with torch.set_grad_enabled(grad):
        assert gated_residual(residual.bfloat16(), branch.bfloat16(), gate).dtype == torch.bfloat16
        assert gated_residual(residual.bfloat16(), branch.bfloat16(), gate.expand(8)).dtype == torch.bfloat16
        mixed = gated_residual(residual, branch.bfloat16(), gate)
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, upstream(residual, branch.bfloat16().float(), gate))


def test_autocast_keeps_an_fp32_residual_stream() -> None:
    residual, branch, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16(), torch.randn(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = gated_residual(residual, branch, gate), upstream(residual, branch, gate)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str) -> None:
    inputs = draw_inputs(1, 3, 4, gate=gate, masked=True)
    arguments = [inputs[name].double().requires_grad_() for name in ("residual", "branch", "gate")]
    assert torch.autograd.gradcheck(lambda r, b, g: gated_residual(r, b, g, inputs["row_mask"]), arguments)


@settings(max_examples=40)
@given(
    leading=st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3),
    features=st.sampled_from([1, 2, 7, 13, 32]),
    gate=st.sampled_from(["[]", "[1]", "[D]"]),
    masked=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
)
def test_any_shape_and_layout(leading: list[int], features: int, gate: str, masked: bool, layout: str) -> None:
    torch.manual_seed(0)
    inputs = draw_inputs(*leading, features, gate=gate, masked=masked)
    for name in ("residual", "branch"):
        t = inputs[name]
        if layout == "transposed":
            inputs[name] = t.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "sliced":
            inputs[name] = torch.cat([t, t], dim=-1)[..., :features]
        elif layout == "expanded" and leading:
            inputs[name] = t[:1].expand_as(t)
    check_exact(gated_residual, upstream, inputs)
    check_pure(gated_residual, inputs)


def test_errors_name_what_was_wrong() -> None:
    x, gate = torch.randn(2, 3, 8), torch.ones(1)
    with pytest.raises(ValueError, match=r"branch has shape \(3, 8\), but residual has shape \(2, 3, 8\)"):
        gated_residual(x, x[0], gate)
    with pytest.raises(ValueError, match=r"gate has shape \(3,\), but residual has shape \(2, 3, 8\).*8 values"):
        gated_residual(x, x, torch.ones(3))
    with pytest.raises(ValueError, match=r"gate has shape \(8, 1\)"):
        gated_residual(x, x, torch.ones(8, 1))
    with pytest.raises(ValueError, match=r"row_mask has shape \(3,\).*expected \(2, 3\)"):
        gated_residual(x, x, gate, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"row_mask must be bool.*float32"):
        gated_residual(x, x, gate, torch.ones(2, 3))


def test_registered() -> None:
    assert "gated_residual" in {op.name for op in runtime.ops()}

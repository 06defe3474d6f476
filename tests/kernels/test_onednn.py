"""GEMMs that call oneDNN equal F.linear's in values and derivatives, and are chosen only where they may be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fast.kernels.linear import norm_linear, onednn, reference
from tests.kernels.op_checks import CountOps

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def _slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_mkl_is_slow", lambda: True)


def draw(m: int = 96, k: int = 128, n: int = 160) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*shape, requires_grad=True) for shape in ((m, k), (n, k), (n,)))


@pytest.mark.usefixtures("_slow_mkl")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients(bias: bool, strided: bool) -> None:
    x, w, b = draw()
    b = b if bias else None
    rows = torch.randn(96, 256, requires_grad=True)[:, :128] if strided else x
    assert onednn.serves(rows, w, b)
    ours, theirs = reference.linear(rows, w, b), F.linear(rows, w, b)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    leaves = [t for t in (rows, w, b) if t is not None]
    for cotangent in (torch.randn_like(ours), torch.ones(()).expand_as(ours)):
        for mine, expected in zip(
            torch.autograd.grad(ours, leaves, cotangent, retain_graph=True),
            torch.autograd.grad(theirs, leaves, cotangent, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(not onednn._has_bf16(), reason="oneDNN has no bf16 GEMM for this processor")
def test_bf16_inference_adds_the_bias_inside_the_gemm() -> None:
    x, w, b = (t.detach().bfloat16() for t in draw())
    with CountOps() as counted:
        y = reference.linear(x, w, b)
    assert set(counted.counts) <= {"_linear_pointwise", "view"}
    exact = F.linear(x.double(), w.double(), b.double())
    ours, theirs = ((t - exact).square().mean().sqrt() for t in (y, F.linear(x, w, b)))
    assert ours <= 1.1 * theirs


@pytest.mark.usefixtures("_slow_mkl")
def test_second_derivatives_and_frozen_weights() -> None:
    x, w, _ = draw()
    found = []
    for linear in (reference.linear, F.linear):
        (first,) = torch.autograd.grad(linear(x, w, None).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), w)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-2 * found[1].abs().max().item())
    frozen = w.detach()
    reference.linear(x, frozen, None).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(96, 160) @ frozen, rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("_slow_mkl")
@pytest.mark.parametrize("trained", ["xwb", "xw", "wb", "xb", "x", "w", "b"])
def test_keeps_what_its_gradients_need(trained: str) -> None:
    """The input for the weight's gradient, the weight for the input's: a frozen layer keeps nothing of its input."""
    given = {name: t.detach().requires_grad_(name in trained) for name, t in zip("xwb", draw(), strict=True)}
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = reference.linear(*given.values())
    needed = {given[name].data_ptr() for name, other in (("x", "w"), ("w", "x")) if other in trained}
    assert set(kept) == needed
    leaves = [given[name] for name in trained]
    expected = torch.autograd.grad(F.linear(*given.values()).square().sum(), leaves)
    for mine, theirs in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-3 * theirs.abs().max().item())


@pytest.mark.usefixtures("_slow_mkl")
def test_is_one_gemm_over_all_rows() -> None:
    x, w, b = (t.detach() for t in draw())
    with CountOps() as counted:
        y = norm_linear(x.view(4, 24, 128)[:, :20], w, b)
    assert counted.counts["_linear_pointwise"] == 1
    torch.testing.assert_close(y, F.linear(x.view(4, 24, 128)[:, :20], w, b), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("_slow_mkl")
def test_what_it_does_not_serve() -> None:
    x, w, b = (t.detach() for t in draw())
    assert onednn.serves(x, w, b)
    assert not onednn.serves(x.double(), w.double(), b.double())
    assert not onednn.serves(x.half(), w.half(), b.half())
    assert not onednn.serves(x.bfloat16(), w.bfloat16(), None)
    assert not onednn.serves(x.bfloat16().requires_grad_(), w.bfloat16(), b.bfloat16())
    assert not onednn.serves(x, w, b.double())
    assert not onednn.serves(x[:2], w, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.serves(x, w, b)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.serves(x, w, b)
    seen: list[bool] = []

    def probe(row: Tensor) -> Tensor:
        seen.append(onednn.serves(x, w, b))
        return row

    torch.vmap(probe)(torch.ones(3))
    assert seen == [False]

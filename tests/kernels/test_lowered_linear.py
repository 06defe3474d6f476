"""Trained fp32 weights under autocast on a CPU: autocast's own numbers, without its copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mllm_fast
from mllm_fast import ops
from mllm_fast.kernels.linear import lowered, lowers_by_panels
from mllm_fast.modules import PerceiverResampler


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered, "LEAST", 1)
    monkeypatch.setattr(lowered, "PANEL", 700)


def draw(*shape: int, seed: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def gradients(y: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    wanted = [t for t in inputs if t is not None]
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 37, 53), (7, 130, 64), (5, 3, 900), (0, 40, 40)])
def test_numbers_of_autocast(rows: int, width: int, columns: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight = draw(2, rows, columns, seed=0), draw(width, columns, seed=1)
    b = draw(width, seed=2) if bias else None
    with torch.autocast("cpu", dtype):
        assert lowers_by_panels(x, weight)
        ours = gradients(ops.norm_linear(x, weight, b), x, weight, b)
        theirs = gradients(F.linear(x, weight, b), x, weight, b)
    exact = gradients(F.linear(x.double(), weight.double(), None if b is None else b.double()), x, weight, b)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert (mine - true).norm() <= 1.1 * (other - true).norm() + 1e-6 * true.norm()


def test_weights_that_are_not_rows_of_memory() -> None:
    x, weight = draw(6, 20, seed=0), draw(20, 31, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(lowered.linear(x, weight.mT, None), x, weight)
        theirs = gradients(F.linear(x, weight.mT), x, weight)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-2, atol=1e-2)


def test_only_what_is_trained_counts() -> None:
    x, weight = draw(6, 20, seed=0), draw(31, 20, seed=1)
    frozen, low = weight.detach(), weight.detach().bfloat16().requires_grad_()
    assert not lowers_by_panels(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not lowers_by_panels(x, frozen)
        assert not lowers_by_panels(x, low)
        assert not lowers_by_panels(x.double(), weight)
        with torch.no_grad():
            assert not lowers_by_panels(x, weight)
        lowered.LEAST = weight.numel() + 1
        assert not lowers_by_panels(x, weight)


def test_no_copy_of_the_weight_is_kept() -> None:
    x, weight = draw(6, 20, seed=0), draw(31, 20, seed=1)
    kept: list[Any] = []

    def keep(t: Tensor) -> Tensor:
        kept.append((tuple(t.shape), t.dtype))
        return t

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ops.norm_linear(x, weight, None)
    assert kept == [((6, 20), torch.bfloat16), ((31, 20), torch.float32)]


def test_a_resampler_trained_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps no stacks of its weights, and computes what it computes with them."""
    torch.manual_seed(0)
    resampler = PerceiverResampler(16, depth=2, heads=2, head_dim=8, latents=3)
    for parameter in resampler.parameters():
        nn.init.normal_(parameter, std=0.3)
    mllm_fast.unfuse(resampler)
    media = draw(2, 5, 16, seed=3)
    found = []
    for least in (1, 1 << 40):
        monkeypatch.setattr(lowered, "LEAST", least)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(resampler(media), media, *resampler.parameters()))
    exact = gradients(resampler(media), media, *resampler.parameters())
    for mine, stacked, true in zip(*found, exact, strict=True):
        assert (mine - true).norm() <= 2 * (stacked - true).norm() + 1e-2 * true.norm() + 1e-3

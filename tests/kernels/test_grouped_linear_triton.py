"""The Triton kernels of grouped_linear and stacked_linear against the definitions; on a GPU, or in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.linear import configs, grouped_linear
from mllm_fast.kernels.linear.configs import Config
from mllm_fast.kernels.norm import Norm
from tests.kernels.op_checks import check_low_precision
from tests.kernels.test_grouped_linear import (
    deferred,
    draw,
    draw_deferred,
    first_half,
    plain,
    second_half,
    undeferred,
)
from tests.kernels.test_linear_triton import check, on_triton
from tests.kernels.test_stacked import FULL, NOTHING, PLAIN, SCALE, draw_layers, pair
from tests.kernels.triton_device import DEVICE, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = [(4,), (3, 5), (1, 1), (2, 0), (0, 3), (0, 0), (2, 3, 4), (1, 0, 2, 3)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("split", [False, True])
def test_groups(sizes: tuple[int, ...], split: bool) -> None:
    check((first_half(sizes, "gelu", split), plain(sizes, "gelu")), draw(sizes))
    check((second_half(sizes, split), plain(sizes)), draw(sizes, residual=True))
    if sum(sizes):
        check((deferred(sizes), undeferred(sizes)), draw_deferred(sizes, 7))


@pytest.mark.parametrize("config", [Config(16, 16, 16), Config(8, 16, 16, SLICES=2), Config(32, 32, 32)])
def test_configurations(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "config_for", lambda *_: config)
    sizes = (21, 13)
    check((deferred(sizes), undeferred(sizes)), draw_deferred(sizes, 37))


@pytest.mark.parametrize("case", ["kinds", "affine parts", "features"])
def test_groups_that_differ(case: str) -> None:
    """Those that cannot share a launch give the same as those that can."""
    x = [torch.randn(2, rows, 6, device=DEVICE) for rows in (3, 4)]
    weights = [torch.randn(9, 6, device=DEVICE), torch.randn(9, 6, device=DEVICE)]
    gain = torch.randn(6, device=DEVICE)
    norms: Sequence[Norm | None] = [Norm("layer_norm", gain), Norm("rms_norm", gain)]
    if case == "affine parts":
        norms = [Norm("layer_norm", gain), Norm("layer_norm")]
    if case == "features":
        norms = [None, None]
        x[1], weights[1] = torch.randn(2, 4, 5, device=DEVICE), torch.randn(9, 5, device=DEVICE)
    results = []
    for backend in ("torch", "triton"):
        with runtime.backend(backend):
            results.append(grouped_linear(x, weights, activation="relu", input_norms=norms, joined=False))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_slices_of_anything() -> None:
    """Groups that are slices of tensors of different strides, in a batch of two dimensions."""
    batch = torch.randn(3, 2, 11, 6, device=DEVICE)
    x = [batch[:, :, :4], batch.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 4:9]]
    residual = [
        torch.randn(2, 4, 9, device=DEVICE).expand(3, -1, -1, -1),
        torch.randn(3, 2, 5, 18, device=DEVICE)[..., ::2],
    ]
    weights = [torch.randn(9, 6, device=DEVICE) for _ in range(2)]
    results = []
    for backend in ("torch", "triton"):
        with runtime.backend(backend):
            results.append(grouped_linear(x, weights, residual=residual))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 2)])
def test_dropout(sizes: tuple[int, ...]) -> None:
    def run(x: Tensor, seed: int | None) -> Tensor:
        residual, eye = torch.zeros_like(x), torch.eye(16, device=DEVICE)
        with runtime.backend("triton"):
            weights = [eye] * len(sizes)
            return grouped_linear(x, weights, sizes=sizes, residual=residual, dropout_p=0.4, seed=seed)

    x = torch.randn(2, 7, 16, device=DEVICE, requires_grad=True)
    out, pattern = run(x, 3), run(torch.ones_like(x), 3)
    assert torch.equal(out, run(x, 3))
    assert not torch.equal(run(x, None), run(x, None))
    torch.testing.assert_close(out, x * pattern)
    # No group, and no batch row, repeats another's pattern.
    rows = (pattern != 0).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], pattern)


def test_fp16_is_at_most_twice_as_wrong_as_the_peer() -> None:
    check_low_precision(
        on_triton(deferred((4, 7))), undeferred((4, 7)), lambda: draw_deferred((4, 7), 32), torch.float16, draws=2
    )


def test_one_graph_forward_and_backward() -> None:
    sizes = (2, 3, 4)
    leaves = {name: t.to(DEVICE).requires_grad_() for name, t in draw_deferred(sizes, 7).items()}
    torch._dynamo.reset()
    with runtime.backend("triton"):
        outs = [
            f(**leaves) for f in (deferred(sizes), torch.compile(deferred(sizes), backend="aot_eager", fullgraph=True))
        ]
    assert torch.equal(*outs)
    grads = (torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in outs)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kinds", [(FULL, NOTHING, SCALE), (PLAIN, PLAIN, PLAIN)])
@pytest.mark.parametrize("plan", ["fused", "vendor"])
def test_stacked(kinds: tuple[str, ...], plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "plan", lambda *_: plan)

    def dense(*args: Any) -> tuple[Any, Any]:
        return pair(*args)

    for family in ("layer_norm", "rms_norm"):
        # An RMS norm has no shift.
        given = kinds if family == "layer_norm" else tuple(SCALE if kind == FULL else kind for kind in kinds)
        check(dense(given, family), draw_layers(given, k=16))

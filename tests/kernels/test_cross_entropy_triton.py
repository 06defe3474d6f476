"""The kernel of frozen_cross_entropy against its definition."""

from __future__ import annotations

import pytest
import torch

from mllm_fast.kernels.cross_entropy import frozen_cross_entropy, reference, triton_rows
from mllm_fast.kernels.runtime import BackendUnavailableError, backend
from tests.kernels.triton_device import DEVICE, INTERPRETING, require_triton

require_triton()

DTYPES = [torch.float32, torch.float16] if INTERPRETING else [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 64, 1000, 4096, 5003])
@pytest.mark.parametrize("options", [(0.0, None), (0.1, None), (0.0, 2.0), (1.0, 5.0)])
def test_equals_the_definition(dtype: torch.dtype, size: int, options: tuple[float, float | None]) -> None:
    rows = 3
    full = torch.full((rows, size + 3), float("nan"), dtype=dtype, device=DEVICE)
    full[:, :size] = 4 * torch.randn(rows, size)
    logits, targets = full[:, :size], torch.randint(size, (rows,), device=DEVICE)
    exact, d_exact = reference.chunk_loss(logits.double(), targets, *options, True)
    assert d_exact is not None
    alone, none = triton_rows.chunk_loss(logits.clone(), targets, *options, False)
    loss, d = triton_rows.chunk_loss(logits, targets, *options, True)
    assert none is None
    assert d is not None and d.data_ptr() == logits.data_ptr()
    assert full[:, size:].isnan().all()
    torch.testing.assert_close(alone, loss, rtol=0, atol=0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.double(), d_exact, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 2e-3)


def test_a_target_at_minus_infinity_and_a_huge_row() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 1.0], [1e4, -1e4, 0.0]], device=DEVICE)
    targets = torch.tensor([2, 1], device=DEVICE)
    exact, d_exact = reference.chunk_loss(logits.double(), targets, 0.0, None, True)
    loss, d = triton_rows.chunk_loss(logits, targets, 0.0, None, True)
    assert d is not None and d_exact is not None
    torch.testing.assert_close(loss.double(), exact)
    torch.testing.assert_close(d.double(), d_exact, rtol=1e-5, atol=1e-6)


def test_the_op_runs_it() -> None:
    hidden = torch.randn(2, 9, 16, device=DEVICE, requires_grad=True)
    weight, labels = torch.randn(300, 16, device=DEVICE), torch.randint(300, (2, 9), device=DEVICE)
    labels[0, :4] = -100
    results = []
    for name in ("triton", "torch"):
        with backend(name):
            loss = frozen_cross_entropy(hidden, weight, labels, shift=True)
            results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    with backend("triton"), pytest.raises(BackendUnavailableError, match="float64"):
        frozen_cross_entropy(hidden.double(), weight.double(), labels)

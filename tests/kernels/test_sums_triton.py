"""column_sums, the second stage of gradients that are sums over rows; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from mllm_fast.kernels.sums import column_sums
from tests.kernels.triton_device import DEVICE, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    ("parts", "columns"), [(1, 1), (1, 600), (3, 33), (5, 2), (16, 130), (17, 33), (100, 70), (2050, 1)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_sums_of_columns(parts: int, columns: int, gated: bool) -> None:
    x = torch.randn(parts, columns, device=DEVICE)
    gate = torch.randn(1, columns, device=DEVICE) if gated else None
    exact = x.double().sum(0)
    if gate is not None:
        exact = exact * (1 - gate.double().tanh().square()[0])
    out = column_sums(x, torch.Size((1, columns)), torch.float32, gate)
    assert out.shape == (1, columns)
    torch.testing.assert_close(out[0].double(), exact, rtol=1e-5, atol=1e-4)
    again = column_sums(x, torch.Size((columns,)), torch.float16, gate)
    assert torch.equal(out[0].half(), again)

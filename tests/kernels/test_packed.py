"""Weights in oneDNN's layout give what `F.linear` gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mllm_fast.kernels.linear import can_pack, pack_weight, packed_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 5), (2, 64)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_same_as_linear(dtype: torch.dtype, rows: tuple[int, ...], bias: bool) -> None:
    weight = torch.randn(48, 40, dtype=dtype)
    if not can_pack(weight):
        pytest.skip("this CPU has no packed layout for the type")
    x, b = torch.randn(*rows, 40, dtype=dtype), torch.randn(48, dtype=dtype) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    ours = (packed_linear(x, pack_weight(weight), b).double() - exact).abs().max()
    plain = (F.linear(x, weight, b).double() - exact).abs().max()
    assert ours <= 2 * plain + 1e-6


def test_a_type_without_a_packed_layout_is_an_error() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)
    assert not can_pack(weight)
    with pytest.raises(ValueError, match="float64"):
        pack_weight(weight)

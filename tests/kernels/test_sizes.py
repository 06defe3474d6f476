"""The launchers' integer arithmetic is that of Triton's own functions."""

from __future__ import annotations

import pytest

from mllm_fast.kernels.sizes import cdiv, next_power_of_2

triton = pytest.importorskip("triton")


def test_equal_to_tritons() -> None:
    for a in (0, 1, 7, 8, 9, 255, 256, 257, (1 << 40) + 1):
        assert next_power_of_2(a + 1) == triton.next_power_of_2(a + 1)
        for b in (1, 3, 8, 256):
            assert cdiv(a, b) == triton.cdiv(a, b)
    assert next_power_of_2(0) == next_power_of_2(-3) == 1

"""Every public op in every dtype on drawn calls: fp64 to rounding order, fp32 and 16 bits by the peer's own error."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast import ops
from tests.kernels.op_checks import check_exact, check_low_precision
from tests.kernels.quantized_weights import definition
from tests.robustness.drawn_calls import CALLS, quantized_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# They are part of another op's call here, or hold no computation.
PARTS = {"stack_weights", "normalize"}


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=40)
@given(data=st.data())
def test_exact_in_fp64(name: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    call = data.draw(CALLS[name])
    check_exact(call.ours, call.theirs, call.inputs(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=15)
@given(data=st.data())
def test_as_precise_as_the_peer(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    torch.manual_seed(0)
    call = data.draw(CALLS[name])
    check_low_precision(call.ours, call.theirs, lambda: call.inputs(dtype), dtype, draws=2, units=10)


@settings(max_examples=40)
@given(weight=quantized_weights(), dtype=st.sampled_from([torch.float64, *DTYPES]))
def test_dequantize(weight: Any, dtype: torch.dtype) -> None:
    assert torch.equal(ops.dequantize(weight, dtype), definition(weight, dtype))


@settings(max_examples=40)
@given(shape=st.tuples(st.integers(0, 4), st.integers(0, 7)), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_image_rows(shape: tuple[int, int], share: float) -> None:
    torch.manual_seed(0)
    for places in (torch.rand(shape) < share, (torch.rand(shape[::-1]) < share).T):
        index, row = ops.image_rows(places), 0
        assert index.shape == places.shape
        for at, place in zip(index.flatten().tolist(), places.flatten().tolist(), strict=True):
            assert at == row if place else at < 0
            row += place


def test_no_op_is_left_out() -> None:
    public = {name for name, value in vars(ops).items() if inspect.isfunction(value)}
    drawn = {name.split()[0] for name in CALLS} | {"dequantize", "image_rows"} | PARTS
    assert public == drawn


def test_what_lies_between_the_elements_is_never_read() -> None:
    """The layouts of the drawn calls do hide NaN: a tensor read through its storage shows them."""
    from tests.robustness.drawn_calls import LAYOUTS, arranged

    x: Tensor = torch.randn(3, 4, 5)
    drawn = [arranged(x, layout) for layout in LAYOUTS]
    hidden = [bool(t.as_strided((t.untyped_storage().nbytes() // 4,), (1,), 0).isnan().any()) for t in drawn]
    assert hidden == [False, False, True, True, False]
    assert all(torch.equal(t, x) for t in drawn[:4])

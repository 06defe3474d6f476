"""The Triton kernels of the ops on drawn calls, in fp16 and fp32, in Triton's interpreter.

Attention, the norms, the linear layers, the gated residual and the splice have drawn calls in their own tests, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels import runtime
from tests.kernels.op_checks import check_low_precision
from tests.kernels.triton_device import INTERPRETING, poisoned, require_triton  # noqa: F401
from tests.robustness.drawn_calls import CALLS, Call

require_triton()
if not INTERPRETING:
    pytest.skip("drawn masks and weights are on the CPU; on a GPU the ops' own tests run", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")

NEW_IN_FP32 = ("stacked_linear", "grouped_linear", "frozen_cross_entropy")
# Absorbed attention has no kernel of its own.
CASES = [(name, torch.float16) for name in CALLS if name != "absorbed_attention"]
CASES += [(name, torch.float32) for name in NEW_IN_FP32]


def on_triton(call: Call) -> Callable[..., Any]:
    def op(**inputs: Tensor) -> Any:
        with runtime.backend("triton"):
            return call.ours(**inputs)

    return op


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
@settings(max_examples=3)
@given(data=st.data())
def test_as_precise_as_the_peer(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    torch.manual_seed(0)
    call = data.draw(CALLS[name])
    check_low_precision(on_triton(call), call.theirs, lambda: call.inputs(dtype), dtype, draws=1, units=10)

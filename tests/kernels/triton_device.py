"""Where the tests of Triton kernels run: on a GPU, or on the CPU in Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, because triton's own functions are made then. So the files
test_*_triton.py are skipped in an ordinary run without a GPU, and test_interpreter.py runs each of them in a process of
its own. To run one by hand: TRITON_INTERPRET=1 pytest tests/kernels/test_attention_triton.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mllm_fast.kernels import runtime

INTERPRETING = runtime.interpreting()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"


def require_triton() -> None:
    """Skip the whole test module where Triton kernels cannot run."""
    if not INTERPRETING and DEVICE == "cpu":
        pytest.skip("no GPU; test_interpreter.py runs it in Triton's interpreter", allow_module_level=True)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)

"""Calls that launch again what an equal call launched before give, on a GPU, the bits that they gave when worked out anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mllm_fast import ops
from mllm_fast.kernels import relaunch, runtime
from tests.kernels.relaunch_calls import CALLS, CHANGES, Maker

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(relaunch, "_calls", {})
    with runtime.backend("triton"):  # no library's attention
        yield


def anew(call: Callable[[], Tensor]) -> Tensor:
    """The result without what is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relaunch, "serves", lambda first: False)
        return call()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CALLS)
def test_equal_bits(name: str, change: str) -> None:
    make = Maker("cuda", **CHANGES[change])

    def call(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return CALLS[name](make)

    with torch.no_grad():
        for seed in range(5):
            expected = anew(lambda seed=seed: call(seed))
            assert torch.equal(call(seed), expected)
    assert any(isinstance(kept, relaunch._Call) for kept in relaunch._calls.values())


def test_on_another_stream_and_in_a_graph() -> None:
    torch.manual_seed(0)
    make, stream = Maker("cuda"), torch.cuda.Stream()
    weight = make(256, 64)
    with torch.no_grad():
        x = make.rows(64)
        expected = anew(lambda: ops.norm_linear(x, weight))
        for _ in range(3):
            ops.norm_linear(x, weight)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.equal(ops.norm_linear(x, weight), expected)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.norm_linear(x, weight)
        x.mul_(2)
        graph.replay()
        assert torch.equal(out, anew(lambda: ops.norm_linear(x, weight)))

"""The launch budgets at small widths with the real numbers of layers, computed by Triton's interpreter.

Beside the counts it is here that whole fused blocks run on the kernels: their outputs are upstream's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.kernels import runtime
from tests.families.budgets import CASES, DECODER_LAYER, SMALL, Call, Case, decode_calls, text_decoder
from tests.families.builders import randomise
from tests.families.launches import Launches, interpreted, not_launching
from tests.kernels.triton_device import INTERPRETING

if not INTERPRETING:
    pytest.skip("test_interpreter.py runs it in Triton's interpreter", allow_module_level=True)


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with runtime.backend("triton"):
        yield


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if dtype == torch.long:  # token ids, or a mask
        return torch.randint(1, 40, shape)
    if dtype == torch.bool:  # the places of images
        return torch.eye(*shape[-2:], dtype=torch.bool).roll(1, dims=-1)
    return torch.randn(shape)


def twins(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights, drawn."""
    upstream = randomise(module).eval()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    return fused, upstream


def run(calls: list[Call], first_runs: bool) -> tuple[Tensor, Launches]:
    """The output of the last call, and what it launches."""
    for call in calls[:-1]:
        with torch.no_grad() if first_runs else not_launching():
            call()
    with interpreted() as launches:
        out = calls[-1]()
    return out, launches


def check_same(ours: Tensor, calls: list[Call]) -> None:
    """The output is that of the last of upstream's calls, up to rounding in fp32 through all the layers."""
    with runtime.backend("torch"), torch.no_grad():
        for call in calls:
            theirs = call()
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_budget_and_output(case: Case) -> None:
    fused, upstream = twins(case.build(SMALL))
    both = []
    for module in (fused, upstream):
        torch.manual_seed(1)  # the same inputs for both
        both.append(case.calls(module, SMALL, make))
    out, launches = run(both[0], case.first_runs)
    assert launches.total / case.layers <= case.budget, launches
    check_same(out, both[1])


def test_budget_and_output_of_a_decoder_layer() -> None:
    totals = []
    for layers in (1, 3):
        fused, upstream = twins(text_decoder(SMALL, layers))
        both = []
        for module in (fused, upstream):
            torch.manual_seed(1)
            both.append(decode_calls(module, SMALL, make))
        out, launches = run(both[0], first_runs=True)
        totals.append(launches.total)
        check_same(out, both[1])
    assert totals[1] - totals[0] <= 2 * DECODER_LAYER, totals

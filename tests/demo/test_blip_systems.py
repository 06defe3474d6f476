"""The BLIP family, LLaVA, MiniGPT-4 and mPLUG-Owl in part 1 of the demo: fused and unfused agree, and the image matters."""

from __future__ import annotations

import pytest
import torch
from rich.progress import Progress

from mllm_fast.demo.blip_systems import SYSTEMS
from mllm_fast.demo.comparison import compare
from mllm_fast.demo.photographs import load_photographs
from mllm_fast.demo.systems import QUICK, System

systems = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)


@systems
def test_fused_and_unfused_agree(system: System) -> None:
    with Progress(disable=True) as progress:
        result = compare(system, QUICK, load_photographs(QUICK.images), progress)
    assert result.agrees
    assert result.same_ids
    assert result.relative < 1e-5
    assert result.fused is not None
    assert result.fused.next_token > 0


@systems
def test_the_photograph_matters(system: System) -> None:
    photographs = load_photographs(QUICK.images)

    def logits(order: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        shown = [photographs[i] for i in order]
        with torch.no_grad():
            return system.build(QUICK, shown).forward()

    # The prompt names no photograph but those before the last, of which these systems show none.
    one, other = logits([0, 1, 2]), logits([1, 0, 0])
    assert one.shape == other.shape
    assert (one - other).abs().max() > 1e-2 * one.abs().max()

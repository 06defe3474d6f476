"""The launch budgets at the sizes of published models in bf16, counted on a fake GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.budgets import (
    CASES,
    DECODER_LAYER,
    GATED_LAYER,
    PUBLISHED,
    Call,
    Case,
    Make,
    Sizes,
    decode_calls,
    idefics_9b,
    idefics_calls,
    text_decoder,
)
from tests.families.fake_gpu import FakeGpu
from tests.families.launches import Launches, recorded


def fused(gpu: FakeGpu, module: nn.Module) -> nn.Module:
    module = gpu.module(module.to(torch.bfloat16).eval())
    mllm_fast.fuse(module)
    return module


def gpu_maker(gpu: FakeGpu) -> Make:
    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return gpu.tensor(torch.empty(shape, dtype=dtype, device="meta"))

    return make


def count(gpu: FakeGpu, calls: list[Call]) -> Launches:
    """The launches of the last call."""
    with gpu.running():
        for call in calls[:-1]:
            call()
    with recorded(gpu) as launches:
        calls[-1]()
    return launches


@pytest.mark.parametrize(("case", "batch"), [(case, batch) for case in CASES for batch in case.batches], ids=str)
def test_budget(case: Case, batch: int, gpu: FakeGpu) -> None:
    sizes = dataclasses.replace(PUBLISHED, batch=batch)
    with torch.device("meta"):
        module = case.build(sizes)
    module = fused(gpu, module)
    with gpu.running():
        calls = case.calls(module, sizes, gpu_maker(gpu))
    launches = count(gpu, calls)
    assert launches.total / case.layers <= case.budget, launches


@pytest.mark.parametrize("images", [2, 33])
def test_budget_of_a_gated_layer_of_idefics(images: int, gpu: FakeGpu) -> None:
    """What three gated layers more launch in a decode step at the sizes of IDEFICS-9B: their q/k norms launch nothing."""
    totals = []
    for every in (4, 1):
        with torch.device("meta"):
            model = idefics_9b(layers=4, every=every)
        model = fused(gpu, model)
        with gpu.running():
            calls = idefics_calls(model, images, gpu_maker(gpu))
        totals.append(count(gpu, calls))
    assert totals[1].total - totals[0].total <= 3 * GATED_LAYER, totals[1]


@pytest.mark.parametrize("batch", [1, 8])
def test_budget_of_a_decoder_layer(batch: int, gpu: FakeGpu) -> None:
    """What a decode step launches more with three layers more."""
    sizes: Sizes = dataclasses.replace(PUBLISHED, batch=batch, image=768, tokens=577)
    totals = []
    for layers in (1, 4):
        with torch.device("meta"):
            model = text_decoder(sizes, layers)
        model = fused(gpu, model)
        with gpu.running():
            calls = decode_calls(model, sizes, gpu_maker(gpu))
        totals.append(count(gpu, calls))
    assert totals[1].total - totals[0].total <= 3 * DECODER_LAYER, totals[1]

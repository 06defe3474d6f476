"""CUDA graphs on a GPU: what is replayed equals what is run, for every system, shape and stream."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

import mllm_fast
from tests.families.builders import of_resampler
from tests.families.captures import captured
from tests.families.generating import SYSTEMS, System
from tests.families.test_cuda_graphs import media

pytestmark = pytest.mark.gpu


# One of each way in which an encoder side is captured; kernels have to be compiled for every one.
CAPTURED = [s for s in SYSTEMS if s.name in ("open_flamingo", "idefics", "instructblip_opt", "llava")]


@pytest.mark.parametrize("system", CAPTURED, ids=str)
def test_real_graphs(system: System) -> None:
    dtype = torch.bfloat16
    upstream = system.build().to("cuda", dtype)
    plain, fused = copy.deepcopy(upstream), copy.deepcopy(upstream)
    mllm_fast.fuse(plain)
    report = mllm_fast.fuse(fused, cuda_graphs=True)
    assert all("second time" in row.status for row in report.graphs)
    on_host = system.inputs
    system = dataclasses.replace(system, inputs=lambda seed: _moved(on_host(seed), dtype))
    for seed in range(4):
        assert torch.equal(system.generate(fused, seed), system.generate(plain, seed))
    assert sum(captured(fused).values()) > 0
    for model in (plain, fused):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    for seed in range(3):
        assert torch.equal(system.generate(fused, seed), system.generate(plain, seed))


def _moved(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to("cuda", dtype) if x.is_floating_point() else x.to("cuda") for name, x in inputs.items()}


def test_real_graphs_of_several_shapes_and_streams() -> None:
    upstream = of_resampler().eval().cuda()
    replayed = copy.deepcopy(upstream)
    mllm_fast.fuse(replayed, cuda_graphs=True)
    mllm_fast.fuse(upstream)
    side = torch.cuda.Stream()
    with torch.no_grad():
        for seed in range(12):
            x = media(seed, images=1 + seed % 3).cuda()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side if seed % 2 else torch.cuda.current_stream()):
                ours = replayed(x)
            torch.cuda.synchronize()
            torch.testing.assert_close(ours, upstream(x), atol=1e-5, rtol=1e-5)
    assert captured(replayed) == {"": 3}

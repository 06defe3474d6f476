"""The Flamingo workloads at toy sizes: they run, and upstream and the drop-ins agree."""

from __future__ import annotations

import pytest
import torch

from bench import registry
from bench.workloads import flamingo

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    sizes = {
        "DIM": 32, "MEDIA_DIM": 24, "RESAMPLER_DIM": 32, "RESAMPLER_DEPTH": 2, "PATCHES": 10, "HIDDEN": 256,
        "INTERMEDIATE": 64, "VISION": 48, "ROTATED_BYTES": 2**20,
    }  # fmt: skip
    for name, size in sizes.items():
        monkeypatch.setattr(flamingo, name, size)
    monkeypatch.setattr(flamingo, "_copies", lambda nbytes: 2)
    flamingo._idefics.cache_clear()
    yield
    flamingo._idefics.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (flamingo.build_block_decode, {"images": 3}),
        (flamingo.build_attention_prefill, {"images": 3, "length": 101}),
        (flamingo.build_resampler, {"images": 2}),
        (flamingo.build_idefics_decode, {"images": 3}),
    ],
)
@torch.no_grad()
def test_upstream_and_ours_agree_call_after_call(build, sizes, dtype):
    case = build(CPU, dtype=dtype, **sizes)
    for _ in range(3):
        registry.check(case)
    copies = {name: len(calls) for name, calls in case.peers.items()}
    assert len(set(copies.values())) == 1, copies


def test_the_published_shapes_and_goals_are_registered():
    named = {w.name: w for w in registry.workloads() if w.name.startswith(("openflamingo", "idefics"))}
    goals = {name: w.min_speedup for name, w in named.items() if w.min_speedup}
    assert goals == {
        "openflamingo_3b.block.decode.9_images.bf16": 2.0,
        "openflamingo_3b.block.decode.33_images.bf16": 4.5,
        "openflamingo_3b.attention.prefill.33_images.bf16": 5.0,
        "idefics_9b.layer_and_block.decode.9_images.bf16": 1.5,
        "idefics_9b.layer_and_block.decode.33_images.bf16": 3.0,
        "openflamingo.resampler.9_images.bf16": 1.2,
    }
    assert named["openflamingo_3b.attention.prefill.33_images.bf16"].max_memory == 1 / 8
    for name in list(named):
        assert name.removesuffix("bf16") + "fp32" in named or name.endswith("fp32")

"""The Flamingo workloads at toy sizes: they run, and upstream and the drop-ins agree."""

from __future__ import annotations

import functools

import pytest
import torch

from bench import registry
from bench.workloads import flamingo, optional
from bench.workloads.optional import COMPILED

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


BUILDS = [
    (flamingo.build_block_decode, {"images": 3}),
    (flamingo.build_attention_prefill, {"images": 3, "length": 101}),
    (flamingo.build_resampler, {"images": 2}),
    (flamingo.build_idefics_decode, {"images": 3}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("build", "sizes"), BUILDS)
@torch.no_grad()
def test_upstream_and_ours_agree_call_after_call(build, sizes, dtype):
    case = build(CPU, dtype=dtype, **sizes)
    for _ in range(3):
        registry.check(case)
    copies = {name: len(calls) for name, calls in case.peers.items()}
    assert len(set(copies.values())) == 1, copies


@pytest.mark.parametrize(("build", "sizes"), BUILDS)
@torch.no_grad()
def test_the_compiled_peer_agrees_and_is_compiled_once(build, sizes, monkeypatch):
    """On a CPU without the code generator: this shows that it can be traced, and that copies share what was compiled."""
    graphs = []

    def traced(graph, _):
        graphs.append(graph)
        return graph.forward

    compiler = functools.partial(torch.compile, backend=traced)
    monkeypatch.setattr(torch, "compile", compiler)
    assert COMPILED not in build(CPU, dtype=torch.float32, compiled=True, **sizes).peers
    assert not graphs
    monkeypatch.setattr(optional, "compiles", lambda device: True)
    case = build(CPU, dtype=torch.float32, compiled=True, **sizes)
    made = len(graphs)
    assert made
    for _ in range(2):
        registry.check(case)
        assert all(call().shape == case.exact().shape for call in case.peers[COMPILED])
    assert len(graphs) == made
    assert len(case.peers[COMPILED]) == len(case.peers[case.baseline])


def test_the_published_shapes_and_goals_are_registered():
    named = {w.name: w for w in registry.workloads() if w.name.startswith(("openflamingo", "idefics"))}
    goals = {name: dict(w.goals.speedup) for name, w in named.items() if w.goals}
    assert goals == {
        "openflamingo_3b.block.decode.9_images.bf16": {flamingo.UPSTREAM: 2.0},
        "openflamingo_3b.block.decode.33_images.bf16": {flamingo.UPSTREAM: 4.5},
        "openflamingo_3b.attention.prefill.33_images.bf16": {flamingo.UPSTREAM: 5.0},
        "idefics_9b.layer_and_block.decode.9_images.bf16": {flamingo.HF: 1.5},
        "idefics_9b.layer_and_block.decode.33_images.bf16": {flamingo.HF: 3.0},
        "openflamingo.resampler.9_images.bf16": {flamingo.UPSTREAM: 1.2},
    }
    assert named["openflamingo_3b.attention.prefill.33_images.bf16"].goals.max_memory_ratio == 1 / 8
    # One workload a block is compiled, and whoever is compiled is a goal.
    compiled = {name: w.gpu_goals.speedup[COMPILED] for name, w in named.items() if w.gpu_goals.speedup}
    assert compiled == {
        "openflamingo_3b.block.decode.9_images.bf16": 1.0,
        "openflamingo_3b.attention.prefill.33_images.bf16": 1.0,
        "idefics_9b.layer_and_block.decode.9_images.bf16": 1.0,
        "openflamingo.resampler.9_images.bf16": 1.5,
    }
    assert {w.name for w in named.values() if w.gpu_goals.bandwidth_share} == {
        f"openflamingo_3b.block.decode.{images}_images.bf16" for images in (1, 5, 9, 33)
    }
    for name in list(named):
        assert name.removesuffix("bf16") + "fp32" in named or name.endswith("fp32")

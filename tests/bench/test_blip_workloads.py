"""The Q-Former's and BLIP's workloads: which are compiled on a GPU, and what they are to reach there."""

from __future__ import annotations

import functools

import pytest
import torch

from bench import registry
from bench.goals import Goals
from bench.registry import OURS
from bench.workloads import blip, flamingo, optional
from bench.workloads.optional import COMPILED

CPU = torch.device("cpu")


@pytest.mark.parametrize("gpu", [False, True])
def test_the_goals_are_registered(monkeypatch, gpu):
    found = {}
    monkeypatch.setattr(blip, "register", lambda w: found.setdefault(w.name, w))
    blip._register(gpu)
    goals = {name: w.gpu_goals for name, w in found.items() if w.gpu_goals}
    batch_64 = {"blip2.qformer.forward.batch_64.bf16": Goals({COMPILED: 1.3})} if gpu else {}
    assert goals == batch_64 | {
        "blip2.qformer.forward.batch_1.bf16": Goals({flamingo.HF: 10.0, COMPILED: 1.0}, max_ms=0.2),
        "blip.captioning.decode.3_beams.bf16": Goals({COMPILED: 1.0}),
    }
    assert {name for name, w in found.items() if w.build.keywords.get("compiled")} == set(goals)
    on_cpu = found["blip2.qformer.forward.batch_1.bf16"].goals_on(CPU)
    assert on_cpu == Goals({flamingo.HF: 1.15})


@pytest.mark.parametrize(
    ("build", "sizes"), [(blip.build_qformer, {"batch": 2}), (blip.build_captioning, {"beams": 2})]
)
@torch.no_grad()
def test_the_compiled_peer_agrees(build, sizes, monkeypatch):
    """On a CPU without the code generator: this shows that it can be traced and computes the same, call after call."""
    small = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2}
    for name in ("_qformer", "_decoder"):
        monkeypatch.setattr(blip, name, functools.partial(getattr(blip, name), **small))
    monkeypatch.setattr(blip, "DIM", 96)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert COMPILED not in build(CPU, dtype=torch.float32, compiled=True, **sizes).peers
    monkeypatch.setattr(optional, "compiles", lambda device: True)
    case = build(CPU, dtype=torch.float32, compiled=True, **sizes)
    for _ in range(3):
        assert COMPILED in registry.check(case)


def test_the_captured_peer_is_for_gpus():
    assert flamingo.our_peers(CPU, graphs=True) == (OURS, flamingo.PREPACKED)
    cuda = torch.device("cuda")
    assert flamingo.our_peers(cuda, graphs=True) == (OURS, flamingo.GRAPHED)
    assert flamingo.our_peers(cuda) == (OURS,)

"""The workloads of quantised layers at toy sizes: the peers agree, and the work they are rated by is counted rightly."""

from __future__ import annotations

import pytest
import torch

from bench import registry
from bench.goals import Goals
from bench.workloads import quantized
from bench.workloads.quantized import Shape

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch):
    monkeypatch.setattr(quantized, "MOST_COPIES", 2)


@pytest.mark.parametrize("kind", ["nf4", "nf4_nested", "int8"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_peers_agree(kind, backward):
    with torch.set_grad_enabled(backward):
        case = quantized.build(CPU, kind=kind, shape=Shape(5, 96, 256), backward=backward)
        assert list(case.peers) == ["bitsandbytes", "mllm_fast", "torch dense"]
        assert all(len(calls) == 2 for calls in case.peers.values())
        errors = registry.check(case)
    assert all(0 < error < 0.02 for error in errors.values())


def test_the_published_shapes_and_goals_are_registered(monkeypatch):
    monkeypatch.setattr(registry, "_workloads", {})
    for gpu in (False, True):
        quantized._register(gpu)
        found = registry._workloads
        assert {w.block for w in found.values()} == {"quantized_linear"}
        if not gpu:
            assert {(w.shape["width"], w.shape["columns"]) for w in found.values()} == {(4096, 4096)}
            goals = {
                n: (w.goals.speedup["bitsandbytes"], w.goals.max_memory_ratio) for n, w in found.items() if w.goals
            }
            assert goals == {
                "quantized.nf4.4096x4096.16_rows.backward.bf16": (1.5, 0.5),
                "quantized.nf4_nested.4096x4096.16_rows.backward.bf16": (1.5, 0.5),
                "quantized.int8.4096x4096.16_rows.backward.bf16": (3.0, 0.5),
            }
        else:
            assert {w.shape["columns"] for w in found.values()} == {4096, 8192, 11008}
            assert found["quantized.nf4.28672x8192.1024_rows.backward.bf16"].gpu_goals == Goals({"bitsandbytes": 1.3})
        found.clear()


def test_bytes_of_the_weight():
    shape = Shape(1, 128, 512)
    assert shape.weight_bytes("int8") == 128 * 512 + 4 * 128
    assert shape.weight_bytes("nf4") == 128 * 256 + 4 * 1024
    assert shape.weight_bytes("nf4_nested") == 128 * 256 + 1024 + 4 * 4

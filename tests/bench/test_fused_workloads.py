"""The workloads of the fused ops at toy sizes: the peers agree, and the work they are rated by is counted rightly."""

from __future__ import annotations

import pytest
import torch

from bench import registry
from bench.registry import OURS, WrongResultError
from bench.workloads import fused
from bench.workloads.fused import Layer

CPU = torch.device("cpu")
LAYERS = [
    Layer(6, 16, 24, "layer_norm", activation="gelu"),
    Layer(6, 16, 24, "rms_norm", activation="swiglu"),
    Layer(6, 16, 24, "rms_norm", head_dim=8),
    Layer(6, 16, 24, gate="scalar"),
    Layer(6, 16, 24, gate="vector"),
    Layer(6, 16, 24, "layer_norm", post=True, gate="none"),
    Layer(6, 16, 24, "layer_norm", activation="gelu", groups=2),
    Layer(6, 16, 24, "layer_norm", stacked=3),
    Layer(6, 16, norm="layer_norm", post=True, gate="none"),
    Layer(6, 16, norm="layer_norm"),
    Layer(6, 16, norm="rms_norm"),
    Layer(6, 16, gate="vector"),
]


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch):
    monkeypatch.setattr(fused, "MOST_COPIES", 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_peers_agree(layer, dtype):
    with torch.no_grad():
        case = fused.build(CPU, layer=layer, dtype=dtype, backward=False)
        assert set(registry.check(case)) == {fused.EAGER, OURS}
        assert case.peers[OURS][1]().shape == (1, layer.rows, layer.out)
    if layer.stacked == 1:
        case = fused.build(CPU, layer=layer, dtype=torch.float32, backward=True)
        assert set(registry.check(case)) == {fused.EAGER, OURS}
        assert case.peers[OURS][1]().shape == (1, layer.rows, layer.width)


def test_wrong_weight_gradients_are_noticed(monkeypatch):
    right = fused._gradients

    def wrong(run, given, grad):
        found = right(run, given, grad)
        if run.__qualname__.startswith("ours"):
            found["weight0"] = found["weight0"] * 1.1
        return found

    monkeypatch.setattr(fused, "_gradients", wrong)
    with pytest.raises(WrongResultError, match="mllm_fast is off by"):
        fused.build(CPU, layer=LAYERS[0], dtype=torch.float32, backward=True)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_work_is_what_the_tensors_hold(layer):
    given = fused.draw(layer, torch.float32, CPU)
    weights = [t for t in given.values() if t.dim() == 2]
    residual = [t for t in given.values() if t.dim() == 3]
    out = layer.rows * layer.out
    assert layer.elements == sum(t.numel() for t in weights + residual) + out
    if weights:
        assert layer.flops == 2 * layer.rows // layer.groups * sum(t.numel() for t in weights)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_published_layers_are_registered(monkeypatch, gpu):
    found = []
    monkeypatch.setattr(fused, "register", found.append)
    fused._register(gpu)
    assert len({w.name for w in found}) == len(found)
    assert {w.block for w in found} == {
        "gated_residual",
        "grouped_linear",
        "layer_norm",
        "linear_residual",
        "norm_linear",
        "rms_norm",
        "stacked_linear",
    }
    assert {w.direction for w in found} == {"decode", "forward"} | ({"backward"} if gpu else set())
    assert gpu or len(found) <= 16


def test_the_peers_that_a_gpu_adds(monkeypatch):
    """On a CPU it runs uncompiled: this shows that a compiled peer takes part in the same checks."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    peers = fused._peers(LAYERS[0], torch.device("cuda"))
    assert [name for name, _ in peers] == [fused.EAGER, OURS, fused.COMPILED]
    pytest.importorskip("liger_kernel")
    names = [name for name, _ in fused._peers(LAYERS[-2], torch.device("cuda"))]
    assert names == [fused.EAGER, OURS, fused.COMPILED, fused.LIGER]

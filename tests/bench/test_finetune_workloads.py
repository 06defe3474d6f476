"""The workloads of training steps at toy sizes: the peers agree, and the work they are rated by is counted rightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import registry
from bench.goals import Goals
from bench.registry import OURS
from bench.workloads import finetune
from bench.workloads.finetune import AUTOCAST, DOCUMENTED, UNCAST, Shape

CPU = torch.device("cpu")
TEXT = Shape(2, 24, layers=2, hidden=128, ffn=256, heads=2, vocabulary=97)
IMAGES = Shape(2, 24, layers=4, hidden=128, ffn=256, heads=2, vocabulary=97, images=2, vision=64, patches=7)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("what", "shape"), [("lora", TEXT), ("bridge", IMAGES)])
def test_the_peers_agree(what: Any, shape: Shape, checkpointing: bool) -> None:
    case = finetune.build(CPU, shape=shape, what=what, checkpointing=checkpointing)
    assert list(case.peers) == [DOCUMENTED, AUTOCAST, *([UNCAST] if what == "bridge" else []), OURS]
    errors = registry.check(case)
    assert all(0 < error < 0.1 for error in errors.values())
    (step,) = case.peers[OURS]
    assert isinstance(step, finetune.Step)
    trained = finetune.trained(step.model)
    assert torch.equal(step(), step())  # gradients do not add up from step to step
    parts = ("lora_",) if what == "lora" else ("gated_cross_attn_layers", "perceiver_resampler")
    assert trained
    assert all(any(part in name for part in parts) for name in trained)
    if what == "lora":
        assert len(trained) == 2 * 2 * shape.layers


def test_only_the_last_quarter_is_supervised() -> None:
    given = finetune.batch(CPU, IMAGES)
    assert (given["labels"] != -100).sum(1).tolist() == [6, 6]
    assert given["image_attention_mask"].shape == (2, 24, 2)
    assert given["image_attention_mask"].sum(1).tolist() == [[24, 16], [24, 16]]


def test_the_goals_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_workloads", {})
    finetune._register()
    found = registry._workloads
    assert len(found) == 4
    assert all(w.goals == Goals({DOCUMENTED: 1.5}, max_memory_ratio=0.5) for w in found.values())
    plain = found["finetune.lora.nf4.4x4096.1x256.bf16"]
    weights = 4 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plain.flops == 2 * (2 * 256 * weights + 2 * 64 * 32000 * 4096)
    again = found["finetune.lora.nf4.4x4096.1x256.checkpointing.bf16"]
    assert again.flops - plain.flops == 2 * 256 * weights

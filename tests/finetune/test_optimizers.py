"""Which parameters decay, which are gates, and the state of either optimiser by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mllm_fast.finetune import TrainingSettings, build_optimizer, parameter_groups, train
from mllm_fast.finetune.optimizers import decays, is_gate, load_optimizer_state, optimizer_state
from tests.families import builders, qformers
from tests.finetune import runs

UPSTREAM = [
    ("blocks.0.attention_gate", (), "gate"),
    ("lang_encoder.gated_cross_attn_layers.0.attn_gate", (1,), "gate"),
    ("model.gated_cross_attn_layers.1.alpha_cross_attn", (1, 1, 64), "gate"),
    ("model.gated_cross_attn_layers.1.alpha_dense", (1, 1, 1), "gate"),
    ("layers.3.cross_attn_mlp_gate", (1,), "gate"),
    ("layers.0.mlp.gate_proj.weight", (8, 4), "decays"),
    ("layers.0.mlp.gate_proj.bias", (8,), ""),
    ("layers.0.mlp.gate_proj.lora_A.default.weight", (2, 4), "decays"),
    ("qformer.encoder.layer.0.attention.attention.query.weight", (8, 8), "decays"),
    ("qformer.encoder.layer.0.attention.attention.query.bias", (8,), ""),
    ("qformer.encoder.layer.0.attention.output.LayerNorm.weight", (8,), ""),
    ("resampler.layers.0.norm_media.weight", (8,), ""),
    ("model.norm.weight", (1, 8), ""),
    ("resampler.latents", (3, 8), "decays"),
    ("query_tokens", (1, 4, 8), "decays"),
    ("temp", (), ""),
    ("normal_proj.weight", (8, 8), "decays"),
]


@pytest.mark.parametrize(("name", "shape", "kind"), UPSTREAM, ids=[name for name, _, _ in UPSTREAM])
def test_kinds_of_parameters(name: str, shape: tuple[int, ...], kind: str) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    assert is_gate(name, parameter) == (kind == "gate")
    assert decays(name, parameter) == (kind == "decays")


@pytest.mark.parametrize("name", ["open_flamingo", "blip2"])
def test_every_parameter_of_a_real_model_is_in_one_group(name: str) -> None:
    model = builders.of_model() if name == "open_flamingo" else qformers.generator("blip2", "opt")
    trained = dict(model.named_parameters())
    groups = parameter_groups(trained, TrainingSettings(3, learning_rate=2e-3, gate_learning_rate=10))
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(trained)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d)}
    assert linears <= decayed
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    assert not norms & decayed
    fast = [group for group in groups if group["lr"] == 2e-2]
    gates = {id(p) for n, p in trained.items() if n.endswith("_gate")}
    assert {id(p) for group in fast for p in group["params"]} == gates
    assert bool(gates) == (name == "open_flamingo")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 64), nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for i in range(first, last):
        x = torch.randn(5, 80, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).pow(3).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_state_by_name_brings_the_optimiser_back(name: Any, tmp_path: Path) -> None:
    settings = TrainingSettings(9, learning_rate=1e-2, optimizer=name)
    model = small()
    optimizer = build_optimizer(dict(model.named_parameters()), settings)
    steps(model, optimizer, 0, 3)
    half = copy.deepcopy(model)
    state = optimizer_state(optimizer, dict(model.named_parameters()))
    torch.save(state, tmp_path / "state.pt")
    kinds = {value.dtype for value in state["0.weight"].values() if isinstance(value, torch.Tensor)}
    assert (torch.uint8 in kinds) == (name == "adamw8bit")
    steps(model, optimizer, 3, 6)
    # Names in another order: it is names that count.
    trained = dict(reversed(list(half.named_parameters())))
    resumed = build_optimizer(trained, settings)
    load_optimizer_state(resumed, trained, torch.load(tmp_path / "state.pt", weights_only=True))
    steps(half, resumed, 3, 6)
    for a, b in zip(model.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


def test_8_bit_states_follow_those_in_fp32() -> None:
    models = [small(), small()]
    before = [p.detach().clone() for p in models[0].parameters()]
    for model, name in zip(models, ("adamw", "adamw8bit"), strict=True):
        settings = TrainingSettings(9, learning_rate=1e-3, optimizer=name)  # type: ignore[arg-type]
        steps(model, build_optimizer(dict(model.named_parameters()), settings), 0, 10)
    for old, exact, rounded in zip(before, *(m.parameters() for m in models), strict=True):
        moved = (exact - old).norm()
        assert moved > 0
        assert (exact - rounded).norm() < 0.1 * moved


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_run_resumes_with_either(name: Any, tmp_path: Path) -> None:
    def run(folder: str, count: int, resume: bool = False) -> list[float]:
        settings = runs.settings(count, optimizer=name, schedule="constant", gate_learning_rate=10, accumulation=1)
        made = runs.plan(train="bridge")
        data = runs.Captions()
        found = train(made, runs.loss, data, runs.collate, settings, tmp_path / folder, resume=resume, progress=False)
        return found.losses

    run("parts", 3)
    assert run("parts", 5, resume=True) == run("whole", 5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_on_a_gpu(name: Any) -> None:
    model = small().cuda()
    trained = dict(model.named_parameters())
    optimizer = build_optimizer(trained, TrainingSettings(9, learning_rate=1e-3, optimizer=name))
    reference = small()
    exact = build_optimizer(dict(reference.named_parameters()), TrainingSettings(9, learning_rate=1e-3))
    for i in range(5):
        x = torch.randn(5, 80, generator=torch.Generator().manual_seed(i))
        for m, o, given in ((model, optimizer, x.cuda()), (reference, exact, x)):
            o.zero_grad()
            m(given).pow(3).mean().backward()
            o.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-3)
    state = optimizer_state(optimizer, trained)
    load_optimizer_state(optimizer, trained, state)
    assert all(v.device.type == "cpu" for s in state.values() for v in s.values() if isinstance(v, torch.Tensor))


def test_nothing_trained() -> None:
    with pytest.raises(ValueError, match="nothing is trained"):
        build_optimizer({}, TrainingSettings(3))

"""The folder of a run: what is in it, that no interruption spoils it, and that nothing in it is taken for another run."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mllm_fast.finetune import (
    NoCheckpointError,
    RunExistsError,
    RunMismatchError,
    TrainingResult,
    checkpoint,
    read_trained,
    train,
)
from mllm_fast.finetune.changes import Changes
from tests.finetune import runs

ROOT = Path(__file__).parents[2]


def run(output: Path, steps: int = 4, *, plan: Any = None, resume: bool = False, **changes: Any) -> TrainingResult:
    rows = changes.pop("rows", 21)
    told = runs.settings(steps, accumulation=1, **changes)
    plan = plan or runs.plan(train="bridge")
    return train(plan, runs.loss, runs.Captions(rows), runs.collate, told, output, resume=resume, progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_holds_what_was_trained_and_nothing_else(tmp_path: Path) -> None:
    plan = runs.plan()
    run(tmp_path, plan=plan)
    assert sorted(files(tmp_path)) == ["state-4.pt", "trained.safetensors", "training.json"]
    own = dict(plan.model.named_parameters())
    with safe_open(tmp_path / "trained.safetensors", framework="pt") as file:
        assert set(file.keys()) == {name for name, p in own.items() if p.requires_grad}
        for name in file.keys():  # noqa: SIM118  # not a mapping
            assert torch.equal(file.get_tensor(name), own[name])
        assert "bridge" in file.metadata()["plan"]
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["step"] == 4
    assert summary["state"] == "finished"
    fresh = runs.plan()
    fresh.load_trained(read_trained(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(fresh.trained.values(), plan.trained.values(), strict=True))


def test_nothing_in_it_can_carry_code(tmp_path: Path) -> None:
    run(tmp_path)
    state = torch.load(tmp_path / "state-4.pt", weights_only=True)
    assert state["step"] == 4

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({**state, "schedule": Bomb()}, tmp_path / "state-4.pt")
    with pytest.raises(NoCheckpointError, match=r"state-4.pt is damaged"):
        run(tmp_path, 5, resume=True)
    (tmp_path / "state-4.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(NoCheckpointError, match=r"state-4.pt is damaged"):
        run(tmp_path, 5, resume=True)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("at", range(6))
def test_an_interrupted_write_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Stopped before and after each of the three files is renamed into its place."""
    expected = run(tmp_path / "whole", 6)
    run(tmp_path / "run", 2)
    calls = [0]
    replace = os.replace

    def failing(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == 1 + at // 2:
            if at % 2:
                replace(source, target)
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", 4, resume=True, save_every=2)
    assert read_trained(tmp_path / "run").keys() == read_trained(tmp_path / "whole").keys()
    steps = checkpoint_step(tmp_path / "run")
    assert steps == (2 if at < 3 else 4)
    # The learning rates of steps 1 to 4 were those of shorter runs; what matters is that it goes on at all, and from where.
    found = run(tmp_path / "run", 6, resume=True)
    assert found.step == expected.step == 6
    assert sorted(files(tmp_path / "run")) == ["state-6.pt", "trained.safetensors", "training.json"]


def checkpoint_step(folder: Path) -> int:
    with safe_open(folder / "trained.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (folder / metadata["state"]).is_file()
    return int(metadata["step"])


def test_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    run(tmp_path, 2)
    before = files(tmp_path)
    with pytest.raises(RunExistsError, match=r"already holds a run .* resume=True, or choose another folder"):
        run(tmp_path, 2)
    assert files(tmp_path) == before
    with pytest.raises(NotADirectoryError, match="is a file"):
        run(tmp_path / "config.yaml", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "settings: learning_rate: the run has 0.005, now it is 0.001"),
        ({"batch_size": 2, "seed": 9}, "settings: batch_size: the run has 3, now it is 2\n  settings: seed: "),
        ({"rows": 20}, "rows: the run has 21, now it is 20"),
        ({"plan": lambda: runs.plan(train="bridge+lora")}, "trained: lm.*lora_A.*: the run has nothing, now it is"),
        ({"plan": lambda: runs.plan("dense", train="bridge")}, "frozen weights: the run has"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run(tmp_path, 2)
    before = files(tmp_path)
    if "plan" in changes:
        changes = {"plan": changes["plan"]()}
    with pytest.raises(RunMismatchError, match=message):
        run(tmp_path, 4, resume=True, **changes)
    assert files(tmp_path) == before


def test_other_frozen_numbers_are_noticed(tmp_path: Path) -> None:
    run(tmp_path, 2)
    plan = runs.plan(train="bridge")
    with torch.no_grad():
        plan.model.lm.model.embed_tokens.weight.add_(1)
    with pytest.raises(RunMismatchError, match="frozen weights"):
        run(tmp_path, 4, plan=plan, resume=True)


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match=r"trained.safetensors is missing; start without resume"):
        run(tmp_path, resume=True)
    with pytest.raises(NoCheckpointError, match=r"no best.safetensors in"):
        read_trained(tmp_path, best=True)
    run(tmp_path)
    (tmp_path / "state-4.pt").rename(tmp_path / "kept")
    with pytest.raises(NoCheckpointError, match=r"has no state-4.pt beside it"):
        run(tmp_path, 5, resume=True)
    path = tmp_path / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(NoCheckpointError, match="is damaged"):
        run(tmp_path, 5, resume=True)
    with pytest.raises(NoCheckpointError, match=r"trained.safetensors is damaged \(.*expected a complete"):
        read_trained(tmp_path)


class Momentum(nn.Module):
    """A queue, a counter and a momentum copy, as contrastive training has them."""

    queue: Tensor
    count: Tensor
    scratch: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.copy = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(6))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    @torch.no_grad()
    def update(self, value: Tensor) -> Tensor:
        self.queue[self.count % 6] = value.detach()
        self.count += 1
        self.copy.weight.mul_(0.9).add_(value.detach())
        self.scratch.add_(1)
        return 0.1 * self.queue.mean() + 0.1 * self.copy.weight.mean()


def test_what_changes_without_a_gradient_is_kept(tmp_path: Path) -> None:
    def plan() -> Any:
        made = runs.plan(train="bridge")
        torch.manual_seed(0)
        made.model.momentum = Momentum(nn.Identity())
        return made

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        found = runs.loss(model, batch)["loss"]
        return found * (1 + model.momentum.update(found))

    def go(output: Path, steps: int, resume: bool = False) -> TrainingResult:
        told = runs.settings(steps, accumulation=1, schedule="constant")
        data = runs.Captions()
        return train(plan(), loss, data, runs.collate, told, output, resume=resume, progress=False)

    whole = go(tmp_path / "whole", 6)
    go(tmp_path / "parts", 3)
    state = torch.load(tmp_path / "parts" / "state-3.pt", weights_only=True)
    assert set(state["changed"]) == {"momentum.queue", "momentum.count", "momentum.copy.weight"}
    assert go(tmp_path / "parts", 6, resume=True).losses == whole.losses


def test_changes_include_what_is_replaced() -> None:
    module = nn.BatchNorm1d(3)
    changes = Changes(module, {"weight", "bias"})
    assert changes.tensors() == {}
    module.running_mean = torch.ones(3)
    assert list(changes.tensors()) == ["running_mean"]


def command(output: Path, *extra: str, **told: Any) -> list[str]:
    return [sys.executable, "-m", "tests.finetune.runs", str(output), "--settings", json.dumps(told), *extra]


def started(call: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(call, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finished(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_killed_and_resumed_in_other_processes(tmp_path: Path) -> None:
    """A real SIGTERM in the middle of a step: dropout, accumulation, augmentation, shuffling, workers; bit for bit."""
    told = {"steps": 8, "workers": 1}
    process = started(command(tmp_path, **told))
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline() == "pass\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "finishing this step, then a checkpoint" in err
    assert "Traceback" not in err
    step = checkpoint_step(tmp_path)
    assert 2 <= step < 8
    summary = json.loads((tmp_path / "training.json").read_text())
    assert (summary["state"], summary["step"]) == ("SIGTERM", step)
    resumed = finished(started(command(tmp_path, "--resume", **told)))
    whole = run_here(tmp_path / "whole", 8)
    assert resumed["losses"] == whole.losses
    found, expected = read_trained(tmp_path), read_trained(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def run_here(output: Path, steps: int) -> TrainingResult:
    data, told = runs.Captions(), runs.settings(steps)
    return train(runs.plan(), runs.loss, data, runs.collate, told, output, progress=False)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    waiting = (
        "import time; from tests.finetune import runs; slow = lambda m, b: (print('pass', flush=True), time.sleep(60))"
    )
    call = "from mllm_fast.finetune import train; train(runs.plan('dense', 'bridge'), slow, runs.Captions(), runs.collate, "
    call += f"runs.settings(2), {str(tmp_path)!r}, progress=False)"
    process = started([sys.executable, "-c", f"{waiting}\n{call}"])
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "pass\n"
    process.send_signal(signal.SIGTERM)
    while "finishing this step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_differences_are_listed_by_path() -> None:
    lines = checkpoint.differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5})
    assert lines == [
        "a: c: the run has 2, now it is 4",
        "d: the run has 3, now it is nothing",
        "e: the run has nothing, now it is 5",
    ]

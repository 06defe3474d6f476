"""The training loop against one written out by hand, and against itself stopped, resumed, and split up differently."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mllm_fast.finetune import TrainingInterrupted, TrainingResult, TrainingSettings, read_trained, train
from mllm_fast.finetune.evaluation import _InOrder
from mllm_fast.finetune.optimizers import build_schedule, decays
from mllm_fast.finetune.sampling import RowOrder, batches
from tests.finetune import runs


def run(
    output: Path, steps: int = 6, *, plan: Any = None, dataset: Any = None, loss: Any = runs.loss, **changes: Any
) -> TrainingResult:
    call = {name: changes.pop(name) for name in ("resume", "evaluate", "evaluation_dataset") if name in changes}
    return train(
        plan or runs.plan(),
        loss,
        runs.Captions() if dataset is None else dataset,
        runs.collate,
        runs.settings(steps, **changes),
        output,
        progress=False,
        **call,
    )


def signalled_after(passes: int, number: int = signal.SIGTERM) -> Any:
    """The loss, and a signal to this process in its pass of this number."""
    seen = [0]

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        seen[0] += 1
        if seen[0] == passes:
            signal.raise_signal(number)
        return runs.loss(model, batch)

    return loss


def test_the_same_as_a_loop_by_hand(tmp_path: Path) -> None:
    quiet = runs.Captions(augment=False)
    result = run(tmp_path, 8, plan=runs.plan(dropout=0), dataset=quiet, weight_decay=0.1, max_grad_norm=0.5)
    plan = runs.plan(dropout=0)
    model = plan.model.train()
    decayed = [p for n, p in plan.trained.items() if decays(n, p)]
    others = [p for n, p in plan.trained.items() if not decays(n, p)]
    assert decayed
    assert others
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=5e-3
    )
    order = [[row for _, row in batch] for batch in RowOrder(21, 3, 3, 0, 16)]
    losses = []
    for step in range(8):
        rate = 5e-3 * (step / 2 if step < 2 else 0.5 * (1 + np.cos(np.pi * (step - 2) / 6)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = runs.collate([quiet[row] for row in order[2 * step] + order[2 * step + 1]])
        # transformers' own loss over all six rows at once, as the mean over the supervised tokens.
        found = model(**batch).loss
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(plan.trained.values(), 0.5)
        optimizer.step()
        losses.append(found.item())
    np.testing.assert_allclose(result.losses, losses, rtol=2e-4)
    assert result.losses[-1] != result.losses[0]


def test_every_epoch_shows_every_row_that_fits_once_and_in_another_order() -> None:
    order = [[row for _, row in batch] for batch in RowOrder(11, 2, 0, 0, 15)]
    epochs = [[row for batch in order[i : i + 5] for row in batch] for i in (0, 5, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [[row for _, row in batch] for batch in RowOrder(11, 2, 0, 7, 15)] == order[7:]
    shares = [[[row for _, row in batch] for batch in RowOrder(11, 1, 0, 0, 15, rank, 2)] for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == order


def test_rows_do_not_depend_on_the_workers() -> None:
    found = []
    for workers in (0, 2):
        torch.rand(workers + 1)  # the caller's generator does not matter either
        order = RowOrder(21, 3, 3, 4, 9)
        found.append(list(batches(runs.Captions(), runs.collate, order, workers=workers)))
    for (rows, batch), (other_rows, other) in zip(*found, strict=True):
        assert rows == other_rows
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def test_rows_leave_the_generator_of_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed would set it too, and every batch would have the same dropout."""
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda seed: pytest.fail("it was seeded"))
    assert len(list(batches(runs.Captions(), runs.collate, RowOrder(21, 3, 3, 0, 2)))) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_by_a_signal_and_resumed(tmp_path: Path, workers: int) -> None:
    """Dropout, augmentation, accumulation and shuffling: bit for bit."""
    whole = run(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 3") as stopped:
        run(tmp_path / "parts", loss=signalled_after(5), workers=workers)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert stopped.value.result.losses == whole.losses[:3]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # Another process would come with other random states.
    torch.rand(5), random.random(), np.random.rand()  # noqa: NPY002
    rest = run(tmp_path / "parts", workers=workers, resume=True)
    assert rest.losses == whole.losses
    assert rest.stopped == "finished"
    expected, found = read_trained(tmp_path / "whole"), read_trained(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    again = run(tmp_path / "parts", resume=True)
    assert again.losses == whole.losses


def test_accumulated_passes_are_one_batch(tmp_path: Path) -> None:
    found = []
    for i, (size, accumulation) in enumerate([(2, 3), (6, 1), (1, 6)]):
        quiet = runs.Captions(24, augment=False)
        plan = runs.plan(dropout=0)
        changes = {"batch_size": size, "accumulation": accumulation}
        found.append(run(tmp_path / str(i), 4, plan=plan, dataset=quiet, **changes).losses)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4)


def test_passes_without_a_count_weigh_the_same(tmp_path: Path) -> None:
    gradients: list[Tensor] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]))

    def mean(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return runs.loss(model, batch)["loss"]

    plan = runs.plan(train="bridge", dropout=0)
    quiet = runs.Captions(augment=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllm_fast.finetune.loop.build_optimizer", lambda trained, _: Watched(trained.values(), lr=1))
        run(tmp_path, 1, plan=plan, dataset=quiet, loss=mean, max_grad_norm=None)
    model = runs.plan(train="bridge", dropout=0).model.train()
    for batch in RowOrder(21, 3, 3, 0, 2):
        (model(**runs.collate([quiet[row] for _, row in batch])).loss / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, [0, 0.5, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ({"minimum_learning_rate": 0.5}, [0, 0.5, 1, 0.5 + 0.25 * (1 + 0.5**0.5), 0.75, 0.5 + 0.25 * (1 - 0.5**0.5)]),
    ],
)
def test_schedules(changes: dict[str, Any], expected: list[float]) -> None:
    settings = TrainingSettings(6, learning_rate=1.0, warmup_steps=2, **changes)
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 1.0}])
    schedule = build_schedule(optimizer, settings)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_more_steps_than_first_planned(tmp_path: Path) -> None:
    run(tmp_path, 3, schedule="constant")
    longer = run(tmp_path, 6, schedule="constant", resume=True)
    assert longer.losses == run(tmp_path / "at once", 6, schedule="constant").losses
    run(tmp_path / "cosine", 3)
    rates = [entry["learning_rate"] for entry in run(tmp_path / "cosine", 6, resume=True).history]
    # The first three of a run of 3 steps, then those of one of 6.
    np.testing.assert_allclose(rates[3:], [5e-3 * 0.5 * (1 + np.cos(np.pi * i / 4)) for i in (1, 2, 3)])
    with pytest.raises(ValueError, match=r"has done 6 steps; steps is 3"):
        run(tmp_path, 3, schedule="constant", resume=True)


def test_evaluation_keeps_out_of_training(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    seen: list[bool] = []

    def accuracy(model: nn.Module) -> dict[str, float]:
        seen.append(model.training)
        torch.rand(7)
        return {"accuracy": 0.5}

    plan = runs.plan()
    held_out = runs.Captions(7, augment=False)
    result = run(
        tmp_path / "both", plan=plan, evaluation_dataset=held_out, evaluate=accuracy, evaluate_every=2, workers=1
    )
    assert result.losses == plain.losses
    assert seen == [False] * 3
    assert plan.model.training
    with torch.no_grad():
        # The evaluation's mean is that over all supervised tokens, whatever the batches (3, 3 and 1 rows).
        expected = plan.model.eval()(**runs.collate([held_out[row] for row in range(7)])).loss.item()
    numbers = [entry for entry in result.history if "evaluation" in entry]
    assert [entry["step"] for entry in numbers] == [2, 4, 6]
    np.testing.assert_allclose(numbers[-1]["evaluation"]["loss"], expected, rtol=1e-4)
    assert numbers[-1]["evaluation"]["accuracy"] == 0.5
    assert result.best == min(entry["evaluation"]["loss"] for entry in numbers)


@pytest.mark.parametrize(
    ("rows", "processes", "expected"),
    [(7, 1, [[0, 1, 2], [3, 4, 5]]), (2, 1, [[0, 1]]), (14, 2, [[0, 1, 2], [6, 7, 8]]), (5, 2, [[0, 1]])],
)
def test_whole_batches_of_held_out_rows(rows: int, processes: int, expected: list[list[int]]) -> None:
    """Of the first process; those of the others follow, each as large."""
    told = runs.settings(1, batch_size=3)
    found = [
        [[row for _, row in batch] for batch in _InOrder(rows, told, SimpleNamespace(rank=rank, size=processes), whole=True)]  # type: ignore[arg-type]
        for rank in range(processes)
    ]  # fmt: skip
    assert found[0] == expected
    seen = [row for own in found for batch in own for row in batch]
    assert sorted(seen) == list(range(len(seen)))
    assert {len(batch) for own in found for batch in own} == {len(expected[0])}


def test_early_stop_keeps_the_best(tmp_path: Path) -> None:
    values = iter([0.2, 0.8, 0.5, 0.7, float("nan")])
    plan = runs.plan()
    at: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        at.append({name: value.clone() for name, value in plan.trained_state_dict().items()})
        return {"accuracy": next(values)}

    changes = {"evaluate": evaluate, "evaluate_every": 1, "patience": 2}
    result = run(tmp_path, 9, plan=plan, **changes)
    assert (result.stopped, result.step, result.best_step, result.best) == ("patience", 4, 2, 0.8)
    best = read_trained(tmp_path, best=True)
    assert all(torch.equal(best[name], at[1][name]) for name in best)
    assert not all(torch.equal(best[name], value) for name, value in read_trained(tmp_path).items())
    plan.load_trained(best)
    # Patience is part of the checkpoint: the run stays stopped until it is given more.
    assert run(tmp_path, 9, resume=True, **changes).step == 4
    assert run(tmp_path, 9, resume=True, **{**changes, "patience": 3}).step == 5


def test_the_callers_generators_are_left_alone(tmp_path: Path) -> None:
    plan = runs.plan()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = run(tmp_path / "a", 2, plan=plan)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    torch.rand(3)
    assert run(tmp_path / "b", 2).losses == first.losses
    assert run(tmp_path / "c", 2, seed=4).losses != first.losses


def test_history(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        found = runs.loss(model, batch)
        return found | {"twice": 2 * found["loss"]}

    result = run(tmp_path, 5, loss=loss, log_every=2)
    assert [entry["step"] for entry in result.history] == [2, 4, 5]
    np.testing.assert_allclose(result.history[1]["loss"], sum(result.losses[2:4]) / 2)
    np.testing.assert_allclose(result.history[1]["twice"], 2 * result.losses[3])
    for entry in result.history:
        assert entry["rows_per_second"] > 0
        assert entry["peak_bytes"] > 1e6
        assert entry["gradient_norm"] > 0


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    settings = runs.settings(3, evaluate_every=2)
    held_out = runs.Captions(3, augment=False)
    plan, data = runs.plan(), runs.Captions()
    result = train(plan, runs.loss, data, runs.collate, settings, tmp_path, evaluation_dataset=held_out)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3 steps done" in shown.err
    assert re.search(rf"3/3 .*loss {result.losses[-1]:.4f}  [\d.]+ rows/s  peak [\d.]+ [MG]B  loss \d", shown.err)


BAD = [
    ({"steps": 0}, "steps is 0; expected a whole number"),
    ({"accumulation": 1.5}, "accumulation is 1.5"),
    ({"learning_rate": -1.0}, "learning_rate is -1.0; expected a number above 0"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"warmup_steps": -1}, "warmup_steps is -1"),
    ({"schedule": "step"}, "schedule is 'step'; expected one of cosine, linear, constant"),
    ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of adamw, adamw8bit"),
    ({"minimum_learning_rate": 1.0}, "above learning_rate"),
    ({"betas": (0.9, 1.0)}, "betas is"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**{"steps": 3, **changes})


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 21 rows and one batch .* takes 22"):
        run(tmp_path, batch_size=22)
    with pytest.raises(ValueError, match="patience needs something to evaluate"):
        run(tmp_path, patience=2)
    with pytest.raises(ValueError, match=r"monitor is 'f1'; the evaluation gave accuracy"):
        run(tmp_path / "f1", 1, monitor="f1", evaluate=lambda model: {"accuracy": 1.0})
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(2,\)"):
        run(tmp_path / "shape", loss=lambda model, batch: torch.zeros(2))
    with pytest.raises(ValueError, match=r"a mapping of \['count'\]"):
        run(tmp_path / "count", loss=lambda model, batch: {"count": torch.ones(())})
    with pytest.raises(ValueError, match="no trained parameter got a gradient"):
        run(tmp_path / "none", loss=lambda model, batch: torch.ones((), requires_grad=True))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """The losses of the CPU; a stopped run goes on with its dropout, and the caller's generator is left alone."""
    quiet = runs.Captions(augment=False)
    plan = runs.plan("dense", dropout=0)
    expected = run(tmp_path / "cpu", 4, plan=plan, dataset=quiet).losses
    plan = runs.plan("dense", dropout=0)
    plan.model.cuda()
    np.testing.assert_allclose(
        run(tmp_path / "gpu", 4, plan=plan, dataset=quiet, workers=1).losses, expected, rtol=1e-2
    )

    def fresh() -> Any:
        made = runs.plan("dense")
        made.model.cuda()
        return made

    plan = fresh()
    before = torch.cuda.get_rng_state()
    whole = run(tmp_path / "whole", 4, plan=plan)
    assert torch.equal(before, torch.cuda.get_rng_state())
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "parts", 4, plan=fresh(), loss=signalled_after(3))
    np.testing.assert_allclose(run(tmp_path / "parts", 4, plan=fresh(), resume=True).losses, whole.losses, rtol=1e-4)

"""A plan under transformers.Trainer, as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mllm_fast.finetune import NonFiniteLossError
from mllm_fast.finetune.trainer import TrainerModel
from tests.finetune import runs


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.train: list[float] = []
        self.evaluation: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.train.append(float(logs["loss"]))
        if "eval_loss" in logs:
            self.evaluation.append(float(logs["eval_loss"]))


def trainer(
    output: Path, steps: int, *, loss: Any = runs.loss, counted: bool = True, dropout: float = 0.3, **changes: Any
) -> tuple[Trainer, Losses]:
    told = {
        "max_steps": steps, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 2, "report_to": [], "use_cpu": True,
        "remove_unused_columns": False, "disable_tqdm": True, "max_grad_norm": 0.0, "weight_decay": 0.0,
    }  # fmt: skip
    losses = Losses()
    plan = runs.plan(dropout=dropout)
    arguments = TrainingArguments(str(output), **{**told, **changes})
    data = runs.Captions(24, augment=False)
    model = TrainerModel(plan, loss, counted=counted)
    held_out = runs.Captions(5, augment=False)
    made = Trainer(model, arguments, runs.collate, data, eval_dataset=held_out, callbacks=[losses])
    return made, losses


def test_checkpoints_hold_what_was_trained_and_resume(tmp_path: Path) -> None:
    whole, expected = trainer(tmp_path / "whole", 4)
    whole.train()
    first, _ = trainer(tmp_path / "parts", 2)
    first.train()
    saved = load_file(tmp_path / "parts" / "checkpoint-2" / "model.safetensors")
    plan = runs.plan()
    assert saved.keys() == plan.trained.keys()
    own = first.model.plan.trained
    assert all(torch.equal(value, own[name]) for name, value in saved.items())
    assert not all(torch.equal(value, plan.trained[name]) for name, value in saved.items())
    plan.load_trained(saved)
    rest, found = trainer(tmp_path / "parts", 4)
    rest.train(resume_from_checkpoint=True)
    assert found.train == expected.train[2:]
    for name, value in whole.model.plan.trained.items():
        assert torch.equal(value, rest.model.plan.trained[name])


def test_8_bit_optimiser_states(tmp_path: Path) -> None:
    """bitsandbytes' optimiser by Trainer's own name for it; its states are in the checkpoint, too."""
    whole, expected = trainer(tmp_path / "whole", 4, optim="adamw_bnb_8bit")
    # A matrix that is large enough for 8 bits.
    assert max(p.numel() for p in whole.model.plan.trained.values()) >= 4096
    whole.train()
    states = [value for state in whole.optimizer.state.values() for value in state.values()]
    assert torch.uint8 in {value.dtype for value in states if isinstance(value, Tensor)}
    trainer(tmp_path / "parts", 2, optim="adamw_bnb_8bit")[0].train()
    rest, found = trainer(tmp_path / "parts", 4, optim="adamw_bnb_8bit")
    rest.train(resume_from_checkpoint=True)
    assert found.train == expected.train[2:]


def test_an_update_weighs_by_what_is_supervised(tmp_path: Path) -> None:
    """Three passes of 2 rows are one pass of 6, and the frozen parameters stay as they were."""
    frozen = {n: p.detach().clone() for n, p in runs.plan(dropout=0).model.named_parameters() if not p.requires_grad}
    found = []
    for size, accumulation in ((2, 3), (6, 1)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        made, losses = trainer(tmp_path / str(size), 3, dropout=0, save_strategy="no", **changes)
        made.train()
        found.append(losses.train)
        model: nn.Module = made.model.plan.model
        assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-3, atol=1e-4)


def test_evaluation(tmp_path: Path) -> None:
    made, losses = trainer(tmp_path, 1, save_strategy="no", per_device_eval_batch_size=5, counted=False)
    made.evaluate()
    model = made.model.plan.model.eval()
    with torch.no_grad():
        held_out = runs.Captions(5, augment=False)
        expected = model(**runs.collate([held_out[row] for row in range(5)])).loss
    torch.testing.assert_close(torch.tensor(losses.evaluation[0]), expected, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """It stops Trainer before an update, also in the second pass of one, and names the module; `check=False` leaves it in."""
    made, _ = trainer(tmp_path, 4, save_strategy="no")
    plan, passes = made.model.plan, [0]
    inner = plan.model.blocks[1]
    forward = type(inner).forward
    before: list[dict[str, Tensor]] = []

    class Broken(type(inner)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                passes[0] += 1
            if passes[0] == 4:
                before.append({name: p.detach().clone() for name, p in plan.trained.items()})
            return forward(self, *args, **kwargs) * (1.0 if passes[0] < 4 else float("nan"))

    inner.__class__ = Broken
    with pytest.raises(
        NonFiniteLossError, match=r"the loss is NaN\. The first module .* is blocks\.1 \(Broken\)"
    ) as caught:
        made.train()
    assert (caught.value.module, caught.value.step, made.state.global_step) == ("blocks.1", None, 1)
    assert all(torch.equal(value, plan.trained[name]) for name, value in before[0].items())
    with torch.no_grad():
        next(iter(plan.trained.values())).fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match=f"{plan.names[0]} had NaN or infinities already"):
        made.train()
    made.model.check = False
    made.train()
    assert made.state.global_step == 4


def test_a_loss_that_is_finite_again(tmp_path: Path) -> None:
    def once(model: nn.Module, batch: Any) -> Any:
        found = runs.loss(model, batch)
        return found | {"loss": found["loss"] * (float("inf") if torch.is_grad_enabled() else 1.0)}

    made, _ = trainer(tmp_path, 1, loss=once, save_strategy="no")
    with pytest.raises(NonFiniteLossError, match="was not finite, and is when the batch runs again"):
        made.train()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        TrainerModel(runs.plan(), runs.loss)()

    def uncounted(model: nn.Module, batch: Any) -> Tensor:
        return runs.loss(model, batch)["loss"]

    made, _ = trainer(tmp_path, 1, loss=uncounted)
    with pytest.raises(ValueError, match='counted=True needs a loss that returns its number of labels as "count"'):
        made.train()

"""transformers.Trainer with two processes: the updates of one that sees the same rows, and the parameters in step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from mllm_fast.finetune import NonFiniteLossError, leave_processes
from mllm_fast.finetune.trainer import TrainerModel
from tests.finetune import runs

ROOT = Path(__file__).parents[2]


class InOrder(Trainer):
    """Rows in the order of the data set, which its processes share out batch by batch."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class Losses(TrainerCallback):
    """The logged losses."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.found += [logs["loss"]] if "loss" in logs else []


def run(output: Path, size: int, loss: Any = runs.loss) -> list[float]:
    """Three updates with batches of `size` rows a process; the losses."""
    arguments = TrainingArguments(
        str(output), max_steps=3, per_device_train_batch_size=size, learning_rate=5e-3, lr_scheduler_type="constant",
        logging_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True, max_grad_norm=0.0,
        weight_decay=0.0, save_steps=3,
    )  # fmt: skip
    losses = Losses()
    plan = runs.plan(dropout=0)
    data = runs.Captions(24, augment=False)
    model = TrainerModel(plan, loss, counted=True)
    InOrder(model, arguments, runs.collate, data, callbacks=[losses]).train()
    return losses.found


def test_two_processes(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call += ["-m", "tests.finetune.test_trainer_processes", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "losses.json").read_text())
    expected = run(tmp_path / "one", 4)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    # NaN in the second process alone stops both, in the same way.
    messages = {(tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "the loss is NaN, but every module's output is finite" in messages.pop()
    weights, alone = (load_file(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in ("two", "one"))
    before = runs.plan(dropout=0).trained
    assert weights.keys() == alone.keys() == before.keys()
    for name, value in alone.items():
        moved = (value - before[name]).abs().max()
        assert (weights[name] - value).abs().max() < 0.05 * moved + 1e-6, name


def main() -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = run(folder / "two", 2)
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(found))

    def bad(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        loss = runs.loss(model, batch)
        return loss if os.environ["RANK"] == "0" else loss | {"loss": loss["loss"] * float("nan")}

    try:
        run(folder / "bad", 2, bad)
    except NonFiniteLossError as error:
        (folder / f"error-{os.environ['RANK']}.txt").write_text(str(error))
    leave_processes()


if __name__ == "__main__":
    main()

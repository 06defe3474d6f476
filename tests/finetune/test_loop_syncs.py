"""An update waits for the GPU once: it runs on a fake one, where every other read of a tensor is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mllm_fast.finetune import TrainingSettings, randomness
from mllm_fast.finetune.interruption import Interruption
from mllm_fast.finetune.loop import _Run
from mllm_fast.finetune.meter import Meter
from mllm_fast.finetune.optimizers import build_schedule
from mllm_fast.finetune.processes import LossModule, Processes
from mllm_fast.finetune.trainer import TrainerModel
from tests.families.fake_gpu import HostReadError, fake_gpu


def loss(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    found = model(batch["x"]).square().mean()
    return {"loss": found, "count": torch.ones((), device=found.device), "twice": 2 * found}


def reading(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    found = loss(model, batch)
    found["loss"].item()
    return found


@pytest.mark.parametrize("function", [loss, reading])
def test_one_wait_an_update(function: Any) -> None:
    settings = TrainingSettings(2, batch_size=2, accumulation=3, log_every=1)
    reads: list[tuple[int, ...]] = []

    def tolist(tensor: Tensor) -> list[float]:
        reads.append(tuple(tensor.shape))
        return [1.0] * tensor.numel()

    with fake_gpu() as gpu:
        model = gpu.module(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        # The state of a run between two updates, without the files and fingerprints around it.
        run = object.__new__(_Run)
        run.settings, run.processes = settings, Processes(next(model.parameters()).device)
        run.module = LossModule(model, function, lambda device: contextlib.nullcontext())
        run.trained, run.step, run.losses, run.history = dict(model.named_parameters()), 0, [], []
        run._send = gpu.inputs  # type: ignore[method-assign]
        # AdamW is fused on a GPU and reads nothing; fake tensors know the other forms only, which count on the host.
        run.optimizer = torch.optim.SGD(run.trained.values(), lr=1.0)
        run.schedule = build_schedule(run.optimizer, settings)
        data = iter([([0, 1], {"x": torch.ones(2, 4)})] * 6)
        with (
            gpu.running(grad=True),
            mock.patch.object(FakeTensor, "tolist", tolist),
            mock.patch.object(randomness, "take", return_value={}),
            pytest.raises(HostReadError) if function is reading else contextlib.nullcontext(),
        ):
            for _ in range(2):
                run._update(data, Interruption(), Meter(2, 0, False, torch.device("cpu")))
    # Three losses, the part that is logged, the count, the signal, the norm.
    assert reads == ([] if function is reading else [(7,), (7,)])


@pytest.mark.parametrize("check", [True, False])
def test_under_trainer_the_loss_is_read_after_the_backward_pass(check: bool) -> None:
    """Where Trainer waits for it, too; nothing is read between the two passes."""
    waits: list[str] = []

    def item(tensor: Tensor) -> int:
        waits.append(where[0])
        return 0

    with fake_gpu() as gpu:
        plan: Any = SimpleNamespace(
            model=gpu.module(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))),
            autocast=lambda device: contextlib.nullcontext(),
        )
        model = TrainerModel(plan, loss, check=check).train()
        where = ["forward"]
        with (
            gpu.running(grad=True),
            mock.patch.object(FakeTensor, "item", item),
            mock.patch.object(randomness, "take", return_value={}),
        ):
            for _ in range(2):
                where[0] = "forward"
                found = model(x=gpu.inputs(torch.ones(2, 4)))["loss"]
                where[0] = "backward"
                found.backward()
    assert waits == ["backward"] * 2 * check

"""A loss that is not a number: what went wrong first, with which rows, and that nothing was updated with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_fast.finetune import NonFiniteLossError, read_trained, train
from mllm_fast.finetune.sampling import RowOrder
from tests.finetune import runs


class Overflow(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def rows_of(step: int, passes: int = 2) -> list[list[int]]:
    order = RowOrder(21, 3, 3, step * passes, (step + 1) * passes)
    return [[row for _, row in batch] for batch in order]


def run(plan: Any, output: Path, *, loss: Any = runs.loss, dataset: Any = None, **changes: Any) -> NonFiniteLossError:
    before: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, batch: Mapping[str, Any]) -> Any:
        if model.training and torch.is_grad_enabled():
            before.append({name: p.detach().clone() for name, p in plan.trained.items()})
        return loss(model, batch)

    data = dataset or runs.Captions()
    with pytest.raises(NonFiniteLossError) as caught:
        train(plan, watched, data, runs.collate, runs.settings(**changes), output, progress=False)
    # The weights with which the bad step began, and those of the last checkpoint.
    own = plan.trained
    assert all(torch.equal(value, own[name]) for name, value in before[-1].items())
    assert all(torch.isfinite(p).all() for p in own.values())
    return caught.value


class FromStep:
    """Counts the updates by the passes in training, and acts from one of them on."""

    def __init__(self, passes: int, act: Any) -> None:
        self.left = passes
        self.act = act

    def __call__(self, value: Any) -> Any:
        if self.left:
            self.left -= torch.is_grad_enabled()
            return value
        return self.act(value)


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_module_with_a_bad_output(tmp_path: Path, fused: bool) -> None:
    plan = runs.plan("dense")
    if not fused:
        import mllm_fast

        mllm_fast.unfuse(plan.model)
    inner = plan.model.blocks[1]
    act = FromStep(4, lambda x: x * float("nan"))
    forward = type(inner).forward

    class Broken(type(inner)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return act(forward(self, *args, **kwargs))

    inner.__class__ = Broken
    error = run(plan, tmp_path, save_every=1)
    assert (error.step, error.module) == (2, "blocks.1")
    assert error.rows == rows_of(2)[0]
    message = str(error)
    assert "step 3: the loss is NaN. The first module whose output is not finite is blocks.1 (Broken)" in message
    assert f"Rows of the data set in this batch: {', '.join(map(str, error.rows))}" in message
    assert all(torch.equal(value, plan.trained[name]) for name, value in read_trained(tmp_path).items())


def test_bad_rows(tmp_path: Path) -> None:
    class Bad(runs.Captions):
        def __getitem__(self, row: int) -> dict[str, Tensor]:
            sample = super().__getitem__(row)
            return sample if row != 4 else sample | {"images": sample["images"] * float("inf")}

    error = run(runs.plan(), tmp_path, dataset=Bad(), steps=9)
    assert "because the batch is: images hold(s) NaN or infinities" in str(error)
    assert 4 in error.rows
    assert len(error.rows) == 3


def test_a_bad_loss_function(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return runs.loss(model, batch)["loss"] / 0

    error = run(runs.plan(), tmp_path, loss=loss)
    assert "the loss is infinite, but every module's output is finite: it comes from the loss function" in str(error)
    assert error.module is None


def test_nothing_supervised(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        mean = F.cross_entropy(model(**{**batch, "labels": None}).logits.flatten(0, 1), batch["labels"].flatten())
        return {"loss": mean, "count": (batch["labels"] != -100).sum()}

    class Unsupervised(runs.Captions):
        def __getitem__(self, row: int) -> dict[str, Tensor]:
            sample = super().__getitem__(row)
            return sample | {"labels": sample["labels"].fill_(-100)}

    error = run(runs.plan(), tmp_path, loss=loss, dataset=Unsupervised())
    assert "nothing in the batch is supervised" in str(error)


def test_gradients_alone(tmp_path: Path) -> None:
    plan = runs.plan(train="bridge")
    resampler = plan.model.resampler
    inner = nn.Linear(24, 24)
    forward = type(resampler).forward

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = inner

        def forward(self, x: Tensor) -> Tensor:
            return Overflow.apply(x) + 0 * self.linear(x)

    class Broken(type(resampler)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(forward(self, *args, **kwargs))

    resampler.inner = Inner()
    resampler.inner.requires_grad_(False)
    resampler.__class__ = Broken
    error = run(plan, tmp_path)
    assert "the loss is finite, its gradients are not (" in str(error)
    assert error.module == "resampler.inner"
    assert error.rows == rows_of(0)[0]


def test_dropout_is_the_same_again(tmp_path: Path) -> None:
    """Only some masks make it NaN: found again, as the random numbers are those of the pass that failed."""
    plan = runs.plan()
    layer = nn.Dropout(0.5)

    class Rare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = layer(torch.ones(8))
            return x / (kept.sum() != 8)

    plan.model.vision_encoder.rare = Rare()
    forward = type(plan.model.vision_encoder).forward

    class Broken(type(plan.model.vision_encoder)):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Tensor:
            return self.rare(forward(self, images))

    plan.model.vision_encoder.__class__ = Broken
    error = run(plan, tmp_path, steps=9)
    assert error.module == "vision_encoder.rare"


def test_no_hooks_are_left(tmp_path: Path) -> None:
    from torch.nn.modules import module

    plan = runs.plan()
    test_a_bad_loss_function(tmp_path)
    assert not module._global_forward_hooks
    assert not module._global_backward_hooks
    assert all(not m._forward_hooks for m in plan.model.modules())
    error = NonFiniteLossError("text", 3, "a.b", [1])
    again = copy.copy(error)
    assert (str(again), again.step, again.module, again.rows) == ("text", 3, "a.b", [1])

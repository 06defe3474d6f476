"""A plan and its loss as one model for `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from . import randomness
from .diagnosis import NonFiniteLossError, Pass, diagnose, finite
from .plan import FinetuningPlan
from .processes import LossModule, Processes
from .settings import Loss


class TrainerModel(nn.Module):
    """What to pass to `transformers.Trainer` as `model`, unchanged: it trains what the plan trains, with any loss.

        Trainer(TrainerModel(plan, loss), TrainingArguments(..., remove_unused_columns=False), data_collator=collate, ...)

    Checkpoints hold the trained parameters only, under their names in `plan.model`, and `plan.load_trained` reads their
    `model.safetensors`. (Trainer's file of arguments is a pickle; its own loader reads that.) The plan's autocast applies, so
    leave Trainer's `bf16` and `fp16` off. Under torchrun Trainer wraps it by DDP; FSDP by Trainer is not supported: use
    `train` with `parallel="fsdp"`.

    A loss that is NaN or infinite raises `NonFiniteLossError` at the end of its backward pass, in every process: Trainer, which
    would leave it out of its log, updates nothing with it. (Gradients that are not finite where the loss is are Trainer's
    `grad_norm` to show.)

    Args:
        plan: from `prepare_finetuning`.
        loss: as for `train`.
        counted: weigh the passes of an update, in all processes, by the number of labels that are not -100 (the first
            label of a row, which nothing predicts, left out), as Trainer counts them. The loss has to return
            this number as "count". False: every pass weighs the same.
        check: look at the loss of every pass. The host waits for it where Trainer waits for the same number in order to log
            it, unless `TrainingArguments(logging_nan_inf_filter=False)`; several processes send one number round.
    """

    def __init__(self, plan: FinetuningPlan, loss: Loss, *, counted: bool = False, check: bool = True) -> None:
        super().__init__()
        self.plan = plan
        self.check = check
        self.module = LossModule(plan.model, loss, plan.autocast)
        # Trainer asks for this: whether it should hand over the number of labels, and leave the division to the model.
        self.accepts_loss_kwargs = counted

    def forward(
        self, return_loss: bool = True, num_items_in_batch: Tensor | int | None = None, **batch: Any
    ) -> dict[str, Tensor]:
        """{"loss": scalar}. Trainer evaluates models whose `return_loss` is True by default without looking for labels.

        Raises:
            ValueError: Trainer took everything out of the batch, or the loss returned no "count".
        """
        if not batch:
            raise ValueError(
                "the batch is empty: Trainer drops what forward does not name; set "
                "TrainingArguments(remove_unused_columns=False)"
            )
        checked = self.check and self.training and torch.is_grad_enabled()
        random = randomness.take(next(self.plan.model.parameters()).device) if checked else {}
        loss, count, _ = self.module(batch)
        if checked and loss.requires_grad:
            self._check_after_backward(loss, Pass([], batch, random))
        if num_items_in_batch is not None:
            if count is None:
                raise ValueError('counted=True needs a loss that returns its number of labels as "count"')
            loss = loss * (count / num_items_in_batch)
        return {"loss": loss}

    def _check_after_backward(self, loss: Tensor, done: Pass) -> None:
        """Have the end of the loss's backward pass raise an error if the loss, of any process, is not finite."""
        value = loss.detach()

        def check() -> None:
            processes = Processes(value.device)
            if not processes.sum((~torch.isfinite(value)).long()).item():
                return
            trained = self.plan.trained
            error = diagnose(self.module, [done], None, lambda batch: batch, processes, trained)
            if bad := [name for name, parameter in trained.items() if not finite(parameter)]:
                message = (
                    f"{error}. {', '.join(bad[:3])} had NaN or infinities already, by a gradient that was not finite"
                )
                error = NonFiniteLossError(message, None, error.module, [])
            raise error

        # Not here: the host would wait for the forward pass before it could start the backward pass.
        loss.register_hook(lambda gradient: Variable._execution_engine.queue_callback(check))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained parameters, by their names in the model."""
        return dict(self.plan.trained_state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave, all of it or nothing (see `FinetuningPlan.load_trained`)."""
        self.plan.load_trained(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])

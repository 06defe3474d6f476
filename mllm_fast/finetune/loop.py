"""The training loop: train what a plan trains, evaluate, stop early, write checkpoints, and go on from them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from . import checkpoint as checkpoints
from . import randomness
from .changes import Changes
from .checkpoint import Checkpoint
from .diagnosis import Pass, diagnose
from .evaluation import Evaluate, Evaluation
from .interruption import Interruption, TrainingInterrupted
from .meter import Meter, peak_memory
from .optimizers import build_optimizer, build_schedule, load_optimizer_state, optimizer_state, whole
from .plan import FinetuningPlan
from .processes import LossModule, Processes, average_replicated, gradient_norm, gradients_kept_here, shard
from .sampling import RowOrder, batches
from .settings import Loss, TrainingResult, TrainingSettings
from .sharding import layers_to_shard

__all__ = ["Loss", "TrainingInterrupted", "TrainingResult", "TrainingSettings", "train"]


def train(
    plan: FinetuningPlan,
    loss: Loss,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    settings: TrainingSettings,
    output: str | Path,
    *,
    evaluation_dataset: Any = None,
    evaluate: Evaluate | None = None,
    whole_batches: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train `plan.model` in place.

    **Accumulation.** The gradient of an update is that of the mean over all its forward passes, in all processes. Where the
    loss is a mean over a number of tokens or pairs that differs between passes, it should return that number as "count": passes
    are then weighted by it, so that an update is the same however its rows are spread over passes and processes.
    Without "count" every pass weighs the same.

    **One wait for the GPU an update.** The losses of all passes and the norm of the gradient are read together, after
    clipping and before the optimiser's step, which is thus never done with NaN. (bitsandbytes' optimisers wait themselves.)

    **Precision** is the plan's: autocast to the language model's dtype where the trained parameters are wider. Losses are not
    scaled up for fp16; prefer bf16.

    **Random numbers** come from `settings.seed`; the generators of the caller are left as they were. A run that was stopped and
    resumed computes the same losses as one that was not, bit for bit on a CPU.

    **Several processes** (`torchrun`, after `join_processes()`): each passes the same arguments, and takes its share of
    the rows. The first one writes the files; the others read them when resuming. With `parallel="fsdp"` the model stays
    sharded afterwards.

    Args:
        plan: from `prepare_finetuning`. Its model should be on its device already.
        loss: `loss(model, batch)`: a scalar, or a mapping with the scalar "loss", perhaps "count", and other scalars, which
            are logged.
        dataset: `dataset[i]` is a sample, `len(dataset)` their number.
        collate: a list of samples to a batch, a mapping; its tensors are copied to the model's device.
        settings: see `TrainingSettings`.
        output: the run's folder (see `checkpoint`); made where missing.
        evaluation_dataset: held-out samples, for the mean loss in evaluation mode.
        evaluate: further numbers of the model in evaluation mode, such as an accuracy; called in every process.
        whole_batches: the loss compares the rows of a batch with each other: leave out of the evaluation the rows that
            do not fill a batch of all processes, as training does.
        resume: go on from the checkpoint in `output`. Settings may differ in `settings.CHANGEABLE` only.
        progress: draw a progress bar on standard error.

    Returns:
        The losses and the history. The model holds the last weights; `read_trained(output, best=True)` gives the best.

    Raises:
        RunExistsError: `output` holds a run, and `resume` is False.
        NoCheckpointError: `resume` is True, and there is no checkpoint, or a damaged one.
        RunMismatchError: the checkpoint is of another model, data set or settings.
        NonFiniteLossError: the loss or a gradient is NaN or infinite.
        TrainingInterrupted: SIGINT or SIGTERM came; a checkpoint was written after the step.
        ValueError: arguments that do not fit each other.
    """
    device = next(iter(plan.trained.values())).device if plan.names else torch.device("cpu")
    with randomness.preserved(device):
        run = _Run(
            plan, loss, dataset, collate, settings, Path(output), evaluation_dataset, evaluate, whole_batches, resume, device
        )  # fmt: skip
        with Interruption() as interruption, Meter(settings.steps, run.step, progress and run.first, device) as meter:
            result = run.until_the_end(interruption, meter)
    number = interruption.number or (signal.Signals[result.stopped] if result.stopped.startswith("SIG") else 0)
    if number:
        raise TrainingInterrupted(result, number)
    return result


class _Run:
    """A run between two steps."""

    def __init__(
        self,
        plan: FinetuningPlan,
        loss: Loss,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        settings: TrainingSettings,
        output: Path,
        evaluation_dataset: Any,
        evaluate: Evaluate | None,
        whole_batches: bool,
        resume: bool,
        device: torch.device,
    ) -> None:
        self.plan, self.settings, self.output = plan, settings, output
        self.dataset, self.collate = dataset, collate
        self.processes = Processes(device)
        self.first = self.processes.rank == 0
        self.table = str(plan)
        self.identity = {
            "settings": settings.fixed(),
            "processes": self.processes.size,
            "rows": len(dataset),
            "trained": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in plan.trained.items()},
            "frozen weights": _fingerprint(plan.model, set(plan.names)),
        }
        saved = self._saved() if resume else self.processes.agree(partial(checkpoints.check_unused, output))
        self._order(0)  # a data set that is too small is found before anything is changed
        if saved is not None:
            plan.load_trained(saved.trained)
        module = LossModule(plan.model, loss, plan.autocast)
        if settings.parallel == "fsdp" and self.processes.size > 1:
            shard(module, layers_to_shard(plan.model))
        self.trained = plan.trained
        self.module = self.processes.wrap(module, settings.parallel)
        self.changes = Changes(plan.model, set(plan.names))
        self.optimizer = build_optimizer(self.trained, settings)
        self.schedule = build_schedule(self.optimizer, settings)
        self.evaluation = Evaluation(
            self.module, evaluation_dataset, collate, evaluate, settings, self.processes, whole_batches=whole_batches
        )
        self.step, self.losses, self.history, self.best = 0, list[float](), list[dict[str, Any]](), dict[str, Any]()
        randomness.seed(settings.seed, self.processes.rank, device=device)
        plan.model.train()
        if saved is not None:
            self._restore(saved)

    def _saved(self) -> Checkpoint:
        """Read by every process, after the first one found it good: it may hold more than is sent round with ease."""
        self.processes.agree(lambda: checkpoints.read(self.output, self.identity).step)
        return checkpoints.read(self.output, self.identity)

    def _restore(self, saved: Checkpoint) -> None:
        if saved.step > self.settings.steps:
            raise ValueError(
                f"the run in {self.output} has done {saved.step} steps; steps is {self.settings.steps}, expected at least that"
            )
        self.step, self.losses, self.history, self.best = saved.step, saved.losses.tolist(), saved.history, saved.best
        load_optimizer_state(self.optimizer, self.trained, saved.optimizer)
        self.schedule.load_state_dict(saved.schedule)
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            group["lr"] = rate
        self.changes.restore(saved.changed)
        randomness.put(saved.random[self.processes.rank], self.processes.device)

    def _rates(self) -> list[float]:
        """The learning rates of the next step. They depend on its number alone, also where `steps` was extended."""
        pairs = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)  # type: ignore[attr-defined]
        return [base * factor(self.step) for base, factor in pairs]

    def _order(self, start: int) -> RowOrder:
        settings, processes = self.settings, self.processes
        stop = settings.steps * settings.accumulation
        return RowOrder(
            len(self.dataset), settings.batch_size, settings.seed, start, stop, processes.rank, processes.size
        )

    def until_the_end(self, interruption: Interruption, meter: Meter) -> TrainingResult:
        """Train until the last step, until patience is exhausted, or until a signal comes."""
        settings = self.settings
        stopped = "patience" if self._impatient() else "finished"
        if self.step == settings.steps or stopped == "patience":
            return self._result(stopped)
        order = self._order(self.step * settings.accumulation)
        # Closed at once on the way out, also by an error: with workers it holds processes.
        with contextlib.closing(
            _iterate(batches(self.dataset, self.collate, order, workers=settings.workers, pin=self._on_gpu()))
        ) as data:
            meter.restart()
            while True:
                signalled = self._update(data, interruption, meter)
                last = self.step == settings.steps
                evaluated = self._evaluate(meter) if self._due(settings.evaluate_every) or last else False
                if last or self._impatient():
                    stopped = "finished" if last else "patience"
                else:
                    stopped = signal.Signals(signalled).name if signalled else ""
                if stopped or evaluated or self._due(settings.save_every):
                    with meter.pause():
                        self._save(stopped or "running")
                if stopped:
                    meter.say(self._ending(stopped))
                    return self._result(stopped)

    def _on_gpu(self) -> bool:
        return self.processes.device.type == "cuda"

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _send(self, batch: Any) -> Any:
        return send_to_device(batch, self.processes.device, non_blocking=True)

    def _update(self, data: Iterator[tuple[list[int], Any]], interruption: Interruption, meter: Meter) -> int:
        """One step. Returns the number of the signal that asks for the end, in any process, or 0."""
        settings, processes = self.settings, self.processes
        passes: list[Pass] = []
        numbers: list[Tensor] = []
        weights: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        counted = False
        for index in range(settings.accumulation):
            rows, batch = next(data)
            passes.append(Pass(rows, batch, randomness.take(processes.device)))
            with gradients_kept_here(self.module, kept=index < settings.accumulation - 1):
                loss, count, logged = self.module(self._send(batch))
                counted = counted or count is not None
                weight = torch.ones_like(loss.detach()) if count is None else count
                (loss if count is None else loss * weight).backward()
            numbers.append(loss.detach().double() * weight)
            weights.append(weight.double())
            for name, value in logged.items():
                parts[name] = parts.get(name, 0.0) + value.double() * weight
        total = torch.stack(weights).sum()
        known = torch.tensor([interruption.number], dtype=torch.float64)
        local = torch.stack([*numbers, *parts.values(), total])
        shared = processes.sum(torch.cat([local, known.to(local.device, non_blocking=True)]))
        parameters = list(self.trained.values())
        norm = self._scaled_and_clipped(parameters, shared[-2], counted)
        # The one wait of a step.
        *values, weight_sum, signals, norm_value = torch.cat([shared, norm.double().reshape(1)]).tolist()
        losses, others = values[: len(numbers)], values[len(numbers) :]
        if not all(map(math.isfinite, [*losses, norm_value])):
            raise diagnose(self.module, passes, self.step, self._send, processes, self.trained)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule.step()
        self.step += 1
        self.losses.append(sum(losses) / weight_sum)
        meter.step(sum(len(done.rows) for done in passes) * processes.size, self.losses[-1])
        if self._due(settings.log_every) or self.step == settings.steps:
            entry = dict(zip(parts, (value / weight_sum for value in others), strict=True))
            self._log(entry, rates[0], norm_value, meter)
        if processes.size == 1:
            return interruption.number
        # Several processes heed what all of them know of: the signals that had come before the step's numbers were added.
        return (interruption.number or signal.SIGTERM) if signals else 0

    def _scaled_and_clipped(self, parameters: list[nn.Parameter], total: Tensor, counted: bool) -> Tensor:
        """Turn the gradients into those of the mean, clip them, and return their norm before that, without waiting for it."""
        if self.settings.parallel == "fsdp" and self.processes.size > 1:
            average_replicated(parameters, self.processes)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise ValueError(
                "no trained parameter got a gradient: the loss does not depend on what is trained, or runs under no_grad"
            )
        if counted or self.settings.accumulation > 1:
            # DDP and FSDP average over processes: what is needed is the sum over them, by the sum of the weights.
            factor = self.processes.size / total.clamp(min=1e-12)
            for gradient in gradients:
                gradient.mul_(factor)
        norm = gradient_norm(parameters)
        if self.settings.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, norm)
        return norm

    def _log(self, parts: dict[str, float], rate: float, norm: float, meter: Meter) -> None:
        since = next((entry["step"] for entry in reversed(self.history) if "loss" in entry), 0)
        recent = self.losses[since:]
        entry: dict[str, Any] = {"step": self.step, "loss": sum(recent) / len(recent), **parts}
        entry |= {"learning_rate": rate, "gradient_norm": norm, "rows_per_second": round(meter.speed(), 3)}
        self.history.append(entry | {"peak_bytes": peak_memory(self.processes.device)})
        meter.restart()

    def _evaluate(self, meter: Meter) -> bool:
        """Evaluate where there is something to. Returns whether it was done."""
        if not self.evaluation.asked:
            return False
        with meter.pause():
            numbers = self.evaluation.run()
            self.history.append({"step": self.step, "evaluation": numbers})
            if self.evaluation.better(numbers, self.best.get("value")):
                name, value = self.evaluation.monitored(numbers)
                self.best = {"step": self.step, "name": name, "value": value, "since": 0}
                metadata = {"step": str(self.step), "plan": self.table, "monitored": f"{name} {value}"}
                trained = self._trained()
                path = self.output / checkpoints.BEST_FILE
                self.processes.agree(lambda: checkpoints.write_trained(path, trained, metadata))
            else:
                self.best["since"] = self.best.get("since", 0) + 1
        text = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        meter.evaluated(text)
        meter.say(f"step {self.step}: {text}" + (" (best so far)" if self.best["since"] == 0 else ""))
        return True

    def _impatient(self) -> bool:
        return self.settings.patience is not None and self.best.get("since", 0) >= self.settings.patience

    def _trained(self) -> dict[str, Tensor]:
        return {name: whole(p.detach()).cpu() for name, p in self.trained.items()}

    def _save(self, stopped: str) -> None:
        # Sharded tensors are put together and random states collected by all processes; the first one writes.
        saved = Checkpoint(
            step=self.step,
            batches=self.step * self.settings.accumulation,
            trained=self._trained(),
            optimizer=optimizer_state(self.optimizer, self.trained),
            schedule=self.schedule.state_dict(),
            random=self.processes.gather(randomness.take(self.processes.device)),
            changed=self.changes.tensors(),
            losses=torch.tensor(self.losses, dtype=torch.float64),
            history=self.history,
            best=self.best,
            identity=self.identity,
        )
        summary = self._summary(stopped)
        self.processes.agree(lambda: checkpoints.write(self.output, saved, plan=self.table, summary=summary))

    def _summary(self, stopped: str) -> dict[str, Any]:
        return {
            "step": self.step,
            "state": stopped,
            "best": self.best,
            "settings": asdict(self.settings),
            "processes": self.processes.size,
            "plan": self.table.splitlines(),
            "history": self.history,
        }

    def _ending(self, stopped: str) -> str:
        if stopped == "finished":
            return f"{self.step} steps done; {checkpoints.TRAINED_FILE} is in {self.output}"
        if stopped == "patience":
            tries = f"{self.settings.patience} evaluation(s)"
            return f"stopped at step {self.step}: {tries} were no better than that of step {self.best.get('step')}"
        return f"{stopped}: stopped after step {self.step}; go on by resume=True with {self.output}"

    def _result(self, stopped: str) -> TrainingResult:
        best = self.best if "value" in self.best else {"step": None, "value": None}
        return TrainingResult(
            self.output, self.step, list(self.losses), list(self.history), best["step"], best["value"], stopped
        )


def _iterate(loader: Any) -> Generator[Any]:
    """The loader's batches, as a generator: something that can be closed."""
    yield from loader


def _fingerprint(model: nn.Module, trained: set[str]) -> str:
    """A hash of the frozen parameters: names, shapes, dtypes, and up to 16 numbers of each. Another model has another one."""
    digest = hashlib.sha256()
    samples = []
    for name, parameter in model.named_parameters():
        if name not in trained:
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
            flat = parameter.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // 16)][:16].float().cpu())
    if samples:
        digest.update(torch.cat(samples).numpy().tobytes())
    return digest.hexdigest()[:16]

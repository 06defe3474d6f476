"""What a training run is told, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor | Mapping[str, Tensor]]
Schedule = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adamw", "adamw8bit"]
Parallel = Literal["ddp", "fsdp"]

# A resumed run may change these: they say how long it goes on and what is seen of it, not what a step does.
CHANGEABLE = ("steps", "log_every", "evaluate_every", "save_every", "patience", "monitor", "workers")


@dataclass(frozen=True)
class TrainingSettings:
    """How a run trains.

    Attributes:
        steps: updates of the parameters.
        batch_size: rows of one forward pass of one process.
        accumulation: forward passes an update; it sees `batch_size * accumulation * processes` rows.
        learning_rate: the highest one, reached after the warm-up.
        schedule: after the warm-up: "cosine" or "linear" down to `minimum_learning_rate`, or "constant".
        warmup_steps: the learning rate rises linearly from 0 over this many updates.
        minimum_learning_rate: what "cosine" ends at ("linear" ends at 0).
        weight_decay: AdamW's, on the parameters that `optimizers.decays` names.
        betas: AdamW's.
        gate_learning_rate: a factor on the learning rate of gates. Gates start closed and nothing behind a closed gate
            learns; 10 opens them sooner where a run is short.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        optimizer: "adamw", or "adamw8bit" (bitsandbytes; its two moments take 2 bytes a parameter instead of 8).
        seed: of the order of the rows, of each row's augmentation and of dropout.
        log_every: updates between two entries of the history.
        evaluate_every: updates between two evaluations, which also come at the end; None: at the end only.
        save_every: updates between two checkpoints, which are also written at the end; None: at the end only.
        patience: stop after this many evaluations without a better one; None never stops early.
        monitor: what "better" means: "loss" is the mean loss over the evaluation data; any other name is a number that
            `evaluate` returns, higher being better unless it ends in "loss". None: "loss" where there are evaluation
            data, else the first number of `evaluate`.
        workers: processes that read rows; 0 reads them in the training process. The rows are the same either way.
        parallel: under torchrun: "ddp" replicates the model, "fsdp" shards it (see `processes.shard`).
    """

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    minimum_learning_rate: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    gate_learning_rate: float = 1.0
    max_grad_norm: float | None = 1.0
    optimizer: OptimizerName = "adamw"
    seed: int = 0
    log_every: int = 10
    evaluate_every: int | None = None
    save_every: int | None = None
    patience: int | None = None
    monitor: str | None = None
    workers: int = 0
    parallel: Parallel = "ddp"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "evaluate_every", "save_every", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        for name in ("warmup_steps", "workers", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 0")
        for name in ("learning_rate", "gate_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}; expected a number above 0")
        for name in ("weight_decay", "minimum_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number of at least 0")
        if self.minimum_learning_rate > self.learning_rate:
            raise ValueError(
                f"minimum_learning_rate {self.minimum_learning_rate} is above learning_rate {self.learning_rate}"
            )
        if self.minimum_learning_rate and self.schedule != "cosine":
            raise ValueError(f'minimum_learning_rate belongs to schedule="cosine"; this one is {self.schedule!r}')
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas!r}; expected two numbers from 0 to below 1")
        for name, kind in (("schedule", Schedule), ("optimizer", OptimizerName), ("parallel", Parallel)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(kind))}")
        # From a file or a command line it comes as a list.
        object.__setattr__(self, "betas", tuple(self.betas))

    def fixed(self) -> dict[str, Any]:
        """What a resumed run may not change."""
        return {name: value for name, value in asdict(self).items() if name not in CHANGEABLE}


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        output: the run's folder.
        step: updates done, also in the runs that this one resumed.
        losses: of every update, averaged over its rows and over all processes.
        history: a mapping for every `log_every` updates ("step", "loss": the mean since the entry before, the loss's other
            parts, "learning_rate", "gradient_norm", "rows_per_second", "peak_bytes") and for every evaluation ("step",
            "evaluation": its numbers).
        best_step: the update with the best evaluation, None without evaluations.
        best: what was monitored, at that update.
        stopped: "finished", "patience", or the name of the signal.
    """

    output: Path
    step: int
    losses: list[float]
    history: list[dict[str, Any]] = field(repr=False)
    best_step: int | None
    best: float | None
    stopped: str

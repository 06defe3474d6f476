"""What a run is judged by: the mean loss over held-out rows, and whatever a function of the model returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from . import randomness
from .processes import LossModule, Processes, gathered
from .sampling import batches
from .settings import TrainingSettings

Evaluate = Callable[[nn.Module], Mapping[str, float]]


class _InOrder:
    """Batches for `sampling.batches`: every row once, the same number of batches for every process.

    Whole batches are dealt out to the processes. The rows that are left over go to every process, and count in the first;
    with `whole` they are left out, and rows that do not fill one batch make a smaller one.
    """

    def __init__(self, rows: int, settings: TrainingSettings, processes: Processes, *, whole: bool = False) -> None:
        self.seed = settings.seed
        size, rank = settings.batch_size, processes.rank
        if whole:
            size = min(size, rows // processes.size)
        shared = rows // (size * processes.size) * size * processes.size
        self.own = shared // (size * processes.size)
        starts = range(rank * size, shared, size * processes.size)
        self.plan = [range(start, start + size) for start in starts]
        if not whole:
            self.plan += [range(start, min(start + size, rows)) for start in range(shared, rows, size)]

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([[(row, row) for row in rows] for rows in self.plan])


class Evaluation:
    """Evaluates a model in training, and remembers which evaluation was the best.

    Args:
        module: model and loss, as they are trained.
        dataset: held-out rows; None: no loss.
        collate: of their samples.
        evaluate: further numbers.
        settings: batch size, workers and what to monitor.
        processes: they share the rows; all of them call `evaluate`, and the first one's numbers count.
        whole_batches: leave out the rows that do not fill a batch of all processes.

    Raises:
        ValueError: `patience` or `monitor` without anything to evaluate, no rows, or too few for a whole batch.
    """

    def __init__(
        self,
        module: nn.Module,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        evaluate: Evaluate | None,
        settings: TrainingSettings,
        processes: Processes,
        *,
        whole_batches: bool = False,
    ) -> None:
        self.whole_batches = whole_batches
        self.module, self.dataset, self.collate, self.evaluate = module, dataset, collate, evaluate
        self.settings, self.processes = settings, processes
        self.asked = dataset is not None or evaluate is not None
        if not self.asked:
            for name in ("evaluate_every", "patience", "monitor"):
                if getattr(settings, name) is not None:
                    raise ValueError(f"{name} needs something to evaluate; pass evaluation_dataset or evaluate")
        if dataset is not None and not len(dataset):
            raise ValueError("evaluation_dataset has no rows")
        least = max(2, processes.size)
        if whole_batches and dataset is not None and len(dataset) < least:
            raise ValueError(
                f"evaluation_dataset has {len(dataset)} row(s); the loss compares the rows of a batch with each other, and "
                f"{processes.size} process(es) need at least {least}"
            )
        if dataset is None and settings.monitor == "loss" and evaluate is None:
            raise ValueError('monitor="loss" needs an evaluation_dataset')

    def run(self) -> dict[str, float]:
        """The numbers now. Training goes on afterwards as if this had not been: same modes, same random numbers."""
        model = _inner(self.module).model
        modes = [(module, module.training) for module in model.modules()]
        with randomness.preserved(self.processes.device), torch.no_grad(), gathered(self.module):
            randomness.seed(self.settings.seed, device=self.processes.device)
            model.eval()
            try:
                found = {} if self.dataset is None else self._loss()
                if self.evaluate is not None:
                    numbers = {name: float(value) for name, value in self.evaluate(model).items()}
                    found |= self.processes.agree(lambda: numbers)
            finally:
                for module, training in modes:
                    module.training = training
        return found

    def _loss(self) -> dict[str, float]:
        order = _InOrder(len(self.dataset), self.settings, self.processes, whole=self.whole_batches)
        device, totals = self.processes.device, dict[str, Any]()
        loader = batches(self.dataset, self.collate, order, workers=self.settings.workers, pin=device.type == "cuda")
        for number, (rows, batch) in enumerate(loader):
            loss, count, parts = self.module(send_to_device(batch, device, non_blocking=True))
            weight = torch.tensor(float(len(rows)), device=loss.device) if count is None else count
            if number >= order.own and self.processes.rank:
                weight = torch.zeros_like(weight)
            for name, value in {"loss": loss, **parts}.items():
                # A batch in which nothing counts has no mean: 0 / 0.
                seen = torch.where(weight > 0, value * weight, 0.0)
                totals[name] = totals.get(name, 0.0) + seen.double()
            totals["count"] = totals.get("count", 0.0) + weight.double()
        sums = self.processes.sum(torch.stack(list(totals.values()))).tolist()
        found = dict(zip(totals, sums, strict=True))
        count = found.pop("count")
        return {name: value / count if count else float("nan") for name, value in found.items()}

    def monitored(self, numbers: Mapping[str, float]) -> tuple[str, float]:
        """(name, value) of what is monitored.

        Raises:
            ValueError: `evaluate` did not return it.
        """
        name = self.settings.monitor or ("loss" if self.dataset is not None else next(iter(numbers), None))
        if name is None or name not in numbers:
            raise ValueError(f"monitor is {name!r}; the evaluation gave {', '.join(numbers) or 'nothing'}")
        return name, numbers[name]

    def better(self, numbers: Mapping[str, float], best: float | None) -> bool:
        """Whether these numbers beat the best value so far. NaN never does."""
        name, value = self.monitored(numbers)
        if value != value:
            return False
        return best is None or (value < best if name.endswith("loss") else value > best)


def _inner(module: nn.Module) -> LossModule:
    inner = getattr(module, "module", module)
    assert isinstance(inner, LossModule)
    return inner

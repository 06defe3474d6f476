"""Which rows a step sees: a seeded order whose position is a number, so that a run can go on from any step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from . import randomness

# Marks the streams of `randomness`, so that the order, the rows and the collation never share one.
_ORDER, _ROW, _COLLATE = range(3)


class RowOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (place in the run, row), for one of several processes.

    Every epoch goes through the rows in an order drawn from (seed, epoch). Rows that do not fill a batch of all processes
    are left out of that epoch; the next order leaves out others. Batch number n of all processes together holds
    the same rows whether one process reads it or several.

    Args:
        rows: of the data set.
        batch_size: rows of one batch of one process.
        seed: of the order.
        start, stop: numbers of the first batch and of the batch that is no longer read.
        rank, processes: which share of each batch this is.

    Raises:
        ValueError: the data set does not fill one batch.
    """

    def __init__(
        self, rows: int, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, processes: int = 1
    ) -> None:
        whole = batch_size * processes
        if rows < whole:
            raise ValueError(
                f"the data set has {rows} rows and one batch of all {processes} process(es) takes {whole}; "
                "use a smaller batch_size"
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.start, self.stop = start, stop
        self.rank, self.whole = rank, whole

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self.rows // self.whole
        order: list[int] = []
        current = None
        for number in range(self.start, self.stop):
            epoch, place = divmod(number, batches)
            if epoch != current:
                drawn = randomness.generator(_ORDER, self.seed, epoch)
                order, current = torch.randperm(self.rows, generator=drawn).tolist(), epoch
            first = self.rank * self.batch_size
            yield [
                (number * self.whole + first + i, order[place * self.whole + first + i]) for i in range(self.batch_size)
            ]


class _SeededRows(Dataset[Any]):
    """Draws every row with generators seeded by its place, in whichever process it is read."""

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows = rows
        self.seed = seed

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int, Any]]:
        found = []
        with randomness.preserved():
            for place, row in wanted:
                randomness.seed(_ROW, self.seed, place)
                found.append((place, row, self.rows[row]))
        return found

    def __getitem__(self, wanted: tuple[int, int]) -> tuple[int, int, Any]:
        return self.__getitems__([wanted])[0]


class _SeededCollate:
    def __init__(self, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.collate = collate
        self.seed = seed

    def __call__(self, found: list[tuple[int, int, Any]]) -> tuple[list[int], Any]:
        with randomness.preserved():
            randomness.seed(_COLLATE, self.seed, found[0][0])
            batch = self.collate([sample for _, _, sample in found])
        return [row for _, row, _ in found], batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    # Ctrl-C and a cluster's warning go to every process of the group; the trainer still needs this step's rows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(
    dataset: Any, collate: Callable[[list[Any]], Any], order: RowOrder, *, workers: int = 0, pin: bool = False
) -> DataLoader[tuple[list[int], Any]]:
    """Pairs (rows, collated batch) in the given order.

    What a row's augmentation and `collate` draw from torch's CPU generator, numpy or Python depends on the seed and on the
    place in the run alone: not on the number of workers, nor on where the run was stopped and resumed. It does not disturb
    dropout either.

    Args:
        dataset: `dataset[row]` is a sample.
        collate: samples to a batch.
        order: which rows.
        workers: processes that read; they ignore SIGINT and SIGTERM, which are for the training process.
        pin: put tensors into pinned memory, for copies to a GPU.
    """
    return DataLoader(
        _SeededRows(dataset, order.seed),
        batch_sampler=order,
        collate_fn=_SeededCollate(collate, order.seed),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_trainer if workers else None,
        # Without one, starting the loader would draw from the global generator.
        generator=torch.Generator(),
    )

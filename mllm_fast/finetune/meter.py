"""The progress bar of a run: loss, rows a second and peak memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from types import TracebackType

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch had allocated on the device; on the CPU, the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """Counts rows and time, and shows them.

    Args:
        steps: of the run.
        done: steps that an earlier run did.
        show: draw the bar, on standard error.
        device: whose memory is shown.
    """

    def __init__(self, steps: int, done: int, show: bool, device: torch.device) -> None:
        self.device = device
        self._rows, self._since, self._paused = 0, time.perf_counter(), 0.0
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not show,
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, note="")
        self._evaluation = ""

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def step(self, rows: int, loss: float) -> None:
        """One update is done."""
        self._rows += rows
        note = f"loss {loss:.4f}  {self.speed():.1f} rows/s  peak {decimal(peak_memory(self.device))}{self._evaluation}"
        self._progress.update(self._task, advance=1, note=note)

    def speed(self) -> float:
        """Rows a second since `restart`, without the pauses."""
        return self._rows / max(time.perf_counter() - self._since - self._paused, 1e-9)

    def restart(self) -> None:
        """Measure the speed anew."""
        self._rows, self._since, self._paused = 0, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is no training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def evaluated(self, text: str) -> None:
        """Show the last evaluation beside the loss."""
        self._evaluation = f"  {text}"

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._progress.disable:
            self._progress.console.print(text, markup=False, highlight=False)

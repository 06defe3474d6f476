"""SIGINT and SIGTERM during training: finish the update, write a checkpoint, stop; a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from .settings import TrainingResult

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(SystemExit):
    """A signal stopped the run, after a checkpoint was written. Uncaught, it ends the process with status 128 + signal.

    Attributes:
        result: the run until then.
    """

    def __init__(self, result: TrainingResult, number: int) -> None:
        super().__init__(128 + number)
        self.result = result

    def __str__(self) -> str:
        return f"{self.result.stopped} after step {self.result.step}; the checkpoint is in {self.result.output}"


class Interruption:
    """Notes the first SIGINT or SIGTERM while it is entered. Outside the main thread signals cannot be caught: it does
    nothing there.

    Attributes:
        number: the signal, 0 before there was one.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self._restore()
            signal.raise_signal(number)
            return
        self.number = number
        # Neither print nor a logger may run here: the signal may have come while one of them held its lock.
        os.write(2, b"\nfinishing this step, then a checkpoint; signal again to stop at once\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

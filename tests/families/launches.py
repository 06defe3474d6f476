"""Counts what a GPU would have to launch, without one: Triton kernels and ATen ops that compute.

In Triton's interpreter the launches run, at small widths; on a fake GPU they are only recorded, at any width.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.families.fake_gpu import FakeGpu

# Ops that give memory, another look at it, or what is known of it; those that their schema does not call views.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "set_",
    "sym_size", "sym_stride", "sym_numel", "device", "promote_types",
}  # fmt: skip


@dataclass
class Launches:
    """Names of Triton kernels and of ATen ops, and how often each was launched."""

    kernels: Counter[str] = field(default_factory=Counter)
    aten: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All of them."""
        return self.kernels.total() + self.aten.total()

    def __str__(self) -> str:
        return f"{self.total} launches: {dict(self.kernels)} and {dict(self.aten)}"


class _CountAten(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _FREE:
            self.launches.aten[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def interpreted() -> Iterator[Launches]:
    """Count the launches of the `with` block in the interpreter. Inside of a launch, where it copies tensors, nothing."""
    launches = Launches()

    def launch(call: Callable[..., None], executor: Any, args: Any, kwargs: Any) -> None:
        launches.kernels[executor.fn.__name__] += 1
        with _disable_current_modes():
            call(executor, *args, **kwargs)

    with _instead_of_launching(launch), torch.no_grad(), _CountAten(launches):
        yield launches


@contextlib.contextmanager
def not_launching() -> Iterator[None]:
    """What is launched in the `with` block does not run: for a first call that only has to leave its weights behind."""
    with _instead_of_launching(lambda *_: None), torch.no_grad():
        yield


@contextlib.contextmanager
def _instead_of_launching(launch: Callable[..., None]) -> Iterator[None]:
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: launch(call, self, args, kwargs))
        yield


@contextlib.contextmanager
def recorded(gpu: FakeGpu) -> Iterator[Launches]:
    """Count the launches of the `with` block, which runs on the fake GPU."""
    launches = Launches()
    before = len(gpu.launches)
    with gpu.running(), _CountAten(launches):
        yield launches
    launches.kernels.update(launch.kernel.fn.__name__ for launch in gpu.launches[before:])

"""Counts what a GPU would have to launch, without one: Triton kernels (in the interpreter) and ATen ops that compute."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Ops that give memory or another look at it; those that their schema does not call views.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "set_",
    "sym_size", "sym_stride", "sym_numel", "device", "promote_types",
}  # fmt: skip


@dataclass
class Launches:
    """What `counted` saw: names of Triton kernels and of ATen ops, and how often each."""

    kernels: Counter[str] = field(default_factory=Counter)
    aten: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All of them."""
        return self.kernels.total() + self.aten.total()

    def __str__(self) -> str:
        return f"{self.total} launches: {dict(self.kernels)} and {dict(self.aten)}"


class _Count(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _FREE:
            self.launches.aten[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[Launches]:
    """Count the launches of the `with` block. Not what happens inside of one: the interpreter copies tensors there.

    Outside of the interpreter only ATen ops are counted.
    """
    from triton.runtime.interpreter import GridExecutor

    launches = Launches()
    call = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.kernels[self.fn.__name__] += 1
        with _disable_current_modes():
            return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), _Count(launches):
        patch.setattr(GridExecutor, "__call__", launch)
        yield launches

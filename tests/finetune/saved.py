"""What autograd keeps between forward and backward: bytes, and whose they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Saved:
    """Bytes of distinct storages that were saved, by the innermost of the named modules that ran; "" for none of them.

    The model's own parameters and buffers do not count, nor do tensors that were there before (`known`).
    """

    def __init__(self, model: nn.Module, known: list[Tensor]) -> None:
        self.bytes: dict[str, int] = {}
        self.shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        # The storages are held, so that no address is used twice.
        tensors = [*model.parameters(), *model.buffers(), *known]
        self.storages: dict[int, Any] = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        self.running: list[str] = [""]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.bytes.values())

    def keep(self, t: Tensor) -> Tensor:
        """Count a tensor that is saved; a view counts as the whole that it keeps alive."""
        storage = t.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage
            self.bytes[self.running[-1]] = self.bytes.get(self.running[-1], 0) + storage.nbytes()
            self.shapes.setdefault(self.running[-1], []).append((str(t.dtype), tuple(t.shape)))
        return t


@contextmanager
def saving(model: nn.Module, modules: dict[str, nn.Module] | None = None, known: list[Tensor] = []) -> Iterator[Saved]:  # noqa: B006
    """Count what is saved inside."""
    saved, handles = Saved(model, known), []
    for name, module in (modules or {}).items():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            saved.running.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            saved.running.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda t: t):
            yield saved
    finally:
        for handle in handles:
            handle.remove()

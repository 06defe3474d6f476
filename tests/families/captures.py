"""A stand-in for the GPU that captures and replays, and what tests ask about it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mllm_fast
from mllm_fast.families import state_of
from mllm_fast.modules.state import FusedState


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the ops of a run, on the very tensors they ran on, to be run again in place."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for func, args, kwargs, out in self.ops:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    # A view or a tensor written in place is where it was.
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder:
    """Stands for `CudaCapture`."""

    def __init__(self) -> None:
        self.captures = self.replays = self.turns = 0
        self.fails = False

    def refusal(self, device: torch.device) -> str | None:
        return None

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        self.turns += 1
        yield

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.captures += 1
        with Tape() as tape:
            outputs = run()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay, outputs


def recorded(model: nn.Module) -> Recorder:
    """Fuse with CUDA graphs, which the returned stand-in captures."""
    mllm_fast.fuse(model, cuda_graphs=True)
    recorder = Recorder()
    for module in model.modules():
        if (state := state_of(module)) is not None:
            state.shared.capture = recorder
    return recorder


def captured(model: nn.Module) -> dict[str, int]:
    """How many shapes each module has captured."""
    states = {name: state_of(module) for name, module in model.named_modules()}
    return {name: s.graphs.captured for name, s in states.items() if s is not None and s.graphs is not None}


def skipped(module: nn.Module) -> str:
    """Why the module's last run was not replayed."""
    state: FusedState = module._mllm_fast
    return state.graphs.skipped or ""

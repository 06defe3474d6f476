"""Run a function in several processes that can talk to each other (gloo)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mllm_fast.finetune import leave_processes


def run_processes(function: Callable[[int], Any], folder: Path, count: int = 2) -> list[Any]:
    """What `function(rank)`, of a module's top level, gives in each of `count` processes: tensors, numbers and text."""
    spawn(_run, (function, str(folder), count), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _run(rank: int, function: Callable[[int], Any], folder: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    torch.save(function(rank), Path(folder) / f"{rank}.pt")
    leave_processes()

"""What each of several processes runs: `torchrun --nproc-per-node 2 -m tests.finetune.distributed_runs CASE FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mllm_fast.finetune import (
    FinetuningPlan,
    NonFiniteLossError,
    RunExistsError,
    TrainingInterrupted,
    join_processes,
    leave_processes,
    train,
)
from mllm_fast.finetune.sampling import RowOrder
from mllm_fast.finetune.stages import pair_loss, prepare_stage
from tests.finetune import runs, systems

SHARDED: list[str] = []
QUIET = runs.Captions(24, augment=False)


def plan(kind: str, dropout: float = 0.0) -> FinetuningPlan:
    """Over a dense language model one of the gates is a single number, which FSDP2 cannot shard."""
    made = runs.plan(kind, dropout=dropout)
    if kind == "dense":
        gate = made.trained["blocks.0.attn_gate"]
        gate.data = gate.data.reshape(())
    return made


def run(folder: Path, steps: int = 4, *, kind: str = "nf4", **changes: Any) -> Any:
    """Two processes with batches of 2 see the rows that one sees with batches of 4."""
    told = {"batch_size": 2 if dist.is_initialized() else 4, "accumulation": 2, **changes}
    call = {name: told.pop(name) for name in ("resume", "evaluation_dataset", "evaluate") if name in told}
    loss = told.pop("loss", runs.loss)
    made = plan(kind, told.pop("dropout", 0.0))
    settings = runs.settings(steps, **told)
    result = train(made, loss, QUIET, runs.collate, settings, folder, progress=False, **call)
    SHARDED[:] = [name for name, p in made.model.named_parameters() if isinstance(p, DTensor)]
    return result


def order(rank: int) -> RowOrder:
    """The rows of the one step of `errors`."""
    return RowOrder(len(QUIET), 2, 3, 0, 2, rank, 2)


def ddp(folder: Path, parallel: str = "ddp", kind: str = "nf4") -> Any:
    """Train with an evaluation over rows that do not come out even."""
    held_out = runs.Captions(7, augment=False)
    batch = runs.collate([held_out[row] for row in range(7)])

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"own loss": model(**batch).loss.item()}

    evaluation = {"evaluation_dataset": held_out, "evaluate": evaluate, "evaluate_every": 2}
    result = run(folder, parallel=parallel, kind=kind, **evaluation)
    return {**result.__dict__, "sharded": list(SHARDED)}


def fsdp(folder: Path) -> Any:
    """The same with sharded parameters."""
    return ddp(folder, "fsdp")


def fsdp_dense(folder: Path) -> Any:
    """The same with a dense language model, whose layers are sharded too."""
    return ddp(folder, "fsdp", "dense")


def resume(folder: Path, **changes: Any) -> Any:
    """Stopped by a signal to one of the processes, and resumed, with dropout."""
    changes["dropout"] = 0.3
    whole = run(folder / "whole", **changes)
    passes = [0]

    def signalling(model: nn.Module, batch: Mapping[str, Any]) -> Any:
        passes[0] += 1
        if passes[0] == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return runs.loss(model, batch)

    stopped = None
    try:
        run(folder / "parts", loss=signalling, **changes)
    except TrainingInterrupted as interrupted:
        stopped = interrupted.result.step
    rest = run(folder / "parts", resume=True, **changes)
    return {"stopped": stopped, "whole": whole.losses, "resumed": rest.losses}


def resume_fsdp(folder: Path) -> Any:
    """The same with sharded parameters."""
    return resume(folder, parallel="fsdp")


def resume_8_bit(folder: Path) -> Any:
    """The same with states of the optimiser in 8 bits."""
    return resume(folder, optimizer="adamw8bit")


def stage1(folder: Path) -> Any:
    """One update of BLIP-2's first stage with four pairs, each of which has wrong partners at fixed places."""
    torch.manual_seed(0)
    model, processor = systems.blip2_stage1()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    rank, own = (dist.get_rank(), 2) if dist.is_initialized() else (0, 4)
    found = prepare_stage(
        "blip2-stage1",
        model=model,
        processor=processor,
        data=systems.samples(5),
        batch_size=own,
        steps=1,
        warmup_steps=0,
    )

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        # Wrong images of the other process, and wrong texts of either.
        negatives = tuple(
            torch.tensor(places)[own * rank : own * (rank + 1)] for places in ([2, 3, 0, 1], [3, 0, 1, 2])
        )
        return pair_loss(model, {**batch, "negatives": negatives})

    found.stage = replace(found.stage, loss=loss)
    return found.train(folder, progress=False).history


def errors(folder: Path) -> Any:
    """Errors of one process reach all of them."""
    found = {}
    run(folder / "run", 1)
    try:
        run(folder / "run", 1)
    except RunExistsError as error:
        found["exists"] = str(error)

    def bad(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        loss = runs.loss(model, batch)
        return loss if dist.get_rank() == 0 else loss | {"loss": loss["loss"] * float("nan")}

    for parallel in ("ddp", "fsdp"):
        try:
            run(folder / parallel, 1, loss=bad, parallel=parallel)
        except NonFiniteLossError as error:
            found[parallel] = str(error)
    try:
        run(folder / "8 bit", 1, parallel="fsdp", optimizer="adamw8bit")
    except ValueError as error:
        found["8 bit"] = str(error)
    return found


_ALL = (ddp, fsdp, fsdp_dense, resume, resume_fsdp, resume_8_bit, stage1, errors)
CASES: dict[str, Callable[[Path], Any]] = {case.__name__: case for case in _ALL}


def main() -> None:
    """Run the cases, one after the other, and write what each process found."""
    torch.set_num_threads(1)
    join_processes()
    output = Path(sys.argv[1])
    for name in sys.argv[2:]:
        found = CASES[name](output / name)
        path = output / f"{name}-{dist.get_rank()}.json"
        path.write_text(json.dumps(found, default=str))
    leave_processes()


if __name__ == "__main__":
    main()

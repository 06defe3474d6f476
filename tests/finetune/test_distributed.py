"""Two processes against one with batches twice as large: DDP and FSDP2, with what they write and how they stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_fast.finetune import read_trained
from mllm_fast.finetune.processes import Processes
from mllm_fast.finetune.sharding import layers_to_shard
from tests.families import builders
from tests.finetune import distributed_runs
from tests.models import helpers

ROOT = Path(__file__).parents[2]
TRAINED = ["ddp", "fsdp", "fsdp_dense"]
RESUMED = ["resume", "resume_fsdp", "resume_8_bit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one start of two processes: most of the time goes into importing."""
    output = tmp_path_factory.mktemp("distributed")
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call += ["-m", "tests.finetune.distributed_runs", str(output), *distributed_runs.CASES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return output


def found(folder: Path, name: str) -> list[Any]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", TRAINED)
def test_the_same_losses_as_one_process(folder: Path, tmp_path: Path, case: str) -> None:
    kind = "dense" if case == "fsdp_dense" else "nf4"
    one = distributed_runs.ddp(tmp_path, kind=kind)
    first, second = found(folder, case)
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], one["losses"], rtol=1e-4)
    for own, entry in zip(first["history"], one["history"], strict=True):
        np.testing.assert_allclose(own.get("gradient_norm", 0), entry.get("gradient_norm", 0), rtol=1e-3)
        if "evaluation" in entry:
            for name in ("loss", "own loss"):
                np.testing.assert_allclose(own["evaluation"][name], entry["evaluation"]["loss"], rtol=1e-4)
    # The whole trained tensors, under the model's names, and nothing else.
    weights, expected = read_trained(folder / case), read_trained(tmp_path)
    assert weights.keys() == expected.keys()
    before = distributed_runs.plan(kind).trained
    for key, value in expected.items():
        moved = (value - before[key]).abs().max()
        assert (weights[key] - value).abs().max() < 0.05 * moved + 1e-6, key
    assert sorted(p.name for p in (folder / case).iterdir()) == sorted(p.name for p in tmp_path.iterdir())


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_by_a_signal_to_one_process_and_resumed(folder: Path, name: str) -> None:
    for result in found(folder, name):
        assert result["stopped"] == 2
        assert result["resumed"] == result["whole"]
    whole, parts = (read_trained(folder / name / part) for part in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_8_bit_states_are_in_the_checkpoint(folder: Path) -> None:
    state = torch.load(next((folder / "resume_8_bit" / "whole").glob("state-*.pt")), weights_only=True)
    kinds = {
        name: {v.dtype for v in own.values() if isinstance(v, torch.Tensor)} for name, own in state["optimizer"].items()
    }
    large = {name for name, p in distributed_runs.plan("nf4").trained.items() if p.numel() >= 4096}
    assert large
    assert {name for name, found in kinds.items() if torch.uint8 in found} == large


def test_the_first_stage_of_blip2_sees_the_pairs_of_all(folder: Path, tmp_path: Path) -> None:
    first, second = found(folder, "stage1")
    (own,), (other,), (one,) = first, second, distributed_runs.stage1(tmp_path)
    for name in ("loss", "itc", "itm", "itg", "gradient_norm"):
        assert own[name] == other[name] > 0
        np.testing.assert_allclose(own[name], one[name], rtol=1e-4, err_msg=name)


def test_errors_of_one_process_are_those_of_all(folder: Path) -> None:
    first, second = found(folder, "errors")
    assert first == second
    assert "already holds a run" in first["exists"]
    # The rows are those of the process whose loss was NaN: the second half of the batch.
    rows = [row for _, row in next(iter(distributed_runs.order(rank=1)))]
    for parallel in ("ddp", "fsdp"):
        assert f"Rows of the data set in this batch: {rows[0]}, {rows[1]}." in first[parallel]
    assert '"adamw8bit" cannot step parameters that FSDP sharded; use parallel="ddp"' in first["8 bit"]


def test_what_fsdp_shards(folder: Path) -> None:
    assert found(folder, "ddp")[0]["sharded"] == []
    for name in ("fsdp", "fsdp_dense"):
        plan = distributed_runs.plan("dense" if name == "fsdp_dense" else "nf4")
        dense = {n for n, p in plan.model.named_parameters() if p.is_floating_point() and p.dim()}
        assert set(found(folder, name)[1]["sharded"]) == dense
        assert set(plan.names) - dense == ({"blocks.0.attn_gate"} if name == "fsdp_dense" else set())


def test_the_layers_that_fsdp_gathers_one_by_one() -> None:
    flamingo = helpers.flamingo()
    assert layers_to_shard(flamingo) == list(flamingo.lm.model.layers)
    # Here the gated blocks lie inside the layers.
    model = builders.of_model()
    layers = layers_to_shard(model)
    assert layers
    gated = {id(p) for n, p in model.named_parameters() if "gated_cross_attn" in n}
    assert gated
    assert not any(id(p) in gated for layer in layers for p in layer.parameters())


def test_processes_that_were_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"torchrun started 2 processes .* call mllm_fast.finetune.join_processes\(\)"):
        Processes(torch.device("cpu"))

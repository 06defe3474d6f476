"""The audit finds what is wrong with small bad kernels, passes good ones, and reads its numbers rightly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mllm_fast import cli
from mllm_fast.kernels import audit, launch, target
from mllm_fast.kernels.audit import Row

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What `audit_kernels.py` prints, from a process of its own: other tests let Triton interpret kernels in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.audit_kernels", "sm_80", "sm_90", "gfx942"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows(compiled):
    return {(r["architecture"], r["label"] or r["kernel"]): r for r in compiled["rows"]}


ARCHITECTURES = ["sm_80", "sm_90", "gfx942"]
GOOD = {"good": ("mma", "wgmma", "mfma"), "few rows": ("mma", "mma", "mfma"), "tf32": ("mma", "wgmma", "mfma")}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("label", GOOD)
def test_a_good_kernel_passes_with_the_instructions_of_its_architecture(rows, arch, label):
    row = rows[arch, label]
    assert row["failures"] == []
    assert list(row["tensor_core"]) == [GOOD[label][ARCHITECTURES.index(arch)]]
    assert row["scalar_dots"] == 0 < row["dots"]
    assert row["spilled_bytes"] == 0 < row["registers"] < 256
    assert 0 < row["occupancy"] <= 1
    assert 0 < row["instructions_per_element"] < 1


def test_shared_memory_is_what_the_pipeline_holds(rows):
    # Three stages of [128, 64] and [128, 64] in two bytes each.
    assert rows["sm_90", "good"]["shared_bytes"] == 3 * 2 * 128 * 64 * 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_too_much_shared_memory_fails(rows, arch):
    (failure,) = [f for f in rows[arch, "much shared"]["failures"] if "shared" in f]
    assert str(launch.ARCHITECTURES[arch].shared_per_block) in failure
    assert rows[arch, "much shared"]["occupancy"] == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_spill_fails(rows, arch):
    row = rows[arch, "few registers"]
    assert row["failures"]
    if row["registers"] is not None:  # else the assembler itself refused
        assert row["spilled_bytes"] > 0
        assert f"spills {row['spilled_bytes']} bytes" in row["failures"][0]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_dot_without_tensor_cores_fails_unless_it_is_meant(rows, arch):
    bad, meant = rows[arch, "exact"], rows[arch, "exact, meant so"]
    assert bad["scalar_dots"] == meant["scalar_dots"] == 1
    assert bad["tensor_core"] == meant["tensor_core"] == {}
    assert "1 of 1 dots run without tensor cores" in bad["failures"][0]
    assert meant["failures"] == []


def test_amd_multiplies_fp32_on_its_matrix_cores(rows):
    assert rows["gfx942", "exact"]["failures"] == []
    assert rows["gfx942", "exact"]["tensor_core"]["mfma"] > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("broken_kernel", "does not compile: CompilationError.*64 and 128"),
        ("crashing_kernel", "the compiler crashed"),
        ("lacks n", "neither a type nor a value for n"),
    ],
)
def test_what_does_not_compile_is_a_failed_row_and_stops_nothing(rows, arch, label, says):
    (failure,) = rows[arch, label]["failures"]
    assert re.search(says, failure)
    assert rows[arch, label]["registers"] is None
    assert rows[arch, "by hand"]["failures"] == []


def test_equal_variants_are_compiled_once(rows):
    assert ("sm_90", "good again") not in rows


@pytest.mark.parametrize(("name", "nearest"), [("sm_80", "sm_80"), ("sm_89", "sm_80"), ("gfx942", "gfx942")])
def test_meta_tensors_lie_on_the_architecture_that_is_recorded_for(name, nearest):
    meta, cpu = torch.device("meta"), torch.device("cpu")
    with target.meta_tensors_on("sm_90"), target.meta_tensors_on(name):
        assert target.arch_of(meta) == nearest
        assert target.arch_of(cpu) == "sm_90"
    assert target.arch_of(meta) == "sm_90"


def test_recording_sees_what_a_call_would_compile(compiled):
    product, one, huge = compiled["launches"]
    assert product["signature"] == {
        "A": "*bf16", "B": "*bf16", "C": "*fp32", "rows": "i32", "columns": "i32", "depth": "i32",
    }  # fmt: skip
    assert product["constexprs"] == {"SCALE": None, "BM": 16, "BN": 16, "BK": 16, "PRECISION": "tf32"}
    assert product["warps"] == 2
    assert product["aligned"] == ["A", "B", "C", "columns", "depth", "rows"]
    assert one["constexprs"] == {"n": 1, "BLOCK": 64}
    assert huge["signature"]["n"] == "i64"


@pytest.mark.parametrize(
    ("name", "warps", "registers", "shared", "expected"),
    [
        ("sm_90", 4, 32, 0, 1.0),
        ("sm_90", 4, 255, 0, 8 / 64),  # 256 registers in each of 128 threads: two blocks fill the registers
        ("sm_90", 8, 128, 100 * 1024, 16 / 64),
        ("sm_80", 4, 64, 80 * 1024, 8 / 64),  # a block takes 81 KiB of 164
        ("sm_80", 4, 64, 164 * 1024, 0.0),
        ("gfx942", 4, 256, 0, 8 / 32),  # 512 registers a lane and quarter: two waves each
        ("gfx942", 4, 64, 32 * 1024, 8 / 32),
    ],
)
def test_occupancy(name, warps, registers, shared, expected):
    assert launch.ARCHITECTURES[name].occupancy(warps, registers, shared) == expected


def test_unknown_names_are_refused():
    with pytest.raises(audit.UnknownOpError, match=r"unknown op nothing; choose of: attention"):
        audit.jobs({"attention": lambda architecture: ()}, ["sm_90"], ["nothing"])
    with pytest.raises(audit.UnknownOpError, match=r"unknown architecture sm_20"):
        audit.jobs({}, ["sm_20"])


def test_every_op_with_triton_kernels_is_audited():
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/*.py") if "@triton.jit" in path.read_text()}
    assert folders == set(audit.find_variants())


def _rows() -> list[Row]:
    good = Row("an_op", "kernel", "a", "sm_90", 64, 0, 1024, 0.5, 1, 0, {"wgmma": 4}, 0.25)
    return [good, Row("an_op", "kernel", "b", "sm_90", failures=("does not compile: why [not]",))]


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_command(capsys, monkeypatch, failing, form):
    rows = _rows()[: 1 + failing]
    monkeypatch.setattr(audit, "jobs", lambda *args, **kwargs: rows)
    monkeypatch.setattr(audit, "run", lambda todo, processes: iter(todo))
    assert cli.main(["audit", "--arch", "sm_90", *form]) == int(failing)
    out = capsys.readouterr().out
    if form:
        assert [row["label"] for row in json.loads(out)] == [row.label for row in rows]
        return
    assert "4 wgmma" in out
    assert ("1 of 2 variants failed on sm_90" if failing else "all 1 variants passed on sm_90") in out
    assert ("why [not]" in out) == failing


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--op", "nothing"], "unknown op nothing"),
        (["--arch", "sm_20"], "unknown architecture sm_20"),
        (["--processes", "0"], "at least 1"),
    ],
)
def test_command_refuses(capsys, argv, says):
    try:
        status = cli.main(["audit", *argv])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    assert status == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1

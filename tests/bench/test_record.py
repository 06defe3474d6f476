"""From a result file to the records by which the library chooses, with made-up measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import record
from bench.__main__ import main
from bench.registry import OURS
from bench.report import FORMAT, ReportFileError
from bench.workloads import attention
from mllm_fast.kernels.attention import dispatch


def row(name: str, times: dict[str, float], direction: str = "forward", block: str = "attention", **shape: Any) -> Any:
    sizes = {"queries": 32, "keys": 257, "heads": 12, "key_heads": 12, "head_dim": 64, "batch": 1} | shape
    peers = {peer: {"median_ms": time} for peer, time in times.items()}
    return {
        "workload": name, "block": block, "dtype": "bfloat16", "direction": direction, "shape": sizes, "peers": peers,
    }  # fmt: skip


def data(*rows: Any, gpu: Any = None) -> dict[str, Any]:
    gpu = {"name": "A GPU", "architecture": "sm_90"} if gpu is None else gpu
    return {
        "format": FORMAT, "machine": {"gpu": gpu}, "versions": {"torch": "2.13.0"}, "rows": list(rows),
        "date": "2026-01-02T03:04:05",
    }  # fmt: skip


ALL = {OURS: 2.0, attention.SDPA: 1.0, attention.XFORMERS: 3.0, attention.EAGER: 0.1}


def test_ratios_and_classes() -> None:
    found = record.records(data(row("a", ALL), row("b", ALL, "backward"), row("c", ALL, queries=1)), "file.json")
    assert [r.ratios for r in found] == [{"sdpa": 0.5, "xformers": 1.5}] * 3
    assert [r.shape.training for r in found] == [False, True, False]
    assert [r.shape.queries for r in found] == [128, 128, 16]
    assert {r.architecture for r in found} == {"sm_90"}
    assert found[0].source == "file.json: A GPU, torch 2.13.0, 2026-01-02"
    assert found[0].winner() == "sdpa"
    assert found[0].winner(("xformers",)) is None


def test_several_workloads_of_a_class_are_averaged() -> None:
    other = {OURS: 1.0, attention.SDPA: 2.0}
    (found,) = record.records(data(row("a", ALL), row("b", other, batch=2)), "file.json")
    assert found.ratios == {"sdpa": 1.0}  # xformers did not serve both
    assert found.workloads == ("a", "b")


def test_what_is_no_measurement_of_a_library_is_left_out() -> None:
    rows = [
        row("a", ALL, images=3),
        row("b", ALL, block="another"),
        row("c", {}),
        row("d", {OURS: 1.0, attention.SDPA: 0.1, attention.UNREAD: 2.0}, padded=True),
    ]
    (found,) = record.records(data(*rows), "file.json")
    assert found.shape.padded
    assert found.ratios == {"sdpa": 2.0}
    with pytest.raises(ReportFileError, match="no attention workload"):
        record.records(data(*rows[:3]), "file.json")


@pytest.mark.parametrize("gpu", [{}, {"name": "A GPU"}])
def test_a_report_of_no_gpu_is_refused(gpu: Any) -> None:
    with pytest.raises(ReportFileError, match="does not name a GPU"):
        record.records(data(row("a", ALL), gpu=gpu), "file.json")


def test_every_workload_of_the_library_that_could_be_dispatched_has_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(attention, "register", found.append)
    attention._register(True)
    rows = [row(w.name, ALL | {attention.UNREAD: 1.0}, w.direction, **w.shape) for w in found]
    names = {name for r in record.records(data(*rows), "file.json") for name in r.workloads}
    assert names == {w.name for w in found if not w.shape.get("images")}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written, file = tmp_path / "measured.json", tmp_path / "bench.json"
    monkeypatch.setattr(dispatch, "FILE", written)
    monkeypatch.setattr(dispatch.write, "__defaults__", (written,))
    file.write_text(json.dumps(data(row("a", ALL))))
    try:
        assert main(["--record", str(file)]) == 0
        assert "sdpa" in capsys.readouterr().out
        (stored,) = json.loads(written.read_text())["records"]
        assert stored["ratios"] == {"sdpa": 0.5, "xformers": 1.5}
        assert stored["source"].startswith(str(file))
        file.write_text(json.dumps(data(row("a", ALL), gpu={})))
        assert main(["--record", str(file)]) == 2
    finally:
        monkeypatch.undo()
        dispatch.records.cache_clear()
        dispatch._table.cache_clear()

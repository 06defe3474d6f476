"""What counts as met, in rows of made-up times, and what older files say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import goals, report
from bench.goals import Goals
from bench.measure import Limits, Memory, Plan, Timing
from bench.registry import OURS, Case, Measurement, Result, Workload

RESULTS = Path(__file__).parents[2] / "bench" / "results"
LIMITS = Limits(1e9, 1e12)  # a row of 1e6 bytes takes 1 ms at least
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def no_case(device: torch.device) -> Case:
    raise AssertionError("nothing is built here")


def row(times: dict[str, float], device: torch.device = GPU, spread: float = 0.01, **set_out: Goals) -> dict[str, Any]:
    workload = Workload("toy", "block", "Toy", {}, torch.bfloat16, "forward", no_case, 10**6, 1, **set_out)
    peers = {
        name: Measurement(Timing(ms, ms * (1 - spread), ms * (1 + spread), 9, 0), Memory(100, 0), 1, 0.0)
        for name, ms in times.items()
    }
    return report.row(Result(workload, peers, device), LIMITS)


def met(r: dict[str, Any], name: str = OURS) -> dict[str, bool | None]:
    return {verdict.goal: verdict.met for verdict in goals.verdicts(r, name)}


def test_every_kind_of_goal_is_judged() -> None:
    wanted = Goals({"first": 10.0, "flex": 2.0}, max_ms=2.5, bandwidth_share=0.7, max_memory_ratio=0.5)
    r = row({"first": 30.0, OURS: 2.0, "flex": 3.0}, gpu_goals=wanted)
    assert met(r) == {
        "10x first": True,
        "2x flex": False,
        "2.5 ms": True,
        "70% of bandwidth": False,
        "0.5x memory": False,
    }
    assert [v.reached for v in goals.verdicts(r, OURS)] == ["15.00x", "1.50x", "2.000 ms", "50%", "1.00x"]
    # The tightest is memory's bandwidth: 1 ms / 0.7.
    assert goals.needed_speedup(r, goals.verdicts(r, OURS)) == pytest.approx(30 * 0.7)


def test_goals_for_a_gpu_mark_no_row_of_a_cpu() -> None:
    both = {"goals": Goals({"first": 2.0}), "gpu_goals": Goals({"first": 10.0, "flex": 2.0}, max_ms=0.1)}
    times = {"first": 3.0, OURS: 1.0}
    assert met(row(times, CPU, **both)) == {"2x first": True}
    assert met(row(times, GPU, **both)) == {"10x first": False, "2x flex": None, "0.1 ms": False}


def test_goals_are_joined() -> None:
    some, more = Goals({"a": 2.0, "b": 1.0}, max_ms=1.0), Goals({"a": 3.0}, bandwidth_share=0.5)
    assert some | more == Goals({"a": 3.0, "b": 1.0}, max_ms=1.0, bandwidth_share=0.5)
    assert some | Goals() == Goals() | some == some
    assert some
    assert not Goals()


def test_not_slower_means_by_more_than_the_noise() -> None:
    for spread, wanted in ((0.01, False), (0.1, True)):
        assert met(row({"a": 1.0, OURS: 1.1}, spread=spread, goals=Goals({"a": 1.0}))) == {"1x a": wanted}
        assert met(row({"a": 1.0, OURS: 0.55}, spread=spread, goals=Goals({"a": 2.0}))) == {"2x a": False}


def test_a_peer_that_is_missing_is_told(tmp_path: Path) -> None:
    r = row({"first": 3.0, OURS: 1.0}, gpu_goals=Goals({"xformers": 1.0}))
    assert "not measured: 1x xformers" in _text(r)
    assert goals.needed_speedup(r, goals.verdicts(r, OURS)) is None
    report.plot(report.report([r], Plan()), tmp_path / "plot.png")


def test_only_our_peers_are_held_to_goals() -> None:
    r = row({"first": 3.0, OURS: 1.0, f"{OURS}, dispatched": 2.0, "flex": 1.5}, goals=Goals({"first": 2.0}))
    text = _text(r)
    assert text.count("met 2x first (3.00x)") == 1
    assert text.count("missed 2x first (1.50x)") == 1
    assert text.count("first (") == 2
    noisy = copy.deepcopy(r)
    noisy["peers"]["first"]["reliable"] = False
    assert [v.reliable for v in goals.verdicts(noisy, OURS)] == [False]


def test_a_row_of_an_older_file() -> None:
    r = row({"first": 3.0, OURS: 2.0})
    r["goals"] = {"min_speedup": 2.0, "max_memory_ratio": 1.0}
    assert met(r) == {"2x first": False, "1x memory": True}
    r["goals"] = {"min_speedup": None, "max_memory_ratio": None}
    assert met(r) == {}


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_the_files_that_are_kept_can_be_read(path: Path, tmp_path: Path) -> None:
    data = report.load(path)
    judged = [v for r in data["rows"] for name in r["peers"] if name == OURS for v in goals.verdicts(r, name)]
    assert any(verdict.met for verdict in judged)
    assert "x memory" in _text(*data["rows"])
    assert report.comparison(data, data).row_count
    report.plot(data, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def _text(*rows: dict[str, Any]) -> str:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(report.table(rows))
    return capture.get()

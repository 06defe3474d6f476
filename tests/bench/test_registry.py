"""What may be timed, how workloads are found, and what is written about them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time

import pytest
import torch
from rich.console import Console

from bench import __main__ as cli
from bench import measure, registry, report, roofline
from bench.goals import Goals
from bench.measure import Limits, Plan
from bench.registry import OURS, Case, UnknownWorkloadError, Workload, WrongResultError

CPU = torch.device("cpu")
PLAN = Plan(samples=2, seconds=0.05, sample_ms=0.5)
LIMITS = Limits(1e10, 1e11)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(measure, "wait_until_quiet", lambda deadline: None)
    monkeypatch.setattr(cli, "machine_limits", lambda device, dtype: LIMITS)
    monkeypatch.setattr(cli, "QUICK", PLAN)


def build(device: torch.device, *, wrong: float = 0.0) -> Case:
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()

    def slow():
        time.sleep(0.004)
        return x @ x

    return Case(
        peers={"upstream": [slow], OURS: [lambda: (x @ x) * (1 + wrong)]},
        exact=lambda: x.float() @ x.float(),
    )


def workload(name: str = "toy", **changes) -> Workload:
    goals = Goals({"upstream": 2.0})
    toy = Workload(name, "a block", "Toy-1B", {"n": 32}, torch.bfloat16, "forward", build, 2048, 65536, goals)
    return dataclasses.replace(toy, **changes)


@pytest.fixture
def toys(monkeypatch):
    """A registry of its own: a right one and a wrong one."""
    both = [workload("toy.right"), workload("toy.wrong", build=functools.partial(build, wrong=0.1))]
    monkeypatch.setattr(registry, "workloads", lambda: both)
    return both


def test_a_result_within_the_noise_of_the_baseline_passes():
    errors = registry.check(build(CPU))
    assert errors[OURS] == errors["upstream"] < 1e-2


@pytest.mark.parametrize("wrong", [0.05, math.nan])
def test_a_wrong_result_is_refused_before_timing(wrong, monkeypatch):
    monkeypatch.setattr(registry, "time_peers", lambda *_: pytest.fail("was timed"))
    with pytest.raises(WrongResultError, match=r"mllm_fast is off by .* the baseline itself by"):
        registry.run(workload(build=functools.partial(build, wrong=wrong)), CPU, PLAN)


def test_a_result_of_another_shape_is_refused():
    case = build(CPU)
    case = dataclasses.replace(case, peers={**case.peers, OURS: [lambda: torch.zeros(3)]})
    with pytest.raises(WrongResultError, match=r"mllm_fast returns \(3,\), upstream \(32, 32\)"):
        registry.check(case)


def test_run_measures_every_peer():
    result = registry.run(workload(), CPU, PLAN)
    assert list(result.peers) == ["upstream", OURS]
    assert result.speedup("upstream") == 1
    assert result.speedup(OURS) > 2
    assert result.memory_ratio(OURS) >= 1  # the product by 1 + wrong is a second tensor
    assert [m.launches for m in result.peers.values()] == [1, 2]


def test_gradients_are_on_only_for_backward():
    for direction in ("forward", "decode", "backward"):
        modes = []

        def spy(device, modes=modes):
            modes.append(torch.is_grad_enabled())
            return build(device)

        registry.run(workload(direction=direction, build=spy), CPU, PLAN)
        assert modes == [direction == "backward"]


@pytest.mark.parametrize(("patterns", "found"), [([], 2), (["toy"], 2), (["right"], 1), (["toy.w*"], 1), (["*"], 2)])
def test_find(toys, patterns, found):
    assert len(registry.find(patterns)) == found


def test_an_unknown_name_is_an_error_that_helps(toys):
    with pytest.raises(UnknownWorkloadError, match=r"'toy.rihgt'; close are toy.right"):
        registry.find(["toy.rihgt"])


def test_names_are_unique(monkeypatch):
    monkeypatch.setattr(registry, "_workloads", {})
    registry.register(workload())
    with pytest.raises(ValueError, match="registered twice"):
        registry.register(workload())


def test_report_survives_the_disk(tmp_path):
    result = registry.run(workload(goals=Goals({"upstream": 2.0}, max_memory_ratio=0.5)), CPU, PLAN)
    rows = [report.row(result, LIMITS), report.failed_row(workload("bad"), "off by 3")]
    data = report.report(rows, PLAN)
    report.save(data, tmp_path / "new" / "r.json")
    again = report.load(tmp_path / "new" / "r.json")
    assert again == json.loads(json.dumps(data))
    assert again["versions"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads", "gpu"} <= again["machine"].keys()
    ours = again["rows"][0]["peers"][OURS]
    seconds = ours["median_ms"] / 1e3
    assert ours["gb_per_s"] == pytest.approx(2048 / seconds / 1e9)
    assert ours["roofline_share"] == pytest.approx(LIMITS.seconds(2048, 65536) / seconds)

    report.plot(again, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    text = _text(report.table(again["rows"]))
    assert "met 2x upstream (" in text
    assert "missed 0.5x memory (" in text
    assert "not timed: off by 3" in text


@pytest.mark.parametrize("count", [0, 1, 2])
def test_roofline_of_few_rows(tmp_path, count):
    done = report.row(registry.run(workload(), CPU, PLAN), LIMITS)
    failed = report.failed_row(workload("toy.wrong"), "off by 3")
    roofline.plot(report.report([failed, *[done] * count], PLAN), tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_the_yardstick_says_how_far_off_a_peer_may_be():
    case = build(CPU, wrong=0.1)
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    rough = dataclasses.replace(case, peers={**case.peers, "rough": [lambda: (x @ x) * 0.93]}, yardstick="rough")
    registry.check(rough)
    with pytest.raises(WrongResultError, match=r"mllm_fast is off by .*, upstream itself by"):
        registry.check(dataclasses.replace(rough, yardstick="upstream"))


def test_comparison_tells_a_change_from_noise():
    rows = [report.row(registry.run(workload(), CPU, PLAN), LIMITS)]
    old = report.report(rows, PLAN)
    new = json.loads(json.dumps(old))
    assert "same" in _text(report.comparison(old, new))
    for key in ("low_ms", "median_ms", "high_ms"):
        new["rows"][0]["peers"][OURS][key] *= 1000
    assert "slower" in _text(report.comparison(old, new))
    assert "faster" in _text(report.comparison(new, old))


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"format": 0}'])
def test_a_file_that_is_no_report_is_refused(tmp_path, content, capsys):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["--compare", str(path), str(path)]) == 2
    assert "give a file that --out wrote" in capsys.readouterr().err


def test_command_line(toys, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "find", registry.find)
    assert cli.main(["--list"]) == 0
    assert "toy.right" in capsys.readouterr().out

    assert cli.main(["right", "--quick", "--device", "cpu", "--out", str(tmp_path / "r.json")]) == 0
    plots = [tmp_path / "r.png", tmp_path / "r_roofline.png"]
    assert set(tmp_path.iterdir()) == {tmp_path / "r.json", *plots}
    for path in plots:
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
    assert cli.main(["--plot", str(tmp_path / "r.json")]) == 0
    assert all(path.exists() for path in plots)
    assert cli.main(["--plot", str(tmp_path / "none.json")]) == 2
    assert cli.main(["--compare", str(tmp_path / "r.json"), str(tmp_path / "r.json")]) == 0

    assert cli.main(["wrong", "--quick", "--device", "cpu"]) == 1
    assert "not timed" in capsys.readouterr().out
    assert cli.main(["nothing"]) == 2
    assert "no workload matches 'nothing'" in capsys.readouterr().err


def test_a_workload_that_breaks_leaves_the_others_their_rows(toys, tmp_path, capsys, monkeypatch):
    def broken(device: torch.device) -> Case:
        raise RuntimeError("out of\nresources")

    toys.insert(0, workload("toy.broken", build=broken))
    monkeypatch.setattr(cli, "find", registry.find)
    assert cli.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "r.json")]) == 1
    rows = {r["workload"]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["toy.broken"]["failed"] == "RuntimeError: out of resources"
    assert rows["toy.right"]["peers"]


@pytest.mark.parametrize(
    "argv", [["--seconds", "0"], ["--out", "results.txt"], ["--threads", "0"], ["--device", "tpu"]]
)
def test_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def _text(table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()

"""Part 1 of the demo at tiny size: the systems run, their images matter, and a wrong result would be noticed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from mllm_fast import demo
from mllm_fast.demo import blip_systems, comparison
from mllm_fast.demo.comparison import Comparison, compare, draw, peak_bytes, table
from mllm_fast.demo.photographs import Photograph, load_photographs, to_tensor
from mllm_fast.demo.systems import IMAGE, QUICK, SYSTEMS, Size, System, prompt


@pytest.fixture(scope="module")
def photographs() -> list[Photograph]:
    return load_photographs(QUICK.images)


def run(system: System, photographs: list[Photograph]) -> Comparison:
    with Progress(disable=True) as progress:
        return compare(system, QUICK, photographs, progress)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_fused_and_unfused_agree(system: System, photographs: list[Photograph]) -> None:
    result = run(system, photographs)
    assert not result.skipped
    assert result.agrees
    assert result.same_ids
    assert result.relative < 1e-5
    assert result.parameters > 0
    for measured in (result.unfused, result.fused):
        assert measured is not None
        assert min(measured.first_token, measured.next_token, measured.peak) > 0


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_every_photograph_matters(system: System, photographs: list[Photograph]) -> None:
    """Otherwise agreement would say nothing about what reads the images."""

    def logits(shown: list[Photograph]) -> torch.Tensor:
        torch.manual_seed(0)
        titled = [Photograph(p.title, q.pixels) for p, q in zip(photographs, shown, strict=True)]
        with torch.no_grad():
            return system.build(QUICK, titled).forward()

    base = logits(photographs)
    for i in range(len(photographs)):
        changed = list(photographs)
        changed[i] = photographs[i - 1]
        assert (logits(changed) - base).abs().max() > 1e-2 * base.abs().max(), photographs[i].title


def test_a_wrong_drop_in_is_noticed(monkeypatch: pytest.MonkeyPatch, photographs: list[Photograph]) -> None:
    def sabotage(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.ndim == 1:
                nn.init.constant_(parameter, 0.6)

    monkeypatch.setattr(comparison, "fuse", sabotage)
    system = next(s for s in SYSTEMS if s.name.startswith("OpenFlamingo"))
    result = run(system, photographs)
    assert not result.agrees
    assert result.relative > comparison.TOLERANCE


def test_a_missing_package_is_a_row_that_says_so(photographs: list[Photograph]) -> None:
    def build(size: Size, photographs: list[Photograph]) -> None:
        raise AssertionError("must not be built")

    result = run(System("Some system", ("rich", "no_such_package"), build), photographs)
    assert result.agrees
    assert result.skipped == "no_such_package not installed"
    console = Console(file=io.StringIO(), width=120)
    console.print(table([result]))
    assert "skipped: no_such_package not installed" in console.file.getvalue()


def test_one_system_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [system.key for system in (*SYSTEMS, *blip_systems.SYSTEMS)]
    assert keys == [
        "idefics", "openflamingo", "flamingo-pytorch", "blip", "blip-2", "instructblip", "llava", "minigpt-4", "mplug-owl",
    ]  # fmt: skip
    assert demo.run(tmp_path, quick=True, only=["blip"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["systems.png"]
    said = capsys.readouterr().out
    assert "BLIP" in said and "IDEFICS" not in said and "digits" not in said
    with pytest.raises(demo.UnknownSystemError, match=r"no blib; choose from idefics, .*, mplug-owl and digits"):
        demo.run(tmp_path / "other", quick=True, only=["blib"])
    assert not (tmp_path / "other").exists()


def test_the_plot_is_drawn(tmp_path: Path, photographs: list[Photograph]) -> None:
    draw([Comparison("a", skipped="b")], photographs, tmp_path / "nothing.png")
    draw([run(SYSTEMS[0], photographs)], photographs, tmp_path / "one.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("nothing.png", "one.png"))


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    given = torch.zeros(1 << 18)

    def work() -> None:
        a = given + 1
        b = a.view(-1, 2) * 2
        del a
        c = (b + 1).reshape(-1)[:10]
        given.add_(1)
        del b, c

    assert peak_bytes(work) == 2 << 20
    assert peak_bytes(lambda: [torch.zeros(1 << 18) for _ in range(3)]) == 3 << 20


def test_prompts_and_photographs() -> None:
    nine = load_photographs(9)
    assert len({photograph.title for photograph in nine}) == 9
    pixels = to_tensor(nine, 28)
    assert pixels.shape == (9, 3, 28, 28)
    assert pixels.std(dim=(1, 2, 3)).min() > 0.05
    assert int((prompt(nine) == IMAGE).sum()) == 9
    with pytest.raises(ValueError, match="10 photographs were asked for; 9 are installed"):
        load_photographs(10)

"""`mllm-fast finetune`: from a file to a trained bridge, with nothing written in Python; errors are one line."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mllm_fast import cli
from mllm_fast.finetune.published import STAGES
from mllm_fast.models.blip2_stage1 import Blip2Stage1
from tests.families import qformers
from tests.finetune import systems

# stage -> system, llm
CASES = {
    "flamingo-bridge": ("flamingo", "nf4"),
    "blip2-stage1": ("retrieval", None),
    "blip2-stage2": ("blip2-opt", "int8"),
    "minigpt4-projection": ("minigpt4", "nf4"),
    "llava-stage1": ("llava", "nf4"),
    "llava-stage2": ("llava", "nf4"),
    "mplug-owl-lora": ("mplug-owl", None),
}


def retrieval() -> tuple[Any, Any]:
    model, processor = systems.blip2_stage1()
    assert isinstance(model, Blip2Stage1)
    return qformers.retrieval(), processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures and their captions."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with (pictures / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "prompt"])
        for i, sample in enumerate(systems.samples(6)):
            sample.images[0].save(pictures / f"{i}.png")
            writer.writerow([f"{i}.png", sample.caption, sample.prompt or ""])
    return tmp_path


def written(folder: Path, stage: str, **more: Any) -> str:
    """A model and a configuration in `folder`; the name of the latter."""
    system, llm = CASES[stage]
    model, processor = (systems.SYSTEMS | {"retrieval": retrieval})[system]()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    config = {
        "stage": stage, "model": "model", "data": {"path": "pictures", "held_out": 2}, "output": "run", "device": "cpu",
        "dtype": "float32", "settings": {"batch_size": 2, "steps": 3, "learning_rate": 1e-3}, "features": "features",
    }  # fmt: skip
    if llm is not None:
        config["llm"] = llm
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, **more}))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(["finetune", *argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_there_is_a_case_for_every_stage() -> None:
    assert set(CASES) == set(STAGES)


@pytest.mark.parametrize("stage", CASES)
def test_a_stage_from_a_file(folder: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    config = written(folder, stage)
    status, out, err = run(capsys, config, "--dry-run")
    assert status == 0, err
    assert "parameters are trained" in out
    assert f"stage {stage}: 3 steps of 2 samples out of 4, 2 held out; learning rate 0.001" in out
    assert not (folder / "run").exists()
    status, out, err = run(capsys, config)
    assert status == 0, err
    assert re.search(r"finished after 3 steps, loss \d", out)
    assert "the best evaluation" in out
    state = load_file(folder / "run" / "trained.safetensors")
    assert all(torch.isfinite(value).all() for value in state.values())
    assert list((folder / "features").rglob("*.safetensors"))


def test_it_refuses_to_overwrite_and_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(folder, "minigpt4-projection")
    assert run(capsys, config)[0] == 0
    status, _, err = run(capsys, config)
    assert (status, err.count("\n")) == (2, 1)
    assert "already holds a run" in err
    assert "go on with it by --resume" in err
    given = yaml.safe_load(Path(config).read_text())
    given["settings"]["steps"] = 5
    Path(config).write_text(yaml.safe_dump(given))
    status, out, err = run(capsys, config, "--resume")
    assert status == 0, err
    assert "finished after 5 steps" in out


def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = written(folder, "llava-stage2")
    pictures = folder / "pictures"
    for change, says in (
        ({"stage": "llava-stage3"}, "no stage 'llava-stage3'; did you mean 'llava-stage"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"data": {"path": "./nowhere"}}, "nowhere"),
        ({"settings": {"steps": 3, "epochs": 2}}, "both epochs and steps"),
        ({"stage": "blip2-stage1"}, "has no language model; leave it out"),
        ({"stage": "blip2-stage1", "llm": None}, "begins with a Blip2ForImageTextRetrieval, and the model is a Llava"),
        ({"stage": "mplug-owl-lora"}, "trains MplugOwlForConditionalGeneration, and the model is a "),
    ):  # fmt: skip
        given = yaml.safe_load(Path(config).read_text())
        path = folder / "other.yaml"
        path.write_text(yaml.safe_dump({**given, **change}))
        status, _, err = run(capsys, str(path))
        assert (status, err.count("\n")) == (2, 1), err
        assert says in err
        assert not (folder / "run").exists()
    # Every picture is decoded before the model is loaded.
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:50])
    given["model"] = "no/such-model"
    path.write_text(yaml.safe_dump(given))
    status, _, err = run(capsys, str(path))
    assert (status, err.count("\n")) == (2, 1)
    assert "captions.csv row 5: " in err
    assert "3.png is not an image" in err


def test_the_stages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--list")
    assert status == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "flamingo-bridge", "blip2-stage1", "blip2-stage2", "minigpt4-projection", "llava-stage1", "llava-stage2",
        "mplug-owl-lora",
    ]  # fmt: skip
    for argv in ((), ("config.yaml", "--list")):
        with pytest.raises(SystemExit):
            cli.main(["finetune", *argv])
        assert capsys.readouterr().err.count("\n") == 1

"""Every example runs as people run it, on its tiny model, in a few seconds."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"
# What is expected in the output of each. Examples of fine-tuning have tests of their own.
SAID = {
    "fuse_and_generate.py": "the same",
    "quantise.py": "every byte is the same",
    "verify_model.py": "passed",
    "benchmark_block.py": "transformers sdpa",
    "microbenchmark_op.py": "mllm_fast",
    "cuda_graphs.py": "captured",
    "pretraining.py": "first_stage: the loss fell",
}


@pytest.mark.parametrize("name", SAID)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.syspath_prepend(EXAMPLES)  # as when it is run as a script
    monkeypatch.setattr(measure, "QUICK", measure.Plan(samples=1, seconds=0.2, sample_ms=0.5))
    monkeypatch.setattr(sys, "argv", [name])
    status: Any = 0
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as end:
        status = end.code
    assert not status
    output = capsys.readouterr().out
    assert SAID[name] in output, output


def test_every_example_is_tested() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("finetune_")}
    assert scripts == {*SAID, "tiny_model.py"}


def test_every_example_says_what_it_does_and_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in sorted(EXAMPLES.glob("*.py")):
        assert path.read_text(encoding="utf-8").startswith('"""'), f"{path.name} has no docstring"
        assert f"({path.name})" in listed, f"examples/README.md does not name {path.name}"

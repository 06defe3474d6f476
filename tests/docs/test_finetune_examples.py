"""The examples of fine-tuning, as people run them: they train on real scans, and reach what they promise on held-out ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow

# What each says, with the share of held-out images that came out right, and the least of it.
EXAMPLES = {
    "finetune_digits.py": (r"([\d.]+)% of 450 held-out captions are exact", 97.0),
    "finetune_stage1.py": (r"([\d.]+)% of 450 held-out images .* find their text; chance is 10 %", 85.0),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_reaches_its_bar(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / name), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    said, least = EXAMPLES[name]
    found = re.search(said, done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) >= least
    assert (tmp_path / "run" / "trained.safetensors").is_file()


def test_every_example_of_fine_tuning_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("finetune_*.py")} == set(EXAMPLES)

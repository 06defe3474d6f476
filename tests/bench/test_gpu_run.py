"""`make gpu` ends within nine minutes, however its steps go."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# For make itself and for asking torch what the GPU is called.
STARTING = 10


@pytest.mark.skipif(shutil.which("make") is None, reason="reads what make would run")
def test_the_limits_of_its_steps() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "gpu", "PYTHON=python"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    steps = [int(limit) for limit in re.findall(r"\bstep (\d+) ", done.stdout)]
    grace = re.search(r"--kill-after=(\d+)", done.stdout)
    assert len(steps) == 6
    assert grace is not None
    assert STARTING + sum(steps) + int(grace[1]) * len(steps) <= 9 * 60

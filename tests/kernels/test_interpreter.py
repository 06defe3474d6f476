"""Runs the tests of the Triton kernels in Triton's interpreter, on a CPU; see `triton_device`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton_device import INTERPRETING

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*_triton.py"))


@pytest.mark.skipif(INTERPRETING, reason="already in the interpreter")
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, name],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{name} failed in the interpreter:\n{done.stdout[-8000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout

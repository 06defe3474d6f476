"""A process that dies while it writes, or runs out of disk, leaves the old file whole; and no half file beside it is read.

The kernel does the killing: a limit on the size of files (RLIMIT_FSIZE) ends the process in the middle of a write, whoever
writes (Python, torch's C++ or safetensors' Rust). With the signal ignored the same limit is an OSError, as a full disk is.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each writer needs, and the call that writes `path`; they are run as a script.
COMMON = """
import resource, signal, sys, types
from pathlib import Path
sys.path.insert(0, {root!r})
sys.modules.setdefault("open_clip", types.ModuleType("open_clip"))
import torch
path, limit, kill = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "kill"
{prepare}
signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
{write}
"""
WRITERS = {
    "bridge.safetensors": (
        "from tests.models.helpers import flamingo\nmodel = flamingo(seed=limit)",
        "model.save_bridge(path.parent, overwrite=True)",
    ),
    "flamingo.pt": (
        "from tests.models.helpers import flamingo\nfrom mllm_fast.models.bridge_file import write_atomically\n"
        "state = flamingo(seed=limit).state_dict()",
        "write_atomically(path, lambda file: torch.save(state, file))",
    ),
    "minigpt4.safetensors": (
        "from tests.models.minigpt4_models import minigpt4\n"
        "from mllm_fast.models.minigpt4_checkpoint import save_original\nmodel = minigpt4(seed=limit)",
        "save_original(model, path, overwrite=True)",
    ),
    "mm_projector.bin": (
        "from tests.families.llava_models import model\n"
        "from mllm_fast.models.llava_checkpoint import save_projector\nmodel = model(seed=limit)",
        "save_projector(model, path, overwrite=True)",
    ),
    "trained.safetensors": (
        "from mllm_fast.finetune.checkpoint import Checkpoint, write\n"
        "run = dict(batches=0, optimizer={}, schedule={}, random=[], changed={}, losses=torch.zeros(500))\n"
        "checkpoint = Checkpoint(step=limit, trained={'w': torch.full((999,), float(limit))}, **run)",
        "write(path.parent, checkpoint, plan='', summary={'rows': list(range(400))})",
    ),
    "verify.json": (
        "from mllm_fast.verification import Compared, VerifyReport\n"
        "rows = tuple(Compared(f'output {i}', (limit,), 1.0, 1.0, True) for i in range(99))\n"
        "numbers = dict.fromkeys(('fused', 'native', 'new_tokens', 'same_tokens'), 1)\n"
        "names = dict.fromkeys(('model', 'dtype', 'wide', 'device', 'backend'), 'float32')\n"
        "report = VerifyReport(**names, **numbers, left_alone=(), outputs=rows)",
        "report.save(path)",
    ),
    "bench.json": (
        "from bench import report",
        "report.save({'format': 1, 'rows': [{'seed': limit, 'row': i} for i in range(200)]}, path)",
    ),
}  # fmt: skip


def write(name: str, path: Path, *, limit: int = 0, how: str = "kill") -> subprocess.CompletedProcess[str]:
    prepare, call = WRITERS[name]
    script = COMMON.format(root=str(ROOT), prepare=prepare, write=call)
    return subprocess.run(
        [sys.executable, "-c", script, str(path), str(limit), how], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("name", WRITERS)
def test_the_old_file_stays(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    done = write(name, path)
    assert done.returncode == 0, done.stderr
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before[name]) > 1500, "so short a file is written at once: this test shows nothing"
    killed = write(name, path, limit=1024, how="kill")
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    # What it had begun may lie there under another name, hidden; whoever reads the folder never sees it.
    found = {file.name: file.read_bytes() for file in tmp_path.iterdir() if not file.name.startswith(".")}
    assert found == before
    for leftover in set(tmp_path.iterdir()) - {tmp_path / known for known in before}:
        leftover.unlink()
    full = write(name, path, limit=1024, how="full disk")
    assert full.returncode == 1
    assert "too large" in full.stderr.lower() or "error" in full.stderr.lower()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before, "a half file was left behind"

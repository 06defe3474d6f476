"""What every test shares: seeds, one thread, no network, the `gpu` mark, and a stand-in for open_clip."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import random
import sys
import types
from collections.abc import Iterator

# Before anything imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without it cuBLAS refuses to run where `poisoned` (tests/kernels/triton_device.py) asks for deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import setuptools  # noqa: F401  # before any test: torch's inductor needs its distutils, and comes too late for it
import torch

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # A failure must come back on the next run, and interpreted kernels are slow: no random draws, no deadline.
    settings.register_profile("mllm_fast", deadline=None, derandomize=True, database=None, print_blob=True)
    settings.load_profile("mllm_fast")


def _stub_open_clip() -> None:
    """Let open_flamingo import: it needs open_clip only for a factory that downloads models, which no test calls."""
    if "open_clip" not in sys.modules and importlib.util.find_spec("open_clip") is None:
        stub = types.ModuleType("open_clip")
        # find_spec raises on a module in sys.modules that has no spec.
        stub.__spec__ = importlib.machinery.ModuleSpec("open_clip", loader=None)
        sys.modules["open_clip"] = stub


# Here and not in a fixture: test modules import open_flamingo at their top, before any fixture runs.
_stub_open_clip()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1":
        # Where there is a GPU, the tests of Triton kernels run on it (tests/kernels/triton_device.py).
        for item in items:
            if item.path.name.endswith("_triton.py"):
                item.add_marker(pytest.mark.gpu)
    if not any(item.get_closest_marker("gpu") for item in items) or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test draws the same numbers, whatever ran before it, and leaves the default dtype as it was."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # libraries under test use the global generator
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)

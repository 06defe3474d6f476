"""Shared set-up of the drop-in tests: one thread, a fixed seed, and this folder on the import path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """One CPU thread (the shapes are tiny) and the same random numbers whichever tests ran before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

"""Shared set-up of the drop-in tests: one thread, a fixed seed, this folder on the import path, and a fake GPU on request."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.families.fake_gpu import FakeGpu

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """One CPU thread (the shapes are tiny) and the same random numbers whichever tests ran before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    from tests.families.fake_gpu import fake_gpu  # here: it changes torch's list of devices for the whole process

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton looks at the addresses of fake tensors, which are 0
        with fake_gpu() as fake:
            yield fake


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each decoder layer that is trained through its own way."""
    from tests.families.frozen_decoders import count_layers  # here: most tests need none of its models

    return count_layers(monkeypatch)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or after, and the counters of what is compiled at 0."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()

"""Two models in two threads; one model that two threads read; and a backend for each thread."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.kernels import runtime
from tests.families import blip_models, builders
from tests.robustness.sequences import SYSTEMS, System

ROUNDS = 4
ALL = SYSTEMS | {
    "blip": System(blip_models.model, lambda seed: blip_models.inputs(seed=seed), ()),
    "open_flamingo": System(builders.of_model, lambda seed: builders.of_inputs(seed=seed), ()),
}
# open_flamingo keeps the images of a pass in its layers, so upstream itself serves one thread at a time.
SHARED = [name for name in ALL if name != "open_flamingo"]


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Threads take turns a thousand times as often as by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def prepared(system: System, seed: int) -> dict[str, Any]:
    return {name: t.float() if t.is_floating_point() else t for name, t in system.inputs(seed).items()}


def passes(model: nn.Module, system: System, seeds: tuple[int, ...]) -> list[Tensor]:
    """Logits and generated ids of each seed's inputs, in turns, so that what was kept is used and dropped again."""
    found = []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for seed in seeds:
                inputs = prepared(system, seed)
                found.append(model(**inputs).logits)
                pads = {"pad_token_id": 0} if hasattr(model, "lang_encoder") else {}
                found.append(model.generate(**inputs, max_new_tokens=3, do_sample=False, **pads))  # type: ignore[operator]
    return found


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    barrier = threading.Barrier(len(jobs))

    def start(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(start, job) for job in jobs]]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, other, atol=2e-4, rtol=2e-4)
        else:
            assert mine.tolist() == other.tolist()


@pytest.mark.parametrize("name", ALL)
def test_two_models(name: str) -> None:
    system = ALL[name]
    models = [system.build().eval() for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    expected = [passes(model, system, (i, i + 2)) for i, model in enumerate(models)]
    for model in models:
        mllm_fast.fuse(model)
    found = at_once(*(lambda i=i, model=model: passes(model, system, (i, i + 2)) for i, model in enumerate(models)))
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("name", SHARED)
def test_one_model_that_two_threads_read(name: str) -> None:
    """In inference, as the unfused model allows. (Training one model from two threads is not supported anywhere.)"""
    system = ALL[name]
    model = system.build().eval()
    seeds = ((0, 2), (1, 3), (0, 4))
    expected = [passes(model, system, own) for own in seeds]
    mllm_fast.fuse(model, prepack=name == "idefics")
    found = at_once(*(lambda own=own: passes(model, system, own) for own in seeds))
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal(ours, theirs)


def test_copying_a_model_that_another_thread_reads() -> None:
    system = ALL["idefics"]
    model = system.build().eval()
    expected = passes(model, system, (0, 1))
    mllm_fast.fuse(model)
    _, copies = at_once(
        lambda: passes(model, system, (0, 1)), lambda: [copy.deepcopy(model) for _ in range(2 * ROUNDS)]
    )
    assert_equal(passes(copies[-1], system, (0, 1)), expected)


def test_a_backend_is_the_threads_own() -> None:
    seen: dict[str, list[str]] = {"torch": [], "auto": []}
    inside, left = threading.Event(), threading.Event()

    def forced() -> None:
        with mllm_fast.backend("torch"):
            inside.set()
            left.wait(10)
            seen["torch"].append(runtime.current_backend())
        seen["torch"].append(runtime.current_backend())

    def free() -> None:
        inside.wait(10)
        seen["auto"].append(runtime.current_backend())
        left.set()

    at_once(forced, free)
    assert seen == {"torch": ["torch", "auto"], "auto": ["auto"]}

"""A fused model holds no more after a thousand generations than after a few, and nothing at all once it is gone.

python -m pytest tests/robustness/test_memory.py -k thousand
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.families import state_of
from tests.robustness import sequences
from tests.robustness.sequences import SYSTEMS, System

GENERATIONS = 1000


def resident_mib() -> float:
    """Memory of this process that is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def refused(model: Any, system: System, i: int) -> Any:
    mllm_fast.unfuse(model)
    mllm_fast.fuse(model, prepack=i % 2 == 0)
    return model


def trained(model: Any, system: System, i: int) -> Any:
    sequences.train_step(model, system.inputs(i % 5))
    return model


def reloaded(model: Any, system: System, i: int) -> Any:
    model.load_state_dict(system.build().state_dict())
    return model


def recast(model: Any, system: System, i: int) -> Any:
    return model.double().float()


def adapted(model: Any, system: System, i: int) -> Any:
    sequences.add_lora(model, system.lora, i)
    sequences.logits(model, system.inputs(0))
    sequences.merge_lora(model)
    return model.requires_grad_(True)  # PEFT froze it


def copied(model: Any, system: System, i: int) -> Any:
    return copy.deepcopy(model)


# What is done between the generations, one after another, and how many generations lie between.
LIFE: tuple[Callable[[Any, System, int], Any], ...] = (refused, trained, reloaded, recast, adapted, copied, reloaded)
BETWEEN = 10


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_thousand_generations(name: str) -> None:
    """New images every time, and between them a life: what is measured is always the same place in it."""
    system, cycle = SYSTEMS[name], BETWEEN * len(LIFE)
    model: Any = system.build().eval()
    mllm_fast.fuse(model)
    inputs = [sequences.cast(system.inputs(seed), torch.float32) for seed in range(5)]
    measured: list[tuple[int, float]] = []
    for i in range(2 * cycle + GENERATIONS // cycle * cycle + cycle):
        given = dict(inputs[i % len(inputs)])
        given["pixel_values"] = given["pixel_values"] + i * 1e-4
        with torch.inference_mode():
            model.generate(**given, max_new_tokens=1, do_sample=False)
        del given
        if (i + 1) % BETWEEN == 0:
            model = LIFE[i // BETWEEN % len(LIFE)](model, system, i)
        if (i + 1) % cycle == 0:
            measured.append((live_tensors(), resident_mib()))
    # Two rounds to warm up; then a thousand generations and some.
    (tensors, before), (still, after) = measured[1], measured[-1]
    done = cycle * (len(measured) - 2)
    assert done >= GENERATIONS
    assert still <= tensors + 2, f"{still - tensors} more tensors after {done} generations"
    # One generation's keys and values of an image alone are 16 KiB in Idefics: a leak of them would be 16 MiB.
    assert after <= before + 6, f"{after - before:.1f} MiB more after {done} generations"


def derived(model: nn.Module) -> list[weakref.ref[Tensor]]:
    """Every tensor that the fused modules keep beside their parameters."""
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def walk(value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            if id(value) not in own:
                kept[id(value)] = value
        elif depth < 8 and not isinstance(value, nn.Module | type | str | int | float):
            inner: Any = value.values() if isinstance(value, dict) else value
            if not isinstance(value, dict | list | tuple | set | frozenset):
                slots = getattr(type(value), "__slots__", ())
                inner = [getattr(value, name, None) for name in slots] + list(getattr(value, "__dict__", {}).values())
            for part in inner:
                walk(part, depth + 1)

    for module in model.modules():
        if (state := state_of(module)) is not None:
            walk([state.derived, state.shared])
    return [weakref.ref(t) for t in kept.values()]


@pytest.mark.parametrize("end", ["unfused", "deleted", "trained", "loaded", "cast"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_what_was_derived_goes(name: str, end: str) -> None:
    system = SYSTEMS[name]
    model: Any = system.build().eval()
    mllm_fast.fuse(model, prepack=True)
    sequences.logits(model, system.inputs(0))
    kept = derived(model)
    if name != "llava":  # which has nothing to stack
        assert kept, "nothing was kept: this test shows nothing"
    if end == "unfused":
        mllm_fast.unfuse(model)
    elif end == "deleted":
        del model
    elif end == "trained":
        sequences.train_step(model, system.inputs(0))
    else:
        if end == "loaded":
            model.load_state_dict({name: t + 0.01 for name, t in copy.deepcopy(model.state_dict()).items()})
        else:
            model.double()
        sequences.logits(model, system.inputs(0))
    gc.collect()
    alive = [tuple(t.shape) for ref in kept if (t := ref()) is not None]
    assert not alive, f"still held: {alive}"

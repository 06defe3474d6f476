"""The random states of a process: taken, put back, and set to what a position in the data gives."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch


def take(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The states of torch (and of `device`), numpy and Python, as tensors and numbers: nothing that needs pickled code."""
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002  # what libraries draw from
    version, internal, next_gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(internal), next_gauss],
    }
    device = torch.device(device)
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def put(state: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Set what `take` returned. A state of another kind of device is left out."""
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), next_gauss))
    device = torch.device(device)
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)


def seed(*parts: int, device: torch.device | str = "cpu") -> None:
    """Seed the generators of the CPU and of `device` from several numbers, such that no two sets of numbers give related
    streams.

    Other devices are left alone: what is drawn for a row in the training process must not reset the dropout on the GPU.
    """
    words = np.random.SeedSequence(parts).generate_state(6)
    number = (int(words[0]) << 32) | int(words[1])
    torch.default_generator.manual_seed(number)
    device = torch.device(device)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        with module.device(device):
            module.manual_seed(number)
    np.random.seed(words[2:4])  # noqa: NPY002
    random.seed((int(words[4]) << 32) | int(words[5]))


def generator(*parts: int) -> torch.Generator:
    """A generator of its own, on the CPU, seeded as `seed` does."""
    high, low = np.random.SeedSequence(parts).generate_state(2)
    return torch.Generator().manual_seed((int(high) << 32) | int(low))


@contextlib.contextmanager
def preserved(device: torch.device | str = "cpu") -> Iterator[None]:
    """Whatever is drawn inside, the states outside go on as if nothing had been."""
    state = take(device)
    try:
        yield
    finally:
        put(state, device)

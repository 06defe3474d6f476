"""Peers that take part only where they can: torch.compile of the upstream module, and what a library may refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

COMPILED = "torch.compile"

Calls = list[Callable[[], Tensor]]


def serves(name: str, call: Callable[[], object]) -> bool:
    """Whether a peer that promises less than all shapes can serve this one; if not, says so."""
    try:
        call()
    except Exception as error:  # of a compiler or a library: any
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"not measured: {name} ({type(error).__name__}: {reason})", stacklevel=2)
        return False
    return True


def compiles(device: torch.device) -> bool:
    """Whether compiled peers take part: on a GPU, for which people compile."""
    return device.type == "cuda"


def optional_peer(name: str, make: Callable[[], Calls]) -> dict[str, Calls]:
    """The peer if it can be made and serves. It is tried here, so that no compilation counts as a call's memory or time."""
    calls: Calls = []

    def first() -> None:
        calls.extend(make())
        for _ in range(2):  # the second call may find other strides in a cache that was cut, and be compiled anew
            calls[0]()

    return {name: calls} if serves(name, first) else {}


def compiled_peer(device: torch.device, make: Callable[[], Calls]) -> dict[str, Calls]:
    """The compiled peer where it takes part.

    Args:
        device: where the workload runs.
        make: the calls, with `torch.compile` somewhere in them. Called only where it takes part.
    """
    if not compiles(device):
        return {}
    torch.compiler.reset()  # else the compilations of earlier workloads count against the limit for one function
    return optional_peer(COMPILED, make)

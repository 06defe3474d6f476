"""What a launcher asks about the device it launches on: its architecture, its size, how it multiplies fp32."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

# Those that configurations are written for; other NVIDIA GPUs take the nearest.
Arch = Literal["sm_80", "sm_90", "gfx942"]
ARCHITECTURES: tuple[Arch, ...] = ("sm_80", "sm_90", "gfx942")

# Multiprocessors (compute units) of the largest part: A100, H100, MI300X.
PROCESSORS: dict[Arch, int] = {"sm_80": 108, "sm_90": 132, "gfx942": 304}


# What the launches on meta tensors are meant for, which the audit records (`launch.recording`).
_of_meta_tensors: Arch = "sm_90"
# Made once: every launch asks for one.
_NOTHING = contextlib.nullcontext()


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device; meta tensors have none. (torch 2.11 cannot trace torch's own question.)"""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def arch_of(device: torch.device) -> Arch:
    """The nearest architecture that configurations exist for; sm_90 under the interpreter."""
    return _of_meta_tensors if device.type == "meta" else _arch_of(device)


@functools.cache
def _arch_of(device: torch.device) -> Arch:
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


@contextlib.contextmanager
def meta_tensors_on(name: str) -> Iterator[None]:
    """Within, meta tensors count as lying on a GPU of that architecture ("sm_89"). Not for several threads at once."""
    global _of_meta_tensors
    before = _of_meta_tensors
    _of_meta_tensors = next((arch for arch in ARCHITECTURES if arch == name), "sm_80")
    try:
        yield
    finally:
        _of_meta_tensors = before


def precision(arch: Arch, dtype: torch.dtype) -> str:
    """How tl.dot multiplies: for fp32 what torch's own matrix products are allowed, on tensor cores where it is exact."""
    if dtype != torch.float32 or arch == "gfx942":
        return "ieee"
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's device the current one, on which Triton launches."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


def keep_scale(dropout_p: float) -> float:
    """What dropout multiplies the kept elements with."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0

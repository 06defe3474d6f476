"""The benchmarks' one registry: what is measured, who takes part, and whether the results may be trusted."""

from __future__ import annotations

import difflib
import fnmatch
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .goals import NO_GOALS, Goals
from .measure import Memory, Plan, Timing, count_launches, peak_memory, time_peers

OURS = "mllm_fast"

# A peer's error may be this many times the yardstick's own, plus what fp32 sums differ by when added in another order.
ERROR_FACTOR = 2.0
ERROR_FLOOR = 1e-6


class WrongResultError(AssertionError):
    """A peer computes something else than the baseline, so its time means nothing."""


class UnknownWorkloadError(ValueError):
    """No workload matches a name."""


@dataclass(frozen=True)
class Case:
    """A workload with its tensors, ready to run.

    Attributes:
        peers: name -> the call on each copy of weights and inputs. The first peer is the upstream baseline. Copy i of
            every peer has equal weights and inputs.
        exact: the baseline's result on copy 0, computed in a wider dtype.
        yardstick: the peer whose own rounding says how far off the others may be; default: the baseline.
    """

    peers: Mapping[str, Sequence[Callable[[], Tensor]]]
    exact: Callable[[], Tensor]
    yardstick: str | None = None

    @property
    def baseline(self) -> str:
        return next(iter(self.peers))


@dataclass(frozen=True, eq=False)
class Workload:
    """One row of the benchmarks.

    Attributes:
        name: unique, from the general to the special, with dots.
        block: what is measured.
        model: the published model that the shape is from.
        shape: the sizes that define the row.
        dtype: of weights and activations.
        direction: "forward" (prefill or encoder), "backward" (with the forward before it) or "decode" (one token).
        build: makes the case on a device.
        nbytes, flops: the least any implementation must read and write, and compute.
        goals: on any device.
        gpu_goals: on a GPU, with those or in their place.
    """

    name: str
    block: str
    model: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    direction: Literal["forward", "backward", "decode"]
    build: Callable[[torch.device], Case]
    nbytes: int
    flops: int
    goals: Goals = NO_GOALS
    gpu_goals: Goals = NO_GOALS

    def goals_on(self, device: torch.device) -> Goals:
        """What was set out for this device."""
        return self.goals | self.gpu_goals if device.type == "cuda" else self.goals


@dataclass(frozen=True)
class Measurement:
    """What was measured of one peer; `error` is relative to the exact result, in the Euclidean norm."""

    timing: Timing
    memory: Memory
    launches: int
    error: float


@dataclass(frozen=True)
class Result:
    """A workload's measurements, the baseline first."""

    workload: Workload
    peers: Mapping[str, Measurement]
    device: torch.device

    @property
    def baseline(self) -> Measurement:
        return next(iter(self.peers.values()))

    def speedup(self, peer: str) -> float:
        """How many times faster than the baseline."""
        return self.baseline.timing.median_ms / self.peers[peer].timing.median_ms

    def memory_ratio(self, peer: str) -> float:
        """Peak extra memory as a share of the baseline's."""
        return self.peers[peer].memory.peak / max(self.baseline.memory.peak, 1)


_workloads: dict[str, Workload] = {}


def register(workload: Workload) -> None:
    """Add a workload.

    Raises:
        ValueError: its name is taken.
    """
    if workload.name in _workloads:
        raise ValueError(f"the workload {workload.name!r} is registered twice: names must differ")
    _workloads[workload.name] = workload


def workloads() -> list[Workload]:
    """All workloads, in the order they were registered."""
    from . import workloads as _  # noqa: F401 (registers them)

    return list(_workloads.values())


def find(patterns: Iterable[str]) -> list[Workload]:
    """The workloads whose name contains or matches (`*`, `?`) any of the patterns; all without a pattern.

    Raises:
        UnknownWorkloadError: a pattern matches none.
    """
    everything, patterns = workloads(), list(patterns)
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {w.name for w in everything if pattern in w.name or fnmatch.fnmatch(w.name, pattern)}
        if not hits:
            names = [w.name for w in everything]
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise UnknownWorkloadError(
                f"no workload matches {pattern!r}; close are {', '.join(close)} (--list shows all)"
            )
        chosen |= hits
    return [w for w in everything if not patterns or w.name in chosen]


def check(case: Case) -> dict[str, float]:
    """Relative error of every peer against the exact result.

    Raises:
        WrongResultError: a peer's error exceeds what the yardstick's own rounding explains.
    """
    exact = case.exact().double()
    norm = exact.norm().item()
    errors = {}
    for name, calls in case.peers.items():
        result = calls[0]()
        if result.shape != exact.shape:
            raise WrongResultError(f"{name} returns {tuple(result.shape)}, {case.baseline} {tuple(exact.shape)}")
        errors[name] = (result.double() - exact).norm().item() / norm
    yardstick = case.yardstick or case.baseline
    limit = ERROR_FACTOR * errors[yardstick] + ERROR_FLOOR
    for name, error in errors.items():
        if not error <= limit:  # NaN too
            raise WrongResultError(
                f"{name} is off by {error:.2e} (relative), {case.yardstick or 'the baseline'} itself by "
                f"{errors[yardstick]:.2e}; at most "
                f"{limit:.2e} is allowed. Its time would mean nothing, so it was not measured"
            )
    return errors


def run(workload: Workload, device: torch.device, plan: Plan) -> Result:
    """Build, measure the memory of the first calls, check the results, and only then time.

    Raises:
        WrongResultError: see `check`.
    """
    with torch.set_grad_enabled(workload.direction == "backward"):
        case = workload.build(device)
        memory = {name: peak_memory(calls[0], device) for name, calls in case.peers.items()}
        errors = check(case)
        gc.collect()
        launches = {name: count_launches(calls[0], device) for name, calls in case.peers.items()}
        timings = time_peers(case.peers, plan, device)
    peers = {name: Measurement(timings[name], memory[name], launches[name], errors[name]) for name in case.peers}
    return Result(workload, peers, device)

"""Time, memory and launches of calls that are compared with each other.

Peers are timed in turns (A B, B A, A B, ...), so that a drift of the machine hits all of them. On a CPU that other
processes use too, a sample during which our threads waited for a core says nothing about the call: the kernel counts
that wait, and such samples are told apart.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], Any]

# A sample counts as disturbed when our threads waited for a core for more than this share of it.
DISTURBED_SHARE = 0.02
# If a peer has fewer undisturbed samples than this, all samples of all peers count, and the row says it is noisy.
ENOUGH = 3
# Seconds to wait for other processes before a sample.
LONGEST_WAIT = 0.5


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        samples: undisturbed samples wanted of each peer.
        seconds: give up waiting for them after this long (a few samples of each peer are always taken).
        sample_ms: a sample repeats the call until it lasts about this long.
    """

    samples: int = 15
    seconds: float = 30.0
    sample_ms: float = 5.0


QUICK = Plan(samples=3, seconds=4.0)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and quartiles.

    Over the undisturbed samples if every peer has enough of them, else over all samples of every peer.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    samples: int
    disturbed: int

    @property
    def reliable(self) -> bool:
        return self.samples - self.disturbed >= ENOUGH


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before the first call.

    Attributes:
        peak: the most at any moment of two consecutive calls, caches and derived weights that the first one leaves
            included.
        held: what is still allocated after both, when their results are dropped.
    """

    peak: int
    held: int


@dataclass(frozen=True)
class Limits:
    """What this machine reaches: bytes per second read from memory, floating-point operations per second in a GEMM."""

    bytes_per_s: float
    flops_per_s: float

    def raised(self, other: Limits | None) -> Limits:
        """The higher of both, each."""
        if other is None:
            return self
        return Limits(max(self.bytes_per_s, other.bytes_per_s), max(self.flops_per_s, other.flops_per_s))

    def seconds(self, nbytes: int, flops: int) -> float:
        """The least time for this much work (the roofline)."""
        return max(nbytes / self.bytes_per_s, flops / self.flops_per_s)


def time_peers(peers: Mapping[str, Sequence[Call]], plan: Plan, device: torch.device) -> dict[str, Timing]:
    """Time calls against each other, interleaved.

    Args:
        peers: for each name the same call on different copies of weights and inputs. They are called in rotation, so
            that what they read comes from memory and not from a cache, provided that all copies together exceed it.
        plan: how long to measure.
        device: where the calls run; CUDA is timed by events.
    """
    rotations = {name: itertools.cycle(calls) for name, calls in peers.items()}
    iterations = {name: _iterations(rotations[name], len(calls), plan, device) for name, calls in peers.items()}
    samples: dict[str, list[tuple[float, bool]]] = {name: [] for name in peers}
    deadline = time.monotonic() + plan.seconds
    for order in itertools.cycle((list(peers), list(peers)[::-1])):
        for name in order:
            wait_until_quiet(min(deadline, time.monotonic() + LONGEST_WAIT))
            samples[name].append(_sample(rotations[name], iterations[name], device))
        rounds = len(samples[name])
        clean = min(sum(not disturbed for _, disturbed in taken) for taken in samples.values())
        if clean >= plan.samples or (rounds >= ENOUGH and time.monotonic() >= deadline):
            # Like with like: an undisturbed peer is never held against a disturbed one.
            return {name: _timing(taken, only_clean=clean >= ENOUGH) for name, taken in samples.items()}
    raise AssertionError("unreachable")


def _iterations(rotation: Iterator[Call], copies: int, plan: Plan, device: torch.device) -> int:
    """Calls per sample, after a warm-up of every copy."""
    for _ in range(copies):
        next(rotation)()
    seconds = min(_sample(rotation, 1, device)[0] for _ in range(2))
    return max(1, min(100, math.ceil(plan.sample_ms / 1e3 / max(seconds, 1e-7))))


def _sample(rotation: Iterator[Call], iterations: int, device: torch.device) -> tuple[float, bool]:
    """Seconds per call, and whether the sample was disturbed."""
    if iterations > 1:
        # Wakes the thread pool and brings back the code that a peer pushed out; a long call does that by itself.
        next(rotation)()
    calls = [next(rotation) for _ in range(iterations)]
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / iterations, False
    waited, began = run_queue_wait(), time.perf_counter()
    for call in calls:
        call()
    elapsed, waited = time.perf_counter() - began, run_queue_wait() - waited
    return elapsed / iterations, waited > DISTURBED_SHARE * elapsed


def _timing(taken: Sequence[tuple[float, bool]], *, only_clean: bool) -> Timing:
    clean = [seconds for seconds, disturbed in taken if not disturbed]
    used = clean if only_clean else [seconds for seconds, _ in taken]
    low, median, high = statistics.quantiles(used, n=4, method="inclusive") if len(used) > 1 else used * 3
    return Timing(median * 1e3, low * 1e3, high * 1e3, len(taken), len(taken) - len(clean))


def run_queue_wait() -> float:
    """Seconds that the threads of this process have waited for a core so far; 0 where the system does not tell."""
    total = 0
    for stat in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(stat.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that just ended, or a kernel without the counter
            continue
    return total / 1e9


def wait_until_quiet(deadline: float) -> None:
    """Wait until no other process runs, at most until `deadline` (`time.monotonic`)."""
    while time.monotonic() < deadline:
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        except (OSError, IndexError, ValueError):
            return
        if running <= 1:
            return
        time.sleep(0.02)


def peak_memory(call: Call, device: torch.device) -> Memory:
    """Memory that two consecutive calls take, from the allocator's own record: views and in-place ops cost nothing."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        call()
        return Memory(torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
        call()
        gc.collect()
    live = peak = 0
    for event in sorted(profile.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return Memory(peak, live)


class _Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            with self:  # under inference mode composite ops arrive whole
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty")):
            known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            # Some views are not declared as such (_unsafe_view): their result is their argument's storage, unwritten.
            if func._schema.is_mutable or any(_storage(t) not in known for t in results):
                self.count += 1
        return out


def _storage(tensor: Tensor) -> int:
    # A weight in oneDNN's layout has no storage to look at.
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata


def count_launches(call: Call, device: torch.device) -> int:
    """What one call launches: kernels on CUDA, elsewhere ATen ops that compute or copy something."""
    if device.type == "cuda":
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize(device)
        return sum(e.device_type == DeviceType.CUDA for e in profile.events())
    with _Launches() as mode:
        call()
    return mode.count


def machine_limits(device: torch.device, dtype: torch.dtype, seconds: float = 5.0) -> Limits:
    """Measure what this machine reaches: the best of a few samples, since a disturbance only ever slows down."""
    floats = torch.ones(64 * 2**20, device=device)
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = []
    for call in (floats.sum, functools.partial(torch.nn.functional.linear, a, b)):
        taken: list[float] = []
        deadline, clean = time.monotonic() + seconds / 2, 0
        while not taken or (clean < ENOUGH and time.monotonic() < deadline):
            wait_until_quiet(deadline)
            elapsed, disturbed = _sample(itertools.repeat(call), 2, device)
            taken.append(elapsed)
            clean += not disturbed
        best.append(min(taken))
    return Limits(floats.numel() * 4 / best[0], 2 * side**3 / best[1])

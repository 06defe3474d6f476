"""Run one system unfused and fused, side by side: the same weights, the same images, run in turns."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import fuse
from .photographs import Photograph, square
from .systems import Case, Size, System

# Both versions compute in fp32; they differ by the order of rounding only.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Measured:
    """One version of one system.

    Attributes:
        first_token: seconds from images and prompt to the first new token, median.
        next_token: seconds for each token after it, median.
        peak: bytes of tensors alive at once, beyond the model and its inputs, while the first tokens are made.
    """

    first_token: float
    next_token: float
    peak: int


@dataclass(frozen=True)
class Comparison:
    """A system before and after fusing.

    Attributes:
        skipped: why it could not run, in which case nothing else is set.
        images, parameters: what was run.
        error: largest difference of the prompt's logits; `relative` is that over the largest logit.
        same_ids: whether both versions generated the same `new_tokens` tokens.
    """

    name: str
    skipped: str = ""
    images: int = 0
    parameters: int = 0
    error: float = 0.0
    relative: float = 0.0
    same_ids: bool = False
    new_tokens: int = 0
    unfused: Measured | None = None
    fused: Measured | None = None

    @property
    def agrees(self) -> bool:
        """Whether fusing changed nothing but rounding; a system that could not run agrees."""
        return bool(self.skipped) or (self.same_ids and self.relative <= TOLERANCE)


@torch.no_grad()
def compare(system: System, size: Size, photographs: list[Photograph], progress: Progress) -> Comparison:
    """Build the system twice from one seed, fuse one copy, and run both."""
    total = 5 + 2 * size.rounds
    task = progress.add_task(system.name, total=total, note="")
    if missing := system.missing():
        progress.update(task, completed=total, note="skipped")
        return Comparison(system.name, skipped=f"{', '.join(missing)} not installed")

    def step(what: str) -> None:
        progress.update(task, advance=1, note=what)

    cases = [_build(system, size, photographs) for _ in range(2)]
    fuse(cases[1].model)
    step("built and fused")
    before, after = (case.forward() for case in cases)
    step("logits compared")
    ids = []
    for case in cases:
        ids.append(case.generate(case.new_tokens, _no_tick))
        step("ids compared")
    peaks = [peak_bytes(partial(case.generate, 2, _no_tick)) for case in cases]
    step("memory measured")
    clocks = [_Clock(), _Clock()]
    for _ in range(size.rounds):
        for case, clock in zip(cases, clocks, strict=True):
            clock.start()
            case.generate(case.new_tokens, clock.tick)
            step("timed")
    unfused, fused = (
        Measured(statistics.median(clock.first), statistics.median(clock.following), peak)
        for clock, peak in zip(clocks, peaks, strict=True)
    )
    error = float((before - after).abs().max())
    return Comparison(
        name=system.name,
        images=cases[0].images,
        parameters=sum(p.numel() for p in cases[0].model.parameters()),
        error=error,
        relative=error / float(before.abs().max()),
        same_ids=bool(torch.equal(*ids)),
        new_tokens=cases[0].new_tokens,
        unfused=unfused,
        fused=fused,
    )


def _build(system: System, size: Size, photographs: list[Photograph]) -> Case:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        return system.build(size, photographs)


def _no_tick() -> None:
    pass


class _Clock:
    """Times of the first token of each run, and of every token after it."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.following: list[float] = []
        self._last = 0.0
        self._started = False

    def start(self) -> None:
        self._last, self._started = time.perf_counter(), True

    def tick(self) -> None:
        now = time.perf_counter()
        (self.first if self._started else self.following).append(now - self._last)
        self._last, self._started = now, False


class _AliveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), inputs)
        return result

    def _count(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in inputs or key in self._known:
            return
        self._known.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of new tensors that were alive at once while `run` ran. What one operation uses inside is not seen."""
    gc.collect()
    with _AliveTensors() as tracker:
        run()
    return tracker.peak


def table(comparisons: list[Comparison]) -> Table:
    """The comparisons for people to read."""
    result = Table(title="Each cell: unfused, fused, ratio (fp32, one thread, random weights)", title_justify="left")
    result.add_column("system", no_wrap=True)
    for column in ("first token", "next token", "peak memory"):
        result.add_column(column, justify="right")
    result.add_column("agreement")
    for c in comparisons:
        if c.unfused is None or c.fused is None:
            result.add_row(c.name, "", "", "", f"skipped: {c.skipped}", end_section=True)
            continue
        before, after = c.unfused, c.fused
        result.add_row(
            _what(c),
            _milliseconds(before.first_token, after.first_token),
            _milliseconds(before.next_token, after.next_token),
            f"{before.peak / 2**20:.1f} MiB\n{after.peak / 2**20:.1f} MiB\n{after.peak / max(before.peak, 1):.2f}x",
            f"error {c.error:.0e}\nrelative {c.relative:.0e}\n"
            + (f"{c.new_tokens} ids equal" if c.same_ids else f"[red]{c.new_tokens} ids differ[/red]"),
            end_section=True,
        )
    return result


def _what(c: Comparison) -> str:
    """A cell: the system's name, its remark in brackets on a line of its own, and its size."""
    name, images = c.name.replace(" (", "\n("), f"{c.images} image{'s' if c.images > 1 else ''}"
    return f"{name}\n{images}\n{c.parameters / 1e6:.0f} M parameters"


def _milliseconds(before: float, after: float) -> str:
    return f"{before * 1e3:.1f} ms\n{after * 1e3:.1f} ms\n{before / max(after, 1e-9):.2f}x speed"


def draw(comparisons: list[Comparison], photographs: list[Photograph], path: Path) -> None:
    """A PNG: the photographs, and bars of the three measurements."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ran = [c for c in comparisons if c.unfused is not None and c.fused is not None]
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 2])
    above, below = halves
    above.suptitle("Photographs in the prompt")
    for axes, photograph in zip(above.subplots(1, len(photographs), squeeze=False)[0], photographs, strict=True):
        axes.imshow(square(photograph, 112))
        axes.set_title(photograph.title, fontsize=8)
        axes.set_axis_off()
    panels = (
        ("first token", lambda m: m.first_token * 1e3, "ms"),
        ("next token", lambda m: m.next_token * 1e3, "ms"),
        ("peak memory of tensors", lambda m: m.peak / 2**20, "MiB"),
    )
    for axes, (title, value, unit) in zip(below.subplots(1, len(panels)), panels, strict=True):
        for offset, version, colour in ((-0.2, "unfused", "tab:gray"), (0.2, "fused", "tab:blue")):
            values = [value(getattr(c, version)) for c in ran]
            heights = [v / value(c.unfused) for v, c in zip(values, ran, strict=True)]
            bars = axes.bar([i + offset for i in range(len(ran))], heights, 0.4, label=version, color=colour)
            axes.bar_label(bars, [f"{v:.0f} {unit}" if v >= 100 else f"{v:.3g} {unit}" for v in values], fontsize=8)
        axes.set_xticks(range(len(ran)), [c.name for c in ran], fontsize=8)
        axes.set_title(f"{title}, share of unfused", fontsize=10)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)

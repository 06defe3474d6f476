"""The roofline plot: how close each measurement comes to what the machine's memory and arithmetic allow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .registry import OURS
from .report import summary


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Floating-point operations a second over operations a byte, both of the work that must be done; writes a PNG.

    One point a peer and row. The roof is what was measured of this machine, for each dtype. Peers of a row stand above
    each other: what must be done is the same for all of them.

    Args:
        data: a report.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    rows = [r for r in data["rows"] if r["peers"] and r["bytes"] and r["flops"]]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    intensities = [r["flops"] / r["bytes"] for r in rows]
    if intensities:
        _roofs(axes, rows, min(intensities) / 2, max(intensities) * 2)
    names = list(dict.fromkeys(name for r in rows for name in r["peers"]))
    for number, name in enumerate(sorted(names, key=lambda name: name != OURS)):
        points = [
            (intensity, r["peers"][name]["tflop_per_s"])
            for intensity, r in zip(intensities, rows, strict=True)
            if name in r["peers"]
        ]
        ours = name == OURS
        axes.scatter(
            [intensity for intensity, _ in points],
            [rate for _, rate in points],
            s=44 if ours else 22,
            marker="*" if ours else "o",
            color=f"C{number % 10}",
            alpha=0.8,
            label=name,
            zorder=3 if ours else 2,
        )
    axes.set_xlabel("floating-point operations per byte (the least of both)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(summary(data), fontsize=8)
    axes.grid(True, which="major", alpha=0.3)
    if rows:
        axes.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _roofs(axes: Any, rows: list[Mapping[str, Any]], low: float, high: float) -> None:
    """One roof for each dtype: memory's slope up to the ridge, arithmetic's level from there."""
    for number, dtype in enumerate(dict.fromkeys(r["dtype"] for r in rows)):
        limits = [r["limits"] for r in rows if r["dtype"] == dtype]
        bandwidth = max(limit["bytes_per_s"] for limit in limits)
        peak = max(limit["flops_per_s"] for limit in limits)
        ridge = min(max(peak / bandwidth, low), high)
        xs = [low, ridge, high]
        axes.plot(
            xs,
            [min(x * bandwidth, peak) / 1e12 for x in xs],
            color="black",
            linestyle=("-", "--", ":", "-.")[number % 4],
            linewidth=1.2,
            label=f"roof, {dtype}: {bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.2f} TFLOP/s",
        )

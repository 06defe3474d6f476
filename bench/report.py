"""What was measured, as a table, a JSON file that says where and with what, and a plot."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mllm_fast.information import library_version
from mllm_fast.kernels.launch import device_architecture
from mllm_fast.models.bridge_file import write_text_atomically

from . import goals
from .measure import Limits, Plan
from .registry import OURS, Result, Workload

FORMAT = 1
PACKAGES = (
    "torch", "triton", "transformers", "open-flamingo", "flamingo-pytorch", "bitsandbytes", "liger-kernel", "xformers",
)  # fmt: skip
MIB = 2**20

Row = dict[str, Any]


class ReportFileError(ValueError):
    """A file that is not a report of this format."""


def row(result: Result, limits: Limits) -> Row:
    """A result as plain data. Rates count the work that has to be done, not what a peer does beyond it.

    Args:
        result: what was measured.
        limits: of the machine; the roofline share is the time they allow over the time taken.
    """
    workload = result.workload
    least = limits.seconds(workload.nbytes, workload.flops)
    peers = {}
    for name, m in result.peers.items():
        seconds = m.timing.median_ms / 1e3
        peers[name] = {
            **asdict(m.timing),
            "reliable": m.timing.reliable,
            "speedup": result.speedup(name),
            "gb_per_s": workload.nbytes / seconds / 1e9,
            "tflop_per_s": workload.flops / seconds / 1e12,
            "roofline_share": least / seconds,
            "peak_extra_bytes": m.memory.peak,
            "held_bytes": m.memory.held,
            "memory_ratio": result.memory_ratio(name),
            "launches": m.launches,
            "relative_error": m.error,
        }
    stored = asdict(workload.goals_on(result.device))
    return {**_described(workload), "goals": stored, "limits": asdict(limits), "peers": peers}


def failed_row(workload: Workload, reason: str) -> Row:
    """The row of a workload that was not timed, with the reason."""
    return {**_described(workload), "failed": reason, "peers": {}}


def _described(workload: Workload) -> Row:
    return {
        "workload": workload.name,
        "block": workload.block,
        "model": workload.model,
        "shape": dict(workload.shape),
        "dtype": str(workload.dtype).removeprefix("torch."),
        "direction": workload.direction,
        "bytes": workload.nbytes,
        "flops": workload.flops,
    }


def report(rows: Sequence[Row], plan: Plan) -> dict[str, Any]:
    """Rows stamped with the machine, the versions, the commit and the date."""
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **_versions()},
        "plan": asdict(plan),
        "rows": list(rows),
    }


def _commit() -> dict[str, Any]:
    def git(*args: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "-C", str(Path(__file__).parent), *args]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return None

    # What the benchmarks write does not change what was measured.
    changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
    return {"commit": git("rev-parse", "--verify", "HEAD"), "modified": None if changes is None else bool(changes)}


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = None
    if torch.cuda.is_available():
        gpu = {
            "name": torch.cuda.get_device_name(),
            "architecture": device_architecture(),
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release()}",
    }


def _versions() -> dict[str, str]:
    found = {package: library_version(package) for package in PACKAGES}
    return {package: version for package, version in found.items() if version is not None}


def save(data: Mapping[str, Any], path: Path) -> None:
    """Write a report as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(data, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        ReportFileError: the file is missing or holds something else.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ReportFileError(f"cannot read {path}: {error.strerror}; give a file that --out wrote") from error
    except ValueError as error:
        raise ReportFileError(f"{path} is not JSON ({error}); give a file that --out wrote") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ReportFileError(f"{path} is no benchmark report of format {FORMAT}; give a file that --out wrote")
    return data


def summary(data: Mapping[str, Any]) -> str:
    """One line: machine, versions, commit, date."""
    machine, versions = data["machine"], data["versions"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    commit = (data["commit"] or "no commit")[:12] + (" + changes" if data["modified"] else "")
    return f"{where}; torch {versions['torch']}; {commit}; {data['date']}"


def table(rows: Iterable[Row]) -> Table:
    """The rows as a table; for each of our peers the goals are marked as met or missed."""
    out = Table(title="Benchmarks: every peer on the same weights and inputs, in turns", title_justify="left")
    for name in ("workload", "peer"):
        out.add_column(name, overflow="fold")
    for name in ("ms", "quartiles", "speed-up", "rate", "roofline", "peak MiB", "launches", "error"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("goals", overflow="fold")
    for r in rows:
        if "failed" in r:
            out.add_row(r["workload"], f"[red]not timed: {r['failed']}")
            continue
        for i, (name, p) in enumerate(r["peers"].items()):
            out.add_row(
                r["workload"] if i == 0 else "",
                name,
                f"{p['median_ms']:.3f}" + ("" if p["reliable"] else " [yellow]noisy[/]"),
                f"{p['low_ms']:.3f} to {p['high_ms']:.3f}",
                f"{p['speedup']:.2f}x",
                _rate(r, p),
                f"{p['roofline_share']:.0%}",
                f"{p['peak_extra_bytes'] / MIB:.2f}" + (f" = {p['memory_ratio']:.2f}x" if i else ""),
                str(p["launches"]),
                f"{p['relative_error']:.1e}",
                "\n".join(map(_marked, _judged(r, name))),
            )
        out.add_section()
    return out


def _judged(r: Row, name: str) -> list[goals.Verdict]:
    """The goals are ours: nobody else is held to them."""
    return goals.verdicts(r, name) if name.startswith(OURS) else []


def _marked(verdict: goals.Verdict) -> str:
    if verdict.met is None:
        return f"[yellow]{verdict.reached}[/]: {verdict.goal}"
    word, colour = ("met", "green") if verdict.met else ("missed", "red")
    return f"[{colour if verdict.reliable else 'yellow'}]{word}[/] {verdict.goal} ({verdict.reached})"


def _rate(r: Row, p: Mapping[str, Any]) -> str:
    """GB/s where memory bounds the workload on this machine, else TFLOP/s."""
    limits = r["limits"]
    if r["bytes"] / limits["bytes_per_s"] > r["flops"] / limits["flops_per_s"]:
        return f"{p['gb_per_s']:.1f} GB/s"
    return f"{p['tflop_per_s']:.3f} TF/s"


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Bars of the speed-up of every peer over its baseline, with the goals as ticks. Writes a PNG.

    A row's tick stands where all of its goals about speed are met, those over other peers included.
    """
    from matplotlib.figure import Figure

    bars = []
    for r in data["rows"]:
        (_, baseline), *others = r["peers"].items() or [(None, None)]
        for name, p in others:
            noise = "" if p["reliable"] and baseline["reliable"] else " (noisy)"
            goal = goals.needed_speedup(r, _judged(r, name))
            bars.append((r["workload"] + noise, name, p["speedup"], goal))
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots()
    # Ours first, so that it has one colour in all plots.
    names = sorted(dict.fromkeys(bar[1] for bar in bars), key=lambda name: not name.startswith(OURS))
    for y, (_, name, speedup, goal) in enumerate(bars):
        axes.barh(y, speedup, color=f"C{names.index(name)}", height=0.7)
        close = goal is not None and speedup <= goal < speedup + 0.1 * max(bar[2] for bar in bars)
        axes.text((close and goal) or speedup, y, f" {speedup:.2f}x", va="center", fontsize=8)  # beside the goal's tick
        if goal is not None:
            axes.plot([goal, goal], [y - 0.42, y + 0.42], color="black", linewidth=2)
    for name in names:
        axes.barh(0, 0, color=f"C{names.index(name)}", label=name)
    if any(bar[3] is not None for bar in bars):
        axes.plot([], [], color="black", linewidth=2, label="goal")
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("times faster than upstream")
    axes.set_title(summary(data), fontsize=8)
    if bars:
        figure.legend(fontsize=8, loc="outside lower center", ncols=len(names) + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> Table:
    """Times of two reports side by side, for the rows and peers that both have.

    A change is called one only where the quartiles do not overlap.
    """
    out = Table(title=f"old: {summary(old)}\nnew: {summary(new)}", title_justify="left")
    for name in ("workload", "peer"):
        out.add_column(name, overflow="fold")
    for name in ("old ms", "new ms", "new / old", "change", "speed-up, old", "new"):
        out.add_column(name, justify="right")
    before = {(r["workload"], name): p for r in old["rows"] for name, p in r["peers"].items()}
    for r in new["rows"]:
        for name, p in r["peers"].items():
            q = before.get((r["workload"], name))
            if q is None:
                continue
            change = "same"
            if p["high_ms"] < q["low_ms"]:
                change = "[green]faster[/]"
            elif p["low_ms"] > q["high_ms"]:
                change = "[red]slower[/]"
            out.add_row(
                r["workload"],
                name,
                f"{q['median_ms']:.3f}",
                f"{p['median_ms']:.3f}",
                f"{p['median_ms'] / q['median_ms']:.2f}",
                change,
                f"{q['speedup']:.2f}x",
                f"{p['speedup']:.2f}x",
            )
    return out

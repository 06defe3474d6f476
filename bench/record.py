"""From a result file to the records by which the library chooses who runs a call of attention.

Only the file is read: a GPU is needed to measure, and none to record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mllm_fast.kernels.attention import dispatch
from mllm_fast.kernels.attention.dispatch import Record, ShapeClass

from .registry import OURS
from .report import ReportFileError
from .workloads.attention import SDPA, UNREAD, XFORMERS


def records(data: Mapping[str, Any], source: str) -> list[Record]:
    """What a report says about attention calls that a library could take over, class by class.

    Where several workloads are of one class, a library has to have served all of them, and its ratio is the geometric
    mean.

    Args:
        data: a report (`report.load`).
        source: where it comes from, for people.

    Raises:
        ReportFileError: the report was not made on a GPU, or holds no such workload.
    """
    gpu = data["machine"]["gpu"]
    if not gpu or "architecture" not in gpu:
        raise ReportFileError(f"{source} does not name a GPU architecture; record a file that was measured on a GPU")
    found: dict[ShapeClass, list[tuple[str, dict[str, float]]]] = {}
    for row in data["rows"]:
        shape, peers = row["shape"], row["peers"]
        if row["block"] != "attention" or OURS not in peers or shape.get("images"):
            continue
        padded = bool(shape.get("padded"))
        names = {"sdpa": UNREAD if padded else SDPA, "xformers": XFORMERS}
        ours = peers[OURS]["median_ms"]
        ratios = {library: peers[name]["median_ms"] / ours for library, name in names.items() if name in peers}
        key = dispatch.class_of(
            training=row["direction"] == "backward",
            padded=padded,
            itemsize=getattr(torch, row["dtype"]).itemsize,
            batch=shape["batch"],
            queries=shape["queries"],
            keys=shape["keys"],
            extra_keys=shape.get("extra", 0),
            heads=shape["heads"],
            key_heads=shape["key_heads"],
            head_dim=shape["head_dim"],
        )
        found.setdefault(ShapeClass(*key), []).append((row["workload"], ratios))
    if not found:
        raise ReportFileError(f"{source} holds no attention workload that a library could serve; measure them first")
    made = f"{source}: {gpu['name']}, torch {data['versions']['torch']}, {data['date'][:10]}"
    return [
        Record(gpu["architecture"], shape, _means([r for _, r in rows]), tuple(name for name, _ in rows), made)
        for shape, rows in found.items()
    ]


def _means(ratios: list[dict[str, float]]) -> dict[str, float]:
    served = [name for name in dispatch.LIBRARIES if all(name in given for given in ratios)]
    return {name: round(math.exp(sum(math.log(given[name]) for given in ratios) / len(ratios)), 4) for name in served}


def update(data: Mapping[str, Any], path: Path) -> Table:
    """Write the records of a report into the library, in place of those of its architecture, and show them."""
    source = path.as_posix()
    if path.is_absolute() and path.is_relative_to(root := Path(__file__).resolve().parents[1]):
        source = path.relative_to(root).as_posix()
    new = records(data, source)
    dispatch.write(new)
    table = Table(
        "calls", "runs", "time as a multiple of ours", "measured", title=f"Attention on {new[0].architecture}"
    )
    for record in new:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in record.ratios.items())
        table.add_row(str(record.shape), record.winner() or "triton", ratios, ", ".join(record.workloads))
    return table

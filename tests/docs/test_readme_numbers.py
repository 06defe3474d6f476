"""Every number under the README's heading "Measured" is that of a file in bench/results/, and what was noisy says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.docs.pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = README.split("## Measured")[1].split("\n## ")[0]
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


def results(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["rows"]
    return rows


def noise(peer: dict[str, Any]) -> str:
    return "" if peer["reliable"] else " noisy"


def test_the_table() -> None:
    """Row by row in the order of the file."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in MEASURED.splitlines() if line[:1] == "|"]
    rows = results("cpu")
    assert len(table) == len(rows) + 2
    for cells, row in zip(table[2:], rows, strict=True):
        words = {word for word in re.split(r"[\W_]+", row["workload"]) if word.isdigit()}
        assert words <= set(re.findall(r"\d+", cells[0])), f"{cells[0]} is not {row['workload']}"
        if "failed" in row:
            assert cells[1:3] == [DTYPES[row["dtype"]], "not timed"]
            continue
        (_, upstream), ours, *packed = ((n, p) for n, p in row["peers"].items())
        expected = [
            DTYPES[row["dtype"]],
            f"{upstream['median_ms']:.1f} ms{noise(upstream)}",
            f"{ours[1]['speedup']:.2f}x{noise(ours[1])}",
            f"{packed[0][1]['speedup']:.2f}x{noise(packed[0][1])}" if packed else "not offered",
            f"{ours[1]['memory_ratio']:.2f}x",
        ]
        assert cells[1:] == expected, row["workload"]


def test_the_text() -> None:
    said = " ".join(MEASURED.split())
    for row in results("cpu_quantized"):
        upstream, ours = row["peers"]["bitsandbytes"], row["peers"]["mllm_fast"]
        pair = rf"{upstream['median_ms']:.1f} (ms )?against {ours['median_ms']:.1f} ms \({ours['speedup']:.1f}x\)"
        assert re.search(pair, said), row["workload"]
    for row in results("cpu_finetune"):
        upstream, ours = row["peers"]["transformers + peft"], row["peers"]["mllm_fast"]
        for peer in (upstream, row["peers"]["transformers + peft, autocast"], ours):
            assert f"{peer['median_ms'] / 1e3:.2f} s" in said, row["workload"]
        assert f"{ours['speedup']:.2f}x and" in said
        assert f"{ours['memory_ratio']:.2f}x" in said
        assert upstream["reliable"] or "`noisy`" in said.split("cpu_finetune.json")[1]


def test_the_plots() -> None:
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", MEASURED)
    assert len(shown) == len(set(shown)) >= 3
    assert all((ROOT / path).is_file() and (ROOT / path).with_suffix(".json").is_file() for path in map(Path, shown))

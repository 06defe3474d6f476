"""The command line of the benchmarks: `python -m bench`, also `mllm-fast bench`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import record, report, roofline
from .measure import QUICK, Limits, Plan, machine_limits
from .registry import Result, UnknownWorkloadError, Workload, WrongResultError, find, run


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Run the command line; 0 is success, 1 a workload whose results are wrong, 2 a wrong argument."""
    args = _parser(prog).parse_args(argv)
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width, and the table must not be cut
    try:
        if args.compare:
            console.print(report.comparison(*(report.load(path) for path in args.compare)))
            return 0
        if args.plot is not None:
            _print_written(console, _plots(report.load(args.plot), args.plot))
            return 0
        if args.record is not None:
            console.print(record.update(report.load(args.record), args.record))
            return 0
        chosen = find(args.workload)
    except (UnknownWorkloadError, report.ReportFileError) as error:
        errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    if args.list:
        console.print(_listing(chosen))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        errors.print("error: --device cuda needs a GPU, and torch sees none; use --device cpu", style="red")
        return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    plan = QUICK if args.quick else Plan()
    if args.seconds is not None:
        plan = dataclasses.replace(plan, seconds=args.seconds)

    device = torch.device(args.device)
    if device.type == "cuda":  # where `make gpu` stops after its time: what has a goal comes first
        chosen.sort(key=lambda w: not w.gpu_goals)
    rows: list[report.Row] = []
    for rows in _run(chosen, device, plan, errors):
        if args.out is not None:  # after every workload, so that an interruption loses only the one in progress
            report.save(report.report(rows, plan), args.out)
    data = report.report(rows, plan)
    console.print(report.table(rows))
    console.print(report.summary(data))
    if args.out is not None:
        _print_written(console, [args.out, *_plots(data, args.out)])
    return int(any("failed" in r for r in rows))


def _plots(data: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw a report beside its file."""
    if not any(r["peers"] for r in data["rows"]):
        return []
    bars, roof = path.with_suffix(".png"), path.with_name(f"{path.stem}_roofline.png")
    report.plot(data, bars)
    roofline.plot(data, roof)
    return [bars, roof]


def _print_written(console: Console, paths: Sequence[Path]) -> None:
    console.print("wrote " + (" and ".join(map(str, paths)) or "nothing: no row was timed"), soft_wrap=True)


def _run(chosen: Sequence[Workload], device: torch.device, plan: Plan, console: Console) -> Iterator[list[report.Row]]:
    """Yields, after every workload, the rows of all so far."""
    outcomes: list[tuple[Workload, Result | str]] = []
    limits: dict[torch.dtype, Limits] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for workload in chosen:
            progress.update(task, description=workload.name)
            try:
                outcome: Result | str = run(workload, device, plan)
                # Again with every workload: on a shared machine a single attempt may hit a bad moment.
                limits[workload.dtype] = machine_limits(device, workload.dtype).raised(limits.get(workload.dtype))
            except WrongResultError as error:
                outcome = str(error)
            except Exception as error:  # a row that fails must not take the others with it
                outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            outcomes.append((workload, outcome))
            progress.advance(task)
            yield [
                report.failed_row(done, found) if isinstance(found, str) else report.row(found, limits[done.dtype])
                for done, found in outcomes
            ]


def _listing(chosen: Sequence[Workload]) -> Table:
    table = Table("workload", "block", "model", "direction", "shape")
    for w in chosen:
        shape = ", ".join(f"{name} {size}" for name, size in w.shape.items())
        table.add_row(w.name, w.block, w.model, w.direction, shape)
    return table


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Measure the blocks against upstream, side by side.")
    parser.add_argument("workload", nargs="*", help="part of a name, or a pattern with * and ?; default: all")
    parser.add_argument("--list", action="store_true", help="list the workloads and stop")
    parser.add_argument("--quick", action="store_true", help="a few samples each: shows that it runs, not how fast")
    parser.add_argument("--seconds", type=_positive, help="at most this long per workload (default 30; quick 4)")
    parser.add_argument("--threads", type=int, choices=range(1, 1025), metavar="N", help="CPU threads of torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=_json, metavar="FILE.json", help="write the results, and plots beside them")
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="draw the plots of a result file and stop")
    parser.add_argument("--record", type=Path, metavar="FILE.json", help="let the library choose between its attention "
                        "kernels, SDPA and xformers by what this result file measured, on GPUs like its own")  # fmt: skip
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare two result files and stop"
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


def _json(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"expected a file name that ends in .json, got {text}")
    return path


if __name__ == "__main__":
    sys.exit(main())

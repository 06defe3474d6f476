"""The demo: every supported system fused on real photographs, then a real fine-tuning run that ends in captions."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from .systems import System

__all__ = ["run"]

# What part 2 has to reach on images that it never trained on.
TARGET = 0.95


DIGITS = "digits"


class UnknownSystemError(ValueError):
    """The demo has no part of that name."""


def run(out_dir: Path, quick: bool = False, only: Sequence[str] = ()) -> int:
    """Run both parts, write their pictures and the trained bridge into `out_dir`, and print what came out.

    Args:
        out_dir: made where missing; results of an earlier run are replaced.
        quick: smaller models and fewer steps.
        only: names of systems of part 1, or "digits" for part 2; default: all of them.

    Returns:
        0; 1 where a fused system disagrees with the unfused one or the captions miss `TARGET`.

    Raises:
        UnknownSystemError: a name in `only` is none of them.
    """
    # Heavy libraries are imported here, so that the command line answers at once.
    from rich.console import Console

    console = Console()
    out_dir = Path(out_dir)
    start = time.perf_counter()
    with _offline_and_quiet(), _one_thread():
        chosen = _choose(only)
        out_dir.mkdir(parents=True, exist_ok=True)
        verdicts: list[tuple[bool, str]] = []
        written: list[tuple[Path, str]] = []
        example = None
        if chosen:
            verdicts.append(_compare_systems(chosen, out_dir, quick, console))
            written.append((out_dir / "systems.png", "times and memory, unfused and fused"))
        if not only or DIGITS in only:
            verdict, files = _caption_digits(out_dir, quick, console)
            verdicts.append(verdict)
            written += files
            example = f"mllm-fast generate {out_dir / 'bridge'} {out_dir / 'digit.png'}"
    console.rule("Summary")
    for reached, what in verdicts:
        console.print(f"{_verdict(reached)} {what}", highlight=False)
    console.print(f"{time.perf_counter() - start:.0f} s in all; written:", highlight=False)
    for path, what in written:
        console.print(f"  {path}: {what}", highlight=False, markup=False, soft_wrap=True)
    if example:
        console.print(f"Try: {example}", highlight=False, markup=False, soft_wrap=True)
    return 0 if all(reached for reached, _ in verdicts) else 1


def _choose(only: Sequence[str]) -> list[System]:
    """The systems of part 1 that were asked for, by the first word of their name, in lower case."""
    from . import blip_systems, systems

    known = {system.key: system for system in (*systems.SYSTEMS, *blip_systems.SYSTEMS)}
    if unknown := [name for name in only if name not in (*known, DIGITS)]:
        raise UnknownSystemError(f"the demo has no {', '.join(unknown)}; choose from {', '.join(known)} and {DIGITS}")
    return [system for name, system in known.items() if not only or name in only]


def _compare_systems(chosen: Sequence[System], out_dir: Path, quick: bool, console: Console) -> tuple[bool, str]:
    """Part 1: whether the fused systems agree with the unfused ones."""
    from . import systems
    from .comparison import compare, draw, table
    from .photographs import load_photographs

    console.rule("1. Supported systems, unfused and fused")
    size = systems.QUICK if quick else systems.FULL
    photographs = load_photographs(size.images)
    with _progress(console) as bars:
        comparisons = [compare(system, size, photographs, bars) for system in chosen]
    console.print(table(comparisons))
    draw(comparisons, photographs, out_dir / "systems.png")
    return all(c.agrees for c in comparisons), "fused systems give the same output as unfused ones"


def _caption_digits(out_dir: Path, quick: bool, console: Console) -> tuple[tuple[bool, str], list[tuple[Path, str]]]:
    """Part 2: whether enough held-out captions are right; and what was written."""
    from .digits import QUICK_SETTINGS, Settings, draw_strip, run_digits

    console.rule("2. Teach, freeze, and train a bridge to caption handwritten digits")
    with _progress(console) as bars:
        result = run_digits(QUICK_SETTINGS if quick else Settings(), bars)
    draw_strip(result, out_dir / "digits.png")
    bridge = result.captioner.save(out_dir / "bridge", overwrite=True)
    example = out_dir / "digit.png"
    result.save_example(example)
    console.print(
        f"language model: {result.frozen:,} parameters, frozen with its linear layers in 4 bits "
        f"({result.quantized.bytes_before / 1024:.0f} -> {result.quantized.bytes_after / 1024:.0f} KiB), knows "
        f"{result.number_facts:.0%} of the number facts ({result.seconds[0]:.0f} s)\n"
        f"bridge: {result.trained:,} parameters trained ({result.seconds[1]:.0f} s)\n"
        f"exact captions on {len(result.captions)} held-out images: {result.accuracy:.1%} "
        f"({result.prompted_accuracy:.1%} continuing a prompt; {result.untrained_accuracy:.1%} before training)",
        highlight=False,
    )
    files = [
        (out_dir / "digits.png", "held-out digits with their captions"),
        (bridge, "the trained bridge (safetensors), its language model and tokenizer"),
        (example, f'a held-out digit; the model says "{result.captions[0]}"'),
    ]
    return (result.accuracy >= TARGET, f"at least {TARGET:.0%} of the held-out digits captioned exactly"), files


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


def _verdict(ok: bool) -> str:
    return "[green]yes[/green]" if ok else "[red]NO[/red] "


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Two threads wait for each other at every operation, which on a busy machine takes longer than the work itself."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _offline_and_quiet() -> Iterator[None]:
    """No look-ups on the network, and no advice from libraries between the progress bars."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")}
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""The pages of the documentation and their code blocks, and what may be done with a command in one."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import bench.__main__ as bench_command
from mllm_fast import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "bash", "text", "yaml", "toml")

# A block that is not run says why in a comment right before it, which a rendered page does not show.
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->$")
# Commands that take a moment and write nothing: they are run. All others are parsed, and what they name must exist.
RUN = (
    ("mllm-fast", "info"),
    ("mllm-fast", "--version"),
    ("mllm-fast", "bench", "--list"),
    ("mllm-fast", "bench", "--compare"),
    ("mllm-fast", "finetune", "--list"),
)
# The same for files that the page itself has made.
RUN_HERE = (
    ("mllm-fast", "finetune", "run.yaml"),
    ("mllm-fast", "generate", "finished"),
    ("mllm-fast", "verify", "flamingo"),
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines, the number of its first line, and why it is not run ("": it is)."""

    language: str
    text: str
    line: int
    not_run: str = ""

    def commands(self) -> list[list[str]]:
        """The commands of a block of shell, word by word, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order. One without a language is shell where its lines are commands, else text."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start, language, reason = -1, "", ""
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start < 0:
            marker = NOT_RUN.search(lines[number - 1]) if number else None
            start, language, reason = number + 1, line[3:].strip(), marker["reason"] if marker else ""
            continue
        text = "\n".join(lines[start:number]) + "\n"
        shell = all(part.split()[0] in ("make", "mllm-fast") for part in text.splitlines() if part.split())
        found.append(Block(language or ("bash" if shell else "text"), text, start + 1, reason))
        start = -1
    assert start < 0, f"{page.name}: the block at line {start} is not closed"
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """The commands of this project that stand in running text, as in `make test`."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(code) for code in re.findall(r"`((?:mllm-fast|make) [^`]+)`", text)]


def check_command(words: list[str], folder: Path = ROOT) -> None:
    """Run a cheap command; of any other check that it is one, with arguments that it takes and files that exist.

    Args:
        words: of the command.
        folder: of the page's own files.
    """
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    if words[:3] == ["python", "-m", "bench"]:
        words = ["mllm-fast", "bench", *words[3:]]
    if words[0] == "mllm-fast":
        _check_mllm_fast(words, folder)
    elif words[0] == "make":
        known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        targets = [word for word in words[1:] if "=" not in word]
        assert targets, f"{words}: names no target"
        assert set(targets) <= set(known), f"{words}: the Makefile has {known}"
    elif words[0] in ("python", "pytest", "ruff", "mypy"):
        for word in words[1:]:
            if "/" in word or word.endswith(".py"):
                assert (ROOT / word.split("::")[0]).exists(), f"{words}: {word} does not exist"
    elif words[:2] == ["pip", "install"]:
        pyproject = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"mllm-fast\[([\w,]+)\]", " ".join(words)):
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", pyproject, flags=re.MULTILINE), f"{words}: there is no extra {name}"
    else:
        raise AssertionError(f"{words}: a command that this test does not know")


def _check_mllm_fast(words: list[str], folder: Path) -> None:
    here = any(words[: len(prefix)] == list(prefix) for prefix in RUN_HERE)
    if here or any(words[: len(prefix)] == list(prefix) for prefix in RUN):
        with (
            contextlib.chdir(folder if here else ROOT),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as errors,
        ):
            try:
                status: object = cli.main(words[1:])
            except SystemExit as end:
                status = end.code
        assert not status, f"{words} failed: {errors.getvalue()}"
        return
    if len(words) == 2:  # named, not called
        assert words[1] in {command.name for command in cli.COMMANDS}, f"{words}: there is no such command"
        return
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args, rest = cli.build_parser().parse_known_args(words[1:])
            if rest and args.passes_on:
                bench_command._parser("mllm-fast bench").parse_args(rest)
    except (SystemExit, argparse.ArgumentError) as error:
        raise AssertionError(f"{words}: {errors.getvalue()}") from error
    assert not rest or args.passes_on, f"{words}: {rest} are no arguments of it"

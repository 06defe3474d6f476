"""Every code block of the documentation runs: Python page by page on tiny models, commands as far as that is cheap."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch

from tests.docs import preambles
from tests.docs.pages import LANGUAGES, PAGES, ROOT, blocks, check_command, inline_commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after another, in one namespace that its preamble prepares, in a folder of their own.

    A block of YAML is the file run.yaml of the commands after it.
    """
    namespace = preambles.namespace(page.relative_to(ROOT).as_posix(), tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: {block.language!r} is none of {LANGUAGES}"
        if block.not_run:
            continue
        if block.language == "python":
            # Empty lines in front, so that a traceback has the page's own line numbers.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with warnings.catch_warnings(), torch.random.fork_rng():
                warnings.simplefilter("ignore")
                exec(code, namespace)
        elif block.language == "bash":
            for words in block.commands():
                check_command(words, tmp_path)
        elif block.language == "yaml":
            (tmp_path / "run.yaml").write_text(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_the_text(page: Path) -> None:
    for words in inline_commands(page):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    """Every relative link leads to a file, and with an anchor to a heading of it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}: {file.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named(page: Path) -> None:
    """Paths of this repository in `code` exist, and so do tests that are named with their file."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`((?:kernels|mllm_fast|bench|tests|docs|examples)/[\w./]+(?:::\w+)?)`", text):
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"
        if function:
            assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), f"{page.name}: no {name}"


@pytest.mark.parametrize(
    "command",
    [
        "make nothing", "mllm-fast nothing", "mllm-fast generate", "mllm-fast info --no-such-option",
        "mllm-fast bench --no-such-option", "pytest tests/no_such_file.py", "pip install 'mllm-fast[nothing]'", "curl x",
        "mllm-fast finetune run.yaml",
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(command: str, tmp_path: Path) -> None:
    if command == "mllm-fast generate":  # to name a command alone is right
        check_command(shlex.split(command))
        command += " path/to/model"  # without an image it is not
    with pytest.raises(AssertionError):
        check_command(shlex.split(command), tmp_path)


def test_a_page_is_read_as_it_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    lines = [
        "# Page",
        "```python",
        "x = 1",
        "```",
        "<!-- not run: no GPU -->",
        "```bash",
        "make gpu",
        "```",
        "```",
        "a b",
        "```",
    ]
    page.write_text("\n".join(lines))
    found = [(block.language, block.line, block.not_run) for block in blocks(page)]
    assert found == [("python", 3, ""), ("bash", 7, "no GPU"), ("text", 10, "")]
    page.write_text("```python\nx = 1\n")
    with pytest.raises(AssertionError, match="not closed"):
        blocks(page)

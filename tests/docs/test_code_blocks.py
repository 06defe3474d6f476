"""Every code block of the documentation runs: Python page by page on tiny models, commands as far as that is cheap."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from tests.docs import preambles
from tests.docs.pages import LANGUAGES, PAGES, ROOT, blocks, check_command, inline_commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after another, in one namespace that its preamble prepares, in an empty folder."""
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
            monkeypatch.chdir(ROOT)
            for words in block.commands():
                check_command(words)
            monkeypatch.chdir(tmp_path)


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

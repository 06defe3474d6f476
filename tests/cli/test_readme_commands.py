"""The command that the README's table gives for each system runs, on a tiny model of the same classes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mllm_fast import cli
from mllm_fast.pipeline import drawn_image
from tests.cli.systems import SYSTEMS
from tests.docs import test_examples, test_finetune_examples

README = Path(__file__).parents[2] / "README.md"

# Which tiny model stands for a name in the table.
STANDS_FOR = {
    "HuggingFaceM4/idefics-9b-instruct": "idefics",
    "HuggingFaceM4/idefics2-8b": "idefics2",
    "meta-llama/Llama-3.2-11B-Vision-Instruct": "mllama",
    "Salesforce/blip-image-captioning-base": "blip",
    "Salesforce/blip2-opt-2.7b": "blip2",
    "Salesforce/instructblip-vicuna-7b": "instructblip",
    "llava-hf/llava-1.5-7b-hf": "llava",
    "path/to/instructblip-video": "instructblipvideo",
    "path/to/flamingo": "flamingo",
    "path/to/minigpt4": "minigpt4",
    "path/to/mplug-owl": "mplug_owl",
}


def _commands() -> dict[str, list[str]]:
    """(first cell of a row -> its command) of the table of systems."""
    section = README.read_text(encoding="utf-8").split("## Supported systems")[1].split("\n## ")[0]
    rows = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("|")][2:]
    found = {}
    for row in rows:
        command = re.search(r"`((?:mllm-fast|python) [^`]+)`", row[-1])
        assert command is not None, f"no command in the README's row {row[0]}"
        found[row[0].strip()] = shlex.split(command[1])
    return found


COMMANDS = _commands()


def test_every_tiny_system_is_in_the_table() -> None:
    named = {STANDS_FOR[word] for words in COMMANDS.values() for word in words if word in STANDS_FOR}
    assert named == set(SYSTEMS)


@pytest.mark.parametrize("row", COMMANDS)
def test_it_runs(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    if COMMANDS[row][0] == "python":
        script = COMMANDS[row][1]
        assert (README.parent / script).is_file()
        assert Path(script).name in {*test_examples.SAID, *test_finetune_examples.EXAMPLES}, "no test runs it"
        return
    words = COMMANDS[row][1:]
    for picture in filter(re.compile(r"\.jpg$").search, words):
        drawn_image(40).save(picture)
    if words[0] == "demo":
        assert cli.main([*words, "--quick"]) == 0
        return
    names = [word for word in words if word in STANDS_FOR]
    assert len(names) == 1, f"{words} names no model that stands in {Path(__file__).name}"
    SYSTEMS[STANDS_FOR[names[0]]](tmp_path / "model")
    status = cli.main(["model" if word == names[0] else word for word in words] + ["--max-new-tokens", "4"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert captured.out.strip()

"""A name on the hub where nobody answers: one line while it is asked, one line of error, and no half minute of retries."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from mllm_fast import cli
from mllm_fast.pipeline import drawn_image


class Client:
    """In place of the hub's HTTP client. With `head`, its front page answers, and nothing else does."""

    def __init__(self, *, head: bool) -> None:
        self.answers, self.asked, self.loud = head, 0, False

    def head(self, url: str, **kwargs: Any) -> str:
        if not self.answers:
            raise ConnectionError("Name or service not known")
        return "welcome"

    def request(self, *args: Any, **kwargs: Any) -> None:
        self.asked += 1
        self.loud |= logging.getLogger(_http.__name__).isEnabledFor(logging.ERROR)
        raise _http._DEFAULT_RETRY_ON_EXCEPTIONS[0]("timed out")

    def close(self) -> None:
        pass


def generate(
    monkeypatch: pytest.MonkeyPatch, folder: Path, client: Client, name: str = "some/name", offline: bool = False
) -> tuple[int, list[float]]:
    """The status of the command, and how long it would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", client)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", lambda: client)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    drawn_image(20).save(folder / "photo.png")
    return cli.main(["generate", name, str(folder / "photo.png")]), slept


@pytest.mark.parametrize("head", [False, True])
def test_a_hub_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, head: bool
) -> None:
    client = Client(head=head)
    own = logging.getLogger("huggingface_hub")
    before = own.level
    status, slept = generate(monkeypatch, tmp_path, client)
    assert status == 2
    asking, error = capfd.readouterr().err.splitlines()
    assert asking == "asking the hub for some/name"
    assert error.startswith(
        "mllm-fast: error: ModelNotFoundError: some/name is no folder, and neither the local cache nor"
    )
    # Where there is no network it is not waited for; where the hub is slow, its client tries again, in silence.
    assert bool(client.asked) is bool(slept) is head
    assert not client.loud
    assert own.level == before
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(("name", "offline"), [("some/name", True), ("./no/such/folder", False), ("folder", False)])
def test_nobody_is_asked(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str, offline: bool
) -> None:
    if name == "folder":
        name = str(tmp_path / name)
        Path(name).mkdir()
    client = Client(head=True)
    assert generate(monkeypatch, tmp_path, client, name, offline) == (2, [])
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("mllm-fast: error: ModelNotFoundError: ")
    assert client.asked == 0

"""What the command says, and how long it waits, while a model comes from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROBE_SECONDS = 10.0


@contextlib.contextmanager
def asking(name: str | Path) -> Iterator[None]:
    """One line on stderr where `name` is asked for at the hub inside, and none of its client's about every retry.

    The client tries six times, for half a minute. So the hub is asked for a sign of life first, once: where it gives none,
    the client works from its cache alone inside, as under `HF_HUB_OFFLINE=1`.

    Args:
        name: a folder or file, for which this does nothing, or a name on the hub.
    """
    from huggingface_hub import constants, utils
    from huggingface_hub.errors import HFValidationError

    client: Any = utils  # what it exports it does not list
    try:
        client.validate_repo_id(str(name))
        asks = not Path(name).exists() and not constants.HF_HUB_OFFLINE
    except HFValidationError:
        asks = False
    if not asks:
        yield
        return
    print(f"asking the hub for {name}", file=sys.stderr, flush=True)  # noqa: T201
    verbosity = client.logging.get_verbosity()
    client.logging.set_verbosity(logging.CRITICAL)
    try:
        constants.HF_HUB_OFFLINE = not _answers(client, constants.ENDPOINT)
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
        client.logging.set_verbosity(verbosity)


def _answers(client: Any, endpoint: str) -> bool:
    """Whether the hub answers at all, whatever it says."""
    try:
        client.get_session().head(endpoint, timeout=PROBE_SECONDS)
    except Exception:  # of whichever HTTP library the client is built on
        return False
    return True

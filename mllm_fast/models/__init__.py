"""Systems that have no maintained class elsewhere.

Those that are built on transformers are imported when they are first used; that also registers them with its Auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .bridge_file import BridgeMismatchError
from .flamingo import Flamingo, FlamingoConfig
from .original_checkpoint import CheckpointMismatchError

if TYPE_CHECKING:
    from .flamingo_model import FlamingoForConditionalGeneration, FlamingoModelConfig, FlamingoProcessor
    from .minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
    from .mplug_owl import MplugOwlConfig, MplugOwlForConditionalGeneration, MplugOwlProcessor

__all__ = [
    "BridgeMismatchError",
    "CheckpointMismatchError",
    "Flamingo",
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "FlamingoModelConfig",
    "FlamingoProcessor",
    "MiniGPT4Config",
    "MiniGPT4ForConditionalGeneration",
    "MiniGPT4Processor",
    "MplugOwlConfig",
    "MplugOwlForConditionalGeneration",
    "MplugOwlProcessor",
]

_HOMES = {
    "FlamingoForConditionalGeneration": "flamingo_model",
    "FlamingoModelConfig": "flamingo_model",
    "FlamingoProcessor": "flamingo_model",
    "MiniGPT4Config": "minigpt4",
    "MiniGPT4ForConditionalGeneration": "minigpt4",
    "MiniGPT4Processor": "minigpt4",
    "MplugOwlConfig": "mplug_owl",
    "MplugOwlForConditionalGeneration": "mplug_owl",
    "MplugOwlProcessor": "mplug_owl",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value

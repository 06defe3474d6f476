"""Fused kernels and drop-in modules for the blocks that make a language model multimodal.

Importing the package touches no device, starts no compilation and imports nothing heavy: the names below are loaded
when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .finetune import FinetuningPlan, Lora, prepare_finetuning
    from .fusion import FuseReport, NothingToFuseError, fuse, unfuse
    from .kernels.runtime import backend
    from .quantization import QuantizationReport, load, quantization_report, quantize_llm

__version__ = "0.1.0"

__all__ = [
    "FinetuningPlan",
    "FuseReport",
    "Lora",
    "NothingToFuseError",
    "QuantizationReport",
    "__version__",
    "backend",
    "fuse",
    "load",
    "prepare_finetuning",
    "quantization_report",
    "quantize_llm",
    "unfuse",
]

_HOMES = {
    "FinetuningPlan": "finetune",
    "Lora": "finetune",
    "prepare_finetuning": "finetune",
    "FuseReport": "fusion",
    "NothingToFuseError": "fusion",
    "fuse": "fusion",
    "unfuse": "fusion",
    "backend": "kernels.runtime",
    "QuantizationReport": "quantization",
    "load": "quantization",
    "quantization_report": "quantization",
    "quantize_llm": "quantization",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

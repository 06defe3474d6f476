"""How to quantise, and how transformers is told what was quantised."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .selection import names_to_skip, quantized_layers

KINDS = ("nf4", "fp4", "int8")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Of LLM.int8 (arXiv 2208.07339, section 3.2), for `outliers="llm_int8"` and for bitsandbytes itself.
THRESHOLD = 6.0


def import_bitsandbytes() -> Any:
    """The bitsandbytes package, without its complaint, at import, of a CPU kernel that it would download."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Recipe:
    """The arguments of `quantize_llm` and `load` that say how to quantise, checked.

    Raises:
        ValueError: one that does not exist, or that is for another kind.
    """

    kind: str
    double_quant: bool = False
    blocksize: int = 64
    compute_dtype: torch.dtype | None = None
    outliers: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose one of {', '.join(map(repr, KINDS))}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize is {self.blocksize}; expected one of {', '.join(map(str, BLOCKSIZES))}")
        if self.kind == "int8":
            given = {"double_quant": self.double_quant, "compute_dtype": self.compute_dtype is not None}
            given["blocksize"] = self.blocksize != 64
            if wrong := [name for name, is_given in given.items() if is_given]:
                raise ValueError(
                    f"{', '.join(wrong)} is for nf4 and fp4; int8 has one scale a row, computed in x's dtype"
                )
        elif self.outliers is not None:
            raise ValueError(f"outliers={self.outliers!r} is for int8, not for {self.kind}")
        if self.outliers not in (None, "llm_int8"):
            raise ValueError(f"outliers={self.outliers!r}; expected None or 'llm_int8'")
        if self.compute_dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"compute_dtype is {self.compute_dtype}; expected bf16, fp16 or fp32")

    @property
    def product_dtype(self) -> torch.dtype:
        """What 4-bit products are computed in."""
        return self.compute_dtype or torch.bfloat16

    def config(self, skip: list[str]) -> Any:
        """As transformers' `BitsAndBytesConfig`."""
        from transformers import BitsAndBytesConfig

        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=THRESHOLD, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.product_dtype,
            llm_int8_skip_modules=skip,
        )


def describe(model: nn.Module, recipe: Recipe) -> None:
    """Tell a transformers model that it is quantised, as if transformers had done it: for saving, PEFT and Trainer."""
    from transformers.quantizers.auto import AutoHfQuantizer

    found: Any = model
    layers = [path for paths in quantized_layers(model) for path in paths.split(", ")]
    config = recipe.config(names_to_skip(model, layers))
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    found.is_quantized = True
    found.quantization_method = config.quant_method
    found.hf_quantizer = quantizer
    quantizer.postprocess_model(model)

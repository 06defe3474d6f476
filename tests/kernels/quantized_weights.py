"""Quantised weights for the tests: made by bitsandbytes, with the numbers they stand for, and by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from mllm_fast.kernels.quantized_linear import Lora, Nested, Weight4bit, Weight8bit, quantized_linear
from tests.kernels.op_checks import Inputs

Weight = Weight4bit | Weight8bit


def quantized(
    rows: int,
    columns: int,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Weight4bit, Tensor, Any]:
    """(the weight, bitsandbytes' bytes, bitsandbytes' state) of a random weight [rows, columns]."""
    original = (torch.randn(rows, columns) * 0.05).to(device, dtype)
    packed, state = bnb.quantize_4bit(original, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    inner = None
    if nested:
        inner = Nested(state.state2.code, state.state2.absmax, state.offset)
    weight = Weight4bit(packed.flatten(), state.absmax, state.code, blocksize, (rows, columns), inner)
    return weight, packed, state


def weight_4bit(*args: Any, **kwargs: Any) -> Weight4bit:
    """As `quantized`, the weight alone."""
    return quantized(*args, **kwargs)[0]


def weight_8bit(rows: int, columns: int, device: str = "cpu") -> Weight8bit:
    """A random weight in bitsandbytes' int8."""
    values, scale, _ = bnb.int8_vectorwise_quant((torch.randn(rows, columns) * 0.05).to(device, torch.float16))
    return Weight8bit(values, scale)


def mapped_weight(rows: int, columns: int, blocksize: int = 64) -> Weight4bit:
    """Random codes of a random map."""
    elements = rows * columns
    packed = torch.randint(0, 256, ((elements + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-elements // blocksize)) + 0.1
    return Weight4bit(packed, absmax, torch.randn(16), blocksize, (rows, columns))


def definition(weight: Weight4bit | Weight8bit, dtype: torch.dtype = torch.float64) -> Tensor:
    """W element by element: code times scale in fp32, rounded to `dtype` once."""
    if isinstance(weight, Weight8bit):
        return (weight.values.float() * weight.scale[:, None] * 7.874015718698502e-3).to(dtype)
    elements = weight.shape[0] * weight.shape[1]
    index = torch.arange(elements, device=weight.device)
    byte = weight.packed.int()[index // 2]
    nibble = torch.where(index % 2 == 0, byte >> 4, byte & 15)
    return (weight.code[nibble] * _scales(weight)[index // weight.blocksize]).to(dtype).view(weight.shape)


def _scales(weight: Weight4bit) -> Tensor:
    nested = weight.nested
    if nested is None:
        return weight.absmax
    index = torch.arange(weight.absmax.numel(), device=weight.device)
    return nested.code[weight.absmax.int()] * nested.absmax[index // 256] + nested.offset


@functools.cache
def nf4_map() -> Tensor:
    """The sixteen numbers of NF4."""
    code: Tensor = bnb.get_4bit_type("nf4", device="cpu")
    return code


# One of each kind, for tests of everything.
WEIGHTS: dict[str, Callable[[], Weight]] = {
    "nf4": lambda: weight_4bit(48, 192),
    "fp4": lambda: weight_4bit(40, 128, "fp4"),
    "nested": lambda: weight_4bit(90, 192, nested=True),
    "blocks of 128": lambda: weight_4bit(33, 384, "fp4", 128, nested=True),
    "straddling blocks": lambda: weight_4bit(70, 96),
    "odd": lambda: weight_4bit(37, 51, blocksize=32),
    "any map": lambda: mapped_weight(48, 128),
    "int8": lambda: weight_8bit(75, 130),
    "int8 in whole vectors": lambda: weight_8bit(75, 192),
}


def inputs(weight: Weight, rows: tuple[int, ...], rank: int = 0) -> Inputs:
    """Random x, bias, and with a rank the factors of a low-rank term."""
    width, columns = weight.shape
    drawn = {"x": torch.randn(*rows, columns), "bias": torch.randn(width)}
    if rank:
        drawn |= {"a": torch.randn(rank, columns) * columns**-0.5, "b": torch.randn(width, rank) * rank**-0.5}
    return drawn


def ours(weight: Weight) -> Callable[..., Tensor]:
    """quantized_linear on inputs by name, with a low-rank term where they have its factors."""

    def call(x: Tensor, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return quantized_linear(x, weight, bias, lora=None if a is None or b is None else Lora(a, b, 0.5))

    return call

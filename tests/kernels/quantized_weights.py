"""Quantised weights for the tests: made by bitsandbytes, with the numbers they stand for, and by hand."""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from mllm_fast.kernels.quantized_linear import Nested, Weight4bit, Weight8bit


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

"""Quantised layers of bitsandbytes with random weights, and what they should compute."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mllm_fast

PACKS = bnb.functional.has_avx512bf16()
packs_in_place = pytest.mark.skipif(
    not PACKS, reason="bitsandbytes packs weights anew, and goes wrong, on CPUs with AVX512-BF16 only"
)
nested = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
maps = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def layer4(
    rows: int = 64,
    columns: int = 128,
    *,
    seed: int = 0,
    quant_type: str = "nf4",
    nested: bool = False,
    bias: bool = True,
    compute_dtype: torch.dtype | None = torch.bfloat16,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.bfloat16,
) -> bnb.nn.Linear4bit:
    """A quantised layer of bitsandbytes in train mode, which its CPU path packs nothing in."""
    generator = torch.Generator().manual_seed(seed)
    layer = bnb.nn.Linear4bit(
        columns, rows, bias, compute_dtype, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    weight = (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)
    layer.weight = bnb.nn.Params4bit(
        weight, False, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage,
        module=layer,
    ).to("cpu")  # fmt: skip
    if bias:
        layer.bias = nn.Parameter(torch.randn(rows, generator=generator).to(dtype), requires_grad=False)
    return layer


def layer8(
    rows: int = 64, columns: int = 128, *, seed: int = 0, bias: bool = True, threshold: float = 6.0
) -> bnb.nn.Linear8bitLt:
    generator = torch.Generator().manual_seed(seed)
    layer = bnb.nn.Linear8bitLt(columns, rows, bias, has_fp16_weights=False, threshold=threshold)
    weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    if bias:
        layer.bias = nn.Parameter(torch.randn(rows, generator=generator), requires_grad=False)
    return layer


def fused(layer: nn.Module) -> Any:
    ours = copy.deepcopy(layer)
    mllm_fast.fuse(ours)
    return ours


def exact_weight(layer: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the layer multiplies with, from bitsandbytes' own dequantisation in fp32."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales).to(dtype)
    state = copy.copy(layer.weight.quant_state)
    # As one row: on CPUs bitsandbytes goes wrong where blocks straddle rows.
    state.dtype, state.shape = torch.float32, torch.Size((1, layer.out_features * layer.in_features))
    flat = bnb.functional.dequantize_4bit(layer.weight.data, state)
    return flat.view(layer.out_features, layer.in_features).to(dtype)


def exact(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x.double(), exact_weight(layer), None if layer.bias is None else layer.bias.double())


def error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference).norm() / reference.norm())


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient(layer: nn.Module, x: Tensor) -> Tensor | None:
    x = x.clone().requires_grad_()
    layer(x).backward(torch.ones(*x.shape[:-1], layer.out_features, dtype=x.dtype))
    return x.grad


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_equal_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8)), name

"""Launches the quantised kernels: product, input gradient, dequantisation and dropout."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import runtime
from ..relaunch import launch
from ..sizes import cdiv, next_power_of_2
from ..target import Arch, arch_of, keep_scale, on_device, precision
from . import configs, triton_elementwise
from .configs import Config
from .decode import scales
from .lowrank import LowRank
from .triton_epilogue import merge_parts
from .triton_gradient import gradient_tiles
from .triton_product import product_tiles
from .weights import Weight, Weight4bit


def product(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    term: LowRank | None,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """x W^T + bias + term: [M, K] -> [M, N].

    Args:
        x, weight, bias, term: as for `reference.product`.
        config, splits: instead of the chosen ones.
    """
    rows, (width, columns) = x.shape[0], weight.shape
    if not _decodes_in_kernel(weight) or (rows > configs.MAX_ROWS and config is None):
        return _product_by_parts(x, weight, bias, term)
    if rows == 0:
        return x.new_empty(0, width)
    x, arch = _rows_apart(x), arch_of(x.device)
    bits, block = _format(weight)
    if config is None:
        config = configs.product_config(arch, rows, bits, block, x.element_size(), term is not None)
    tiles = cdiv(rows, config.BM) * cdiv(width, config.BN)
    if splits is None:
        splits = configs.splits_for(arch, tiles, cdiv(columns, config.BK))
    out, parts = _targets(x, rows, width, splits)
    merge = _Epilogue(bias, term, arch, x.dtype)
    with on_device(x):
        launch(
            product_tiles, (tiles * splits,),
            x, *_operands(weight), *(merge.none if splits > 1 else merge.tensors), out, parts,
            rows, width, columns, merge.rank, x.stride(0), _row_words(weight), *merge.strides, 0,
            BITS=bits, BLOCK=block, SCALE_RESULT=not config.scale_weight, EVEN_N=width % config.BN == 0,
            EVEN_K=columns % config.BK == 0, BM=config.BM, BN=config.BN, BK=config.BK, R=merge.R, SPLITS=splits,
            LOOKUP=_lookup(arch, x.dtype), PRECISION=merge.precision, **config.options,
        )  # fmt: skip
        if parts is not None:
            merge.launch(parts, out)
    return out


def input_gradient(
    grad: Tensor,
    weight: Weight,
    term: LowRank | None,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """dY W + term: [M, N] -> [M, K]; arguments as for `product`."""
    rows, (width, columns) = grad.shape[0], weight.shape
    if not _decodes_in_kernel(weight):
        return _gradient_by_parts(grad, weight, term)
    if rows == 0 or width == 0:
        return grad.new_zeros(rows, columns)
    grad, arch = _rows_apart(grad), arch_of(grad.device)
    bits, block = _format(weight)
    if config is None:
        half = grad.dtype == torch.float16
        dropped = term is not None and term.dropout_p > 0
        config = configs.gradient_config(arch, rows, bits, block, half, grad.element_size(), dropped)
    tiles = cdiv(rows, config.BM) * cdiv(columns, config.BK)
    if splits is None:
        splits = configs.splits_for(arch, tiles, cdiv(width, config.BN))
    out, parts = _targets(grad, rows, columns, splits)
    merge = _Epilogue(None, term, arch, grad.dtype)
    with on_device(grad):
        gradient_tiles[(tiles * splits,)](
            grad, *_operands(weight), *(merge.none if splits > 1 else merge.tensors)[1:], out, parts,
            rows, width, columns, merge.rank, grad.stride(0), _row_words(weight), *merge.strides,
            merge.dropout_p, merge.keep_scale, merge.seed,
            BITS=bits, BLOCK=block, SCALE_GRAD=not config.scale_weight, FLIPPED=config.flipped,
            EVEN_N=width % config.BN == 0, EVEN_K=columns % config.BK == 0, DROPOUT=merge.dropout_p > 0,
            BM=config.BM, BN=config.BN, BK=config.BK, R=merge.R, SPLITS=splits,
            LOOKUP=_lookup(arch, grad.dtype), PRECISION=merge.precision, **config.options,
        )  # fmt: skip
        if parts is not None:
            merge.launch(parts, out)
    return out


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K], bit for bit as `reference.dequantize` gives it."""
    return _Rows(weight, dtype)(0, weight.shape[0])


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x [M, K] with dropout, by a pattern that is a function of the seed; x itself for p = 0."""
    if p == 0.0 or x.numel() == 0:
        return x
    x, (rows, columns) = _rows_apart(x), x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device(x):
        triton_elementwise.drop[(cdiv(rows, 8) * cdiv(columns, 128),)](
            x, out, rows, columns, x.stride(0), p, keep_scale(p), seed, BM=8, BK=128,
        )  # fmt: skip
    return out


class _Epilogue:
    """The arguments of `finish`, and the pass that applies it to parts."""

    def __init__(self, bias: Tensor | None, term: LowRank | None, arch: Arch, dtype: torch.dtype) -> None:
        self.precision = precision(arch, dtype)
        self.none = (None, None, None)
        self.dropout_p, self.keep_scale, self.seed, self.rank, self.R = 0.0, 1.0, 0, 0, 16
        self.tensors: tuple[Tensor | None, ...] = (bias, None, None)
        self.strides: tuple[int, ...] = (0, 0)
        if term is not None and term.down.shape[1]:
            self.tensors = (bias, term.down.contiguous(), term.up)
            self.rank, self.strides = term.down.shape[1], term.up.stride()
            self.R = min(32, max(16, next_power_of_2(self.rank)))
            self.dropout_p, self.keep_scale, self.seed = term.dropout_p, keep_scale(term.dropout_p), term.seed

    def launch(self, parts: Tensor, out: Tensor) -> None:
        """The second pass over parts [splits, M, width]."""
        BM, BN = 16, 64
        grid = (cdiv(out.shape[0], BM) * cdiv(out.shape[1], BN),)
        launch(
            merge_parts, grid,
            parts, *self.tensors, out, *out.shape, self.rank, *self.strides,
            self.dropout_p, self.keep_scale, self.seed, DROPOUT=self.dropout_p > 0, SPLITS=parts.shape[0],
            BM=BM, BN=BN, R=self.R, PRECISION=self.precision, num_warps=4,
        )  # fmt: skip


class _Rows:
    """Dequantises rows of a weight in any layout, blocks that straddle rows included."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.scale = scales(weight) if isinstance(weight, Weight4bit) else weight.scale

    def step(self) -> int:
        """How many rows the workspace holds, such that each such range of rows starts a block."""
        columns = max(self.weight.shape[1], 1)
        unit = 1
        if isinstance(self.weight, Weight4bit):
            unit = self.weight.blocksize // math.gcd(columns, self.weight.blocksize)
        return max(unit, configs.WORKSPACE // columns // unit * unit)

    def __call__(self, first: int, last: int) -> Tensor:
        weight, columns = self.weight, self.weight.shape[1]
        out = torch.empty(last - first, columns, dtype=self.dtype, device=weight.device)
        if out.numel() == 0:
            return out
        with on_device(out):
            if isinstance(weight, Weight4bit):
                triton_elementwise.dequantize_4bit[(cdiv(out.numel(), 2048),)](
                    weight.packed, self.scale, weight.code, out, first * columns, out.numel(),
                    BLOCK=weight.blocksize, B=1024, LOOKUP=_lookup(arch_of(out.device), torch.float32),
                )  # fmt: skip
            else:
                triton_elementwise.dequantize_8bit[(cdiv(last - first, 4) * cdiv(columns, 256),)](
                    weight.values[first:last], weight.scale[first:last], out, last - first, columns, BM=4, BK=256
                )
        return out


def _product_by_parts(x: Tensor, weight: Weight, bias: Tensor | None, term: LowRank | None) -> Tensor:
    """The vendor's GEMM with rows of W, as many as the workspace holds."""
    width, rows = weight.shape[0], _Rows(weight, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    step = rows.step()
    if step >= width:
        out = F.linear(x, rows(0, width), bias)
    else:
        out = x.new_empty(x.shape[0], width)
        for first in range(0, width, step):
            last = min(first + step, width)
            out[:, first:last] = F.linear(x, rows(first, last), None if bias is None else bias[first:last])
    # The term is small beside the product: [M, r] times [r, N].
    return out if term is None else torch.addmm(out, term.down.to(x.dtype), term.up.to(x.dtype).mT)


def _gradient_by_parts(grad: Tensor, weight: Weight, term: LowRank | None) -> Tensor:
    """The same for dY W."""
    width, rows = weight.shape[0], _Rows(weight, grad.dtype)
    total = grad.new_zeros(grad.shape[0], weight.shape[1], dtype=torch.float32)
    step = rows.step()
    for first in range(0, width, step):
        total += grad[:, first : first + step] @ rows(first, min(first + step, width))
    if term is not None:
        total += dropout((term.down @ term.up.mT).to(grad.dtype), term.dropout_p, term.seed)
    return total.to(grad.dtype)


def _decodes_in_kernel(weight: Weight) -> bool:
    """Whether the fused kernels can read the weight: whole blocks and words in each row, and words at their place."""
    if not isinstance(weight, Weight4bit):
        return True
    return weight.aligned and weight.blocksize % 32 == 0 and weight.packed.data_ptr() % 4 == 0


def _format(weight: Weight) -> tuple[int, int]:
    return (4, weight.blocksize) if isinstance(weight, Weight4bit) else (8, 1)


def _row_words(weight: Weight) -> int:
    """The elements of DATA in a row. (Not left to the kernel, where its divisors would be unknown to the compiler.)"""
    return weight.shape[1] // 8 if isinstance(weight, Weight4bit) else weight.shape[1]


def _operands(weight: Weight) -> tuple[Any, ...]:
    """DATA, SCALE, CODE, NESTED_CODE, NESTED_ABSMAX and NESTED_OFFSET of the kernels."""
    if not isinstance(weight, Weight4bit):
        return weight.values, weight.scale, None, None, None, None
    nested = weight.nested
    fine = (None, None, None) if nested is None else (nested.code, nested.absmax, nested.offset)
    return weight.packed.view(torch.int32), weight.absmax, weight.code, *fine


def _targets(x: Tensor, rows: int, width: int, splits: int) -> tuple[Tensor, Tensor | None]:
    parts = None
    if splits > 1:
        parts = torch.empty(splits, rows, width, dtype=torch.float32, device=x.device)
    return torch.empty(rows, width, dtype=x.dtype, device=x.device), parts


def _rows_apart(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _lookup(arch: Arch, dtype: torch.dtype) -> str:
    """How the kernels look up codes: by byte permutation where numbers have 16 bits and the device can."""
    if runtime.interpreting():
        return "tree"
    return "gather" if arch == "gfx942" or dtype == torch.float32 else "prmt"

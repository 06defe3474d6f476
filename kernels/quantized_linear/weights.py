"""What `quantized_linear` multiplies with: packed weights as bitsandbytes keeps them, and a low-rank term beside them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

NESTED_BLOCKSIZE = 256


@dataclass(frozen=True, eq=False)
class Nested:
    """Scales that are themselves quantised (double quantisation, arXiv 2305.14314, section 3).

    Block i of the weight has the scale code[absmax8[i]] * absmax[i // blocksize] + offset, in fp32.

    Attributes:
        code: [256] fp32, the map of the 8-bit scales.
        absmax: [ceil(blocks / 256)] fp32.
        offset: [] fp32.
        blocksize: scales that share one entry of absmax; 256, the only size there is.
    """

    code: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int = NESTED_BLOCKSIZE


@dataclass(frozen=True, eq=False)
class Weight4bit:
    """A weight [N, K] of 4-bit codes in blocks, byte for byte as bitsandbytes stores it (NF4, FP4 or any other map).

    Element i of the flattened weight is code[nibble i] * absmax[i // blocksize]; nibble 2i is the high half of byte i,
    2i + 1 the low half. Blocks do not stop at the end of a row.

    Attributes:
        packed: [ceil(N * K / 2)] uint8, contiguous.
        absmax: [ceil(N * K / blocksize)] fp32; uint8 where `nested` is given.
        code: [16] fp32, what each nibble stands for (`quant_map` in checkpoints).
        blocksize: elements that share a scale; even.
        shape: (N, K).
        nested: how the scales are quantised; None: they are not.
        decoder: a name given to `register_decoder`: what dequantises this weight on a CPU, where it can; None: torch.

    Raises:
        ValueError: sizes or dtypes that do not fit.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    shape: tuple[int, int]
    nested: Nested | None = None
    decoder: str | None = None

    def __post_init__(self) -> None:
        elements = self.shape[0] * self.shape[1]
        _check("packed", self.packed, ((elements + 1) // 2,), torch.uint8)
        if self.blocksize < 2 or self.blocksize % 2:
            raise ValueError(f"blocksize is {self.blocksize}; expected a positive even number")
        blocks = -(-elements // self.blocksize)
        _check("absmax", self.absmax, (blocks,), torch.float32 if self.nested is None else torch.uint8)
        _check("code", self.code, (16,), torch.float32)
        if self.nested is not None:
            if self.nested.blocksize != NESTED_BLOCKSIZE:
                raise ValueError(
                    f"nested scales share in groups of {self.nested.blocksize}; expected {NESTED_BLOCKSIZE}"
                )
            _check("nested.code", self.nested.code, (256,), torch.float32)
            _check("nested.absmax", self.nested.absmax, (-(-blocks // NESTED_BLOCKSIZE),), torch.float32)
            _check("nested.offset", self.nested.offset, (), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.packed.device

    @property
    def aligned(self) -> bool:
        """Whether no block straddles two rows."""
        return self.shape[1] % self.blocksize == 0


@dataclass(frozen=True, eq=False)
class Weight8bit:
    """A weight [N, K] in int8 with a scale a row, as bitsandbytes stores LLM.int8 (arXiv 2208.07339): CB and SCB.

    Element (n, k) is values[n, k] * scale[n] / 127.

    Attributes:
        values: [N, K] int8, contiguous.
        scale: [N] fp32, the largest magnitude of each row.

    Raises:
        ValueError: sizes or dtypes that do not fit.
    """

    values: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise ValueError(f"values has shape {tuple(self.values.shape)}; expected [N, K]")
        _check("values", self.values, tuple(self.values.shape), torch.int8)
        _check("scale", self.scale, tuple(self.values.shape[:1]), torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.values.device

    @property
    def aligned(self) -> bool:
        """True: a scale belongs to one row."""
        return True


Weight = Weight4bit | Weight8bit
Parts = tuple[tuple[Hashable, ...], tuple[Tensor | None, ...]]


def parts_of_4bit(weight: Weight4bit) -> Parts:
    """All that a weight consists of: constants, and tensors."""
    nested = weight.nested
    fine = (None, None, None) if nested is None else (nested.code, nested.absmax, nested.offset)
    return (weight.blocksize, weight.shape, weight.decoder), (weight.packed, weight.absmax, weight.code, *fine)


def parts_of_8bit(weight: Weight8bit) -> Parts:
    """The same."""
    return (), (weight.values, weight.scale)


@dataclass(frozen=True, eq=False)
class Lora:
    """A trained low-rank term beside a frozen weight: scaling * dropout(x) a^T b^T (arXiv 2106.09685, eq. 3).

    Attributes:
        a: [r, K], floating point.
        b: [N, r], floating point, in the dtype of `a`.
        scaling: alpha / r, or whatever else.
        dropout_p: probability with which elements of x are zeroed for this term only; pass 0 in evaluation.

    Raises:
        ValueError: sizes or dtypes that do not fit.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout_p: float = 0.0

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.b.shape[1] != self.a.shape[0]:
            raise ValueError(
                f"a has shape {tuple(self.a.shape)} and b {tuple(self.b.shape)}; expected [r, K] and [N, r]"
            )
        if self.a.dtype != self.b.dtype or not self.a.is_floating_point():
            raise ValueError(f"a is {self.a.dtype} and b {self.b.dtype}; expected one floating-point dtype")
        if not 0.0 <= self.dropout_p <= 1.0:
            raise ValueError(f"dropout_p must lie in [0, 1], but is {self.dropout_p}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {list(tensor.shape)} of {tensor.dtype}{'' if tensor.is_contiguous() else ', with gaps'}; "
            f"expected {list(shape)} of {dtype}, contiguous"
        )

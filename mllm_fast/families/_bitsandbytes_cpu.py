"""bitsandbytes' code for CPUs: what dequantises its two maps, and its fused 4-bit kernel where there is AVX512-BF16.

The fused kernel wants the weight in a layout of its own. bitsandbytes packs the weight anew in place, rounding its scales
to bf16, so that gradients and checkpoints go wrong afterwards. Here the weight stays what it is, and the kernel gets a
private copy, 4.25 bits a parameter at blocks of 64, while the layer only infers a few rows at a time. (4096 x 4096,
blocks of 64, one Zen 5 core: 0.3 ms for 1 row, 1.7 for 16; decoding and multiplying takes 3.3 and 4.1 ms.)
"""

from __future__ import annotations

from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor

from ..kernels.quantized_linear import Weight4bit
from ..kernels.quantized_linear.decode import Decoder, register_decoder, scales

# Output features that the fused kernel takes together.
COLUMNS = 32
# From this block size on, bitsandbytes' AVX512 code is inexact by its own account.
INEXACT_BLOCKSIZE = 2048


def _decoder(quant_type: str) -> Decoder:
    def decode(packed: Tensor, absmax: Tensor, blocksize: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # In fp64 it would return memory that nothing was written to.
        own = torch.float32 if dtype == torch.float64 else dtype
        return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, own).to(dtype)

    return decode


for _type in ("nf4", "fp4"):
    register_decoder(f"bitsandbytes {_type}", _decoder(_type))


def decoder_name(code: Tensor, quant_type: str, blocksize: int) -> str | None:
    """What dequantises a weight with this map on the CPU: bitsandbytes, where the map is one of the two that it has
    built in; a checkpoint may bring another.
    """
    if code.device.type != "cpu" or quant_type not in ("nf4", "fp4") or blocksize >= INEXACT_BLOCKSIZE:
        return None
    known = bnb.functional.get_4bit_type(quant_type, device="cpu")
    return f"bitsandbytes {quant_type}" if torch.equal(known, code) else None


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """A 4-bit weight [N, K] in the layout of bitsandbytes' CPU kernel.

    Attributes:
        packed: [N, K / 2] uint8: of each 32 output features, the codes of one input pair lie side by side.
        absmax: [K / blocksize, N] bf16.
        code: [16] fp32, by which the kernel tells FP4 from NF4.
        blocksize: input features that share a scale.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int


def cpu_weight(weight: Weight4bit) -> CpuWeight | None:
    """`weight` as the kernel wants it; None where the CPU, the shape or the map of codes is none of its own."""
    rows, columns = weight.shape
    if weight.decoder is None or rows % COLUMNS or not weight.aligned or not bnb.functional.has_avx512bf16():
        return None
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), -1)
    groups = codes.view(rows // COLUMNS, COLUMNS, columns // 2, 2).transpose(1, 2).reshape(-1, 2 * COLUMNS)
    packed = (groups[:, COLUMNS:] << 4) | groups[:, :COLUMNS]
    absmax = scales(weight).view(rows, columns // weight.blocksize).T.to(torch.bfloat16).contiguous()
    return CpuWeight(packed.view(rows, columns // 2), absmax, weight.code, weight.blocksize)


def cpu_linear(x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
    """x W^T + b, without a gradient: x [..., K] bf16 -> [..., N] bf16."""
    rows = x.reshape(-1, x.shape[-1])
    shape = [weight.packed.shape[0], x.shape[-1]]
    y = torch.ops.bitsandbytes.gemv_4bit(
        rows.contiguous(), weight.packed, shape, weight.absmax, weight.code, weight.blocksize
    )
    if bias is not None:
        y += bias.to(y.dtype)
    return y.view(*x.shape[:-1], shape[0])


def unpacked(packed: Tensor, state: bnb.functional.QuantState) -> tuple[Tensor, bnb.functional.QuantState]:
    """Undo what bitsandbytes' CPU inference did to a weight and its state: the codes exactly, the scales as bf16 left them.

    bitsandbytes' own inverse leaves plain scales transposed, and quantises nested ones anew from their rounded values.
    They come back plain here.
    """
    rows, columns = state.shape
    groups = packed.view(-1, COLUMNS)
    codes = torch.cat((groups & 15, groups >> 4), -1).view(rows // COLUMNS, columns // 2, COLUMNS, 2)
    codes = codes.transpose(1, 2).reshape(-1, 2)
    data = ((codes[:, 0] << 4) | codes[:, 1]).view(torch.uint8).reshape(state.original_qshape)
    storage = getattr(state, "original_storage_type", None)
    restored = bnb.functional.QuantState(
        absmax=state.absmax.T.reshape(-1).float(),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.original_dtype,
    )
    return data if storage is None else data.view(storage), restored

"""4-bit codes to numbers in plain PyTorch, a piece at a time.

A byte holds two codes, so a table of 256 pairs of numbers decodes it in one look-up. `torch.gather` makes the look-ups
on all cores where rows are many, and moves a pair of fp32 numbers fastest as the bits of one fp64 (4096 x 4096 on two
Zen 5 cores: gather 1.3 ms, 1.6 ms with int64 entries, `index_select` 2.9 ms, on one core whatever their number; `take`
4.5 ms).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .weights import Weight4bit

Decoder = Callable[[Tensor, Tensor, int, tuple[int, int], torch.dtype], Tensor]

# Elements decoded at a time: small enough for a core's own cache.
STEP = 1 << 18

_decoders: dict[str, Decoder] = {}


def register_decoder(name: str, decoder: Decoder) -> None:
    """Let weights with `decoder=name` be decoded by other code than this module's, on CPUs.

    Args:
        name: how weights refer to it.
        decoder: (packed, absmax, blocksize, (rows, K), dtype) -> W [rows, K] in `dtype`, for whole rows of a weight
            with K % blocksize == 0. It gets the bytes of the rows [rows * K / 2] uint8 and their scales
            [rows * K / blocksize] fp32, contiguous, and has to give, bit for bit, what `dequantize` gives.
    """
    _decoders[name] = decoder


def scales(weight: Weight4bit) -> Tensor:
    """The scale of each block, [blocks] fp32."""
    nested = weight.nested
    if nested is None:
        return weight.absmax
    coarse = nested.absmax[:, None].expand(-1, nested.blocksize).reshape(-1)[: weight.absmax.numel()]
    return nested.code.index_select(0, weight.absmax.int()).mul_(coarse).add_(nested.offset)


class Panels4bit:
    """Parts of a 4-bit weight, in `dtype`: code times scale in fp32, rounded once.

    What a call returns is valid until the next call, which may write over it.
    """

    def __init__(self, weight: Weight4bit, dtype: torch.dtype, most: int) -> None:
        """`most`: elements of the largest part that will be asked for."""
        self.weight, self.dtype = weight, dtype
        self.scales = scales(weight)
        device = weight.device
        nibbles = torch.arange(256, device=device)
        nibbles = torch.stack((nibbles >> 4, nibbles & 15), 1)
        self.pairs = weight.code[nibbles].view(torch.float64).flatten()
        self.decoder = _decoders.get(weight.decoder or "") if weight.aligned and weight.device.type == "cpu" else None
        self.most = most
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def _buffer(self, elements: int) -> Tensor:
        """Room for a part of so many elements."""
        if self._buffers is None:
            step = min(self.most, _step(self.weight)) + 2
            device = self.weight.device
            self._buffers = (
                torch.empty(self.most, dtype=self.dtype, device=device),
                torch.empty(step // 2, dtype=torch.int64, device=device),
                torch.empty(step, device=device),
            )
        return self._buffers[0][:elements]

    def rows(self, first: int, last: int) -> Tensor:
        """W[first:last], where row `first` starts a block."""
        weight = self.weight
        columns = weight.shape[1]
        begin, end = first * columns, last * columns
        if self.decoder is not None:
            blocks = self.scales[begin // weight.blocksize : end // weight.blocksize]
            packed = weight.packed[begin // 2 : end // 2]
            return self.decoder(packed, blocks, weight.blocksize, (last - first, columns), self.dtype)
        out, step = self._buffer(end - begin), _step(weight)
        for start in range(begin, end, step):
            stop = min(start + step, end)
            blocks = self.scales[start // weight.blocksize : -(-stop // weight.blocksize)]
            self._decode(weight.packed[start // 2 : (stop + 1) // 2], blocks, out[start - begin : stop - begin])
        return out.view(last - first, columns)

    def columns(self, first: int, last: int) -> Tensor:
        """W[:, first:last] of an aligned weight, where `first` and `last` are multiples of the block size."""
        weight = self.weight
        rows, columns = weight.shape
        packed = weight.packed.view(rows, columns // 2)[:, first // 2 : last // 2]
        blocks = self.scales.view(rows, -1)[:, first // weight.blocksize : last // weight.blocksize]
        if self.decoder is not None:  # whole blocks of each row, put together, are a weight of their own
            packed, blocks = packed.contiguous().flatten(), blocks.contiguous().flatten()
            return self.decoder(packed, blocks, weight.blocksize, (rows, last - first), self.dtype)
        out = self._buffer(rows * (last - first)).view(rows, last - first)
        step = max(1, _step(weight) // (last - first))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            self._decode(packed[part], blocks[part].flatten(), out[part].view(-1))
        return out

    def _decode(self, packed: Tensor, blocks: Tensor, out: Tensor) -> None:
        """The elements `out` [n] of the bytes `packed` of any shape, with the scales of their blocks [ceil(n / b)]."""
        count, elements, blocksize = packed.numel(), out.numel(), self.weight.blocksize
        assert self._buffers is not None
        _, index, values = self._buffers
        index = index[:count]
        index.view(packed.shape).copy_(packed)
        in_place = out.dtype == torch.float32 and 2 * count == elements
        values = out if in_place else values[: 2 * count]
        groups = min(64, count & -count)
        pairs = values.view(torch.float64).view(groups, -1)
        torch.gather(self.pairs.expand(groups, -1), 1, index.view(groups, -1), out=pairs)
        whole = elements // blocksize
        values[: whole * blocksize].view(-1, blocksize).mul_(blocks[:whole, None])
        if whole < blocks.numel():
            values[whole * blocksize : elements].mul_(blocks[whole])
        if not in_place:
            out.copy_(values[:elements])


def _step(weight: Weight4bit) -> int:
    return max(weight.blocksize, STEP - STEP % weight.blocksize)

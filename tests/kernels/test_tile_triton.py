"""The tile maths that kernels share; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from mllm_fast.kernels.tile import bits_below, load_rows, lowest_bit, split_width, store_rows
from tests.kernels.triton_device import DEVICE, require_triton

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

require_triton()


@triton.jit
def _lowest_bits(WORDS, OUT):
    i = tl.program_id(0)
    tl.store(OUT + i, lowest_bit(tl.load(WORDS + i)))


@triton.jit
def _bits_below(COUNTS, OUT, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(OUT + o_n, bits_below(tl.load(COUNTS + o_n)))


@triton.jit
def _copy(X, OUT, rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BR: tl.constexpr):
    o_r = tl.arange(0, BR)
    m_r = o_r < rows
    store_rows(OUT, o_r * D, m_r, load_rows(X, o_r * D, m_r, 0, D0, D), 0, D0, D)
    if D1 > 0:
        store_rows(OUT, o_r * D, m_r, load_rows(X, o_r * D, m_r, D0, D1, D), D0, D1, D)


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def test_lowest_bit() -> None:
    words = [1 << i | rest << i + 1 for i in range(64) for rest in (0, 0b1011)]
    words = [word % (1 << 64) for word in words]
    given = torch.tensor([signed(word) for word in words], device=DEVICE)
    out = torch.empty(len(words), dtype=torch.int32, device=DEVICE)
    _lowest_bits[(len(words),)](given, out)
    assert out.tolist() == [(word & -word).bit_length() - 1 for word in words]


def test_bits_below() -> None:
    counts = torch.arange(-20, 108, dtype=torch.int32, device=DEVICE)
    out = torch.empty(128, dtype=torch.int64, device=DEVICE)
    _bits_below[(1,)](counts, out, N=128)
    assert out.tolist() == [signed((1 << max(0, min(64, n))) - 1) for n in counts.tolist()]


@pytest.mark.parametrize("width", [1, 8, 24, 64, 72, 80, 88, 96, 100, 256])
def test_rows_in_two_blocks(width: int) -> None:
    first, second = split_width(width)
    x = torch.randn(5, width, device=DEVICE)
    out = torch.full((6, width), -1.0, device=DEVICE)
    _copy[(1,)](x, out, 5, D=width, D0=first, D1=second, BR=8)
    assert torch.equal(out[:5], x)
    assert (out[5] == -1).all()


@pytest.mark.parametrize(
    ("width", "blocks"),
    [(8, (16, 0)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (88, (64, 32)), (96, (64, 32)), (112, (128, 0))],
)
def test_split_width(width: int, blocks: tuple[int, int]) -> None:
    assert split_width(width) == blocks


def test_split_width_covers_all() -> None:
    for width in range(1, 300):
        first, second = split_width(width)
        assert first + second >= width
        assert all(x == 0 or (x >= 16 and x & (x - 1) == 0) for x in (first, second))
        assert first + second < 2 * width or width <= 16

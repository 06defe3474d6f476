"""Kernels that take one element at a time: dequantisation, for what goes to the vendor's GEMM, and dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import kept
from .triton_codes import INV_127, code_table, lookup


@triton.jit(do_not_specialize=("start", "elements"))
def dequantize_4bit(
    PACKED,  # [.] uint8
    SCALE,  # [.] fp32, not nested
    CODE,  # [16] fp32
    OUT,  # [elements]
    start,  # the first element, the first of a block
    elements,
    BLOCK: tl.constexpr,
    B: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """Elements `start` to `start + elements` of the flattened weight; grid: (bytes / B). Bit for bit as on CPUs."""
    table = code_table(CODE, tl.float32, LOOKUP)
    o_byte = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    first = start.to(tl.int64)
    b_byte = tl.load(PACKED + first // 2 + o_byte, mask=2 * o_byte < elements, other=0).to(tl.int32)
    b_scale = tl.load(SCALE + (first + 2 * o_byte) // BLOCK, mask=2 * o_byte < elements, other=0.0)
    b_even = lookup(table, b_byte >> 4, LOOKUP) * b_scale
    b_odd = lookup(table, b_byte & 15, LOOKUP) * b_scale
    b_out = tl.reshape(tl.join(b_even, b_odd), [2 * B]).to(OUT.dtype.element_ty)
    o_out = tl.program_id(0).to(tl.int64) * (2 * B) + tl.arange(0, 2 * B)
    tl.store(OUT + o_out, b_out, mask=o_out < elements)


@triton.jit(do_not_specialize=("rows",))
def dequantize_8bit(
    VALUES,  # [rows, K] int8
    SCALE,  # [rows] fp32
    OUT,  # [rows, K]
    rows,
    K,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Code times scale in fp32, rounded once; grid: (row tiles * column tiles)."""
    tiles = tl.cdiv(K, BK)
    o_row = (tl.program_id(0) // tiles) * BM + tl.arange(0, BM)
    o_k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    m_tile = (o_row < rows)[:, None] & (o_k < K)[None, :]
    o_tile = o_row.to(tl.int64)[:, None] * K + o_k[None, :]
    b_scale = tl.load(SCALE + o_row, mask=o_row < rows, other=0.0)
    b_value = tl.load(VALUES + o_tile, mask=m_tile, other=0).to(tl.float32) * b_scale[:, None] * INV_127
    tl.store(OUT + o_tile, b_value.to(OUT.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=("rows", "seed"))
def drop(
    X,  # [rows, K]
    OUT,  # [rows, K]
    rows,
    K,
    s_x,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """dropout(x), whose pattern `finish` knows how to repeat; grid: (row tiles * column tiles)."""
    tiles = tl.cdiv(K, BK)
    o_row = (tl.program_id(0) // tiles) * BM + tl.arange(0, BM)
    o_k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    m_tile = (o_row < rows)[:, None] & (o_k < K)[None, :]
    b_x = tl.load(X + o_row.to(tl.int64)[:, None] * s_x + o_k[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_x = tl.where(kept(seed, dropout_p, o_row, o_k), b_x * keep_scale, 0.0)
    tl.store(OUT + o_row.to(tl.int64)[:, None] * K + o_k[None, :], b_x.to(OUT.dtype.element_ty), mask=m_tile)

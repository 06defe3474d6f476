"""From packed weights to tiles of numbers: table look-ups, scales, and the order of nibbles in a word.

A 4-bit weight is read in words of 32 bits: bytes would have to be packed into registers again. Element 0 of a word is the
high nibble of its lowest byte, element 1 the low one, and so on.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _prmt(scaled: str) -> str:
    """PTX: the eight codes of word $4 through a table of 16-bit numbers, as four pairs in $0 to $3.

    PRMT picks four of eight bytes by four selectors of three bits; a nibble without its top bit is such a selector. The
    table lies in registers as bytes: low bytes of entries 0-3, 4-7, 8-11, 12-15 in $5 to $8, high bytes in $9 to $12.
    The top bits, as a mask, choose between the lower and the upper half of the table. 23 instructions for 8 codes.

    Args:
        scaled: "" or the type ("bf16", "f16"): then each number is multiplied with the fp32 number $13, in fp32.
    """

    def half(selectors: str, tops: str, first: str, second: str) -> str:
        lines = f"""
        prmt.b32 m, 0xff00, 0, {tops};
        prmt.b32 a, $5, $6, {selectors}; prmt.b32 b, $7, $8, {selectors}; lop3.b32 lo, a, b, m, 0xd8;
        prmt.b32 a, $9, $10, {selectors}; prmt.b32 b, $11, $12, {selectors}; lop3.b32 hi, a, b, m, 0xd8;
        prmt.b32 {first}, lo, hi, 0x4051; prmt.b32 {second}, lo, hi, 0x6273;"""
        return lines + (scale(first) + scale(second) if scaled else "")

    def scale(pair: str) -> str:
        if scaled == "bf16":
            widen = f"shl.b32 a, {pair}, 16; mov.b32 x, a; and.b32 a, {pair}, 0xffff0000; mov.b32 y, a;"
        else:
            widen = f"mov.b32 {{l, h}}, {pair}; cvt.f32.f16 x, l; cvt.f32.f16 y, h;"
        return f"""
        {widen} mul.f32 x, x, $13; mul.f32 y, y, $13; cvt.rn.{scaled}x2.f32 {pair}, y, x;"""

    return f"""{{
        .reg .b32 s, sh, t, th, m, a, b, lo, hi; .reg .f32 x, y; .reg .b16 l, h;
        and.b32 s, $4, 0x77777777; shr.u32 sh, s, 16;
        shr.u32 t, $4, 3; and.b32 t, t, 0x11111111; shr.u32 th, t, 16;
        {half("s", "t", "$0", "$1")} {half("sh", "th", "$2", "$3")}
    }}"""


# The reciprocal of 127 as bitsandbytes writes it.
INV_127 = tl.constexpr(7.874015718698502e-3)

PRMT = tl.constexpr(_prmt(""))
PRMT_SCALED_BF16 = tl.constexpr(_prmt("bf16"))
PRMT_SCALED_FP16 = tl.constexpr(_prmt("f16"))
PRMT_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r" + ",r" * 8)
PRMT_SCALED_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r" + ",r" * 8 + ",f")


@triton.jit
def load(p_block, m_block):
    """Numbers, 0 where not m_block; None: everywhere."""
    if m_block is None:
        b_block = tl.load(p_block)
    else:
        b_block = tl.load(p_block, mask=m_block, other=0)
    return b_block


@triton.jit
def _table_bytes(CODE, SHIFT: tl.constexpr, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """Byte SHIFT / 8 of entries FIRST to FIRST + 3 of the table as 16-bit numbers, in one word."""
    word = tl.full([], 0, tl.uint32)
    for j in tl.static_range(4):
        entry = tl.load(CODE + FIRST + j).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
        word |= ((entry >> SHIFT) & 0xFF) << (8 * j)
    return word


@triton.jit
def code_table(CODE, DTYPE: tl.constexpr, LOOKUP: tl.constexpr):
    """What `decode` needs of the map [16] fp32: eight words for "prmt", the entries for the others."""
    if LOOKUP == "prmt":
        table = (
            _table_bytes(CODE, 0, 0, DTYPE), _table_bytes(CODE, 0, 4, DTYPE),
            _table_bytes(CODE, 0, 8, DTYPE), _table_bytes(CODE, 0, 12, DTYPE),
            _table_bytes(CODE, 8, 0, DTYPE), _table_bytes(CODE, 8, 4, DTYPE),
            _table_bytes(CODE, 8, 8, DTYPE), _table_bytes(CODE, 8, 12, DTYPE),
        )  # fmt: skip
    elif LOOKUP == "gather":
        table = tl.load(CODE + tl.arange(0, 16))
    else:
        table = CODE
    return table


@triton.jit
def _pick(b_odd, CODE, FIRST: tl.constexpr):
    """Entry FIRST + 1 where b_odd, else FIRST."""
    return tl.where(b_odd, tl.load(CODE + FIRST + 1), tl.load(CODE + FIRST))


@triton.jit
def lookup(table, b_index, LOOKUP: tl.constexpr):
    """The fp32 entries at b_index, int32 from 0 to 15."""
    if LOOKUP == "gather":
        b_value = tl.reshape(tl.gather(table, tl.ravel(b_index), 0), b_index.shape)
    else:
        b_1, b_2, b_4 = (b_index & 1) != 0, (b_index & 2) != 0, (b_index & 4) != 0
        b_00 = tl.where(b_2, _pick(b_1, table, 2), _pick(b_1, table, 0))
        b_01 = tl.where(b_2, _pick(b_1, table, 6), _pick(b_1, table, 4))
        b_10 = tl.where(b_2, _pick(b_1, table, 10), _pick(b_1, table, 8))
        b_11 = tl.where(b_2, _pick(b_1, table, 14), _pick(b_1, table, 12))
        b_value = tl.where((b_index & 8) != 0, tl.where(b_4, b_11, b_10), tl.where(b_4, b_01, b_00))
    return b_value


@triton.jit
def _nibble(table, b_words, b_scale, J: tl.constexpr, LOOKUP: tl.constexpr):
    """Element J of each word, in fp32."""
    b_value = lookup(table, (b_words >> (4 * (J ^ 1))) & 15, LOOKUP)
    if b_scale is not None:
        b_value *= b_scale
    return b_value


@triton.jit
def _halves(b_pairs):
    """The lower and the upper 16 bits of words."""
    return (b_pairs & 0xFFFF).to(tl.uint16), (b_pairs >> 16).to(tl.uint16)


@triton.jit
def decode(table, b_words, b_scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
           LOOKUP: tl.constexpr):  # fmt: skip
    """The codes of int32 words [ROWS, COLUMNS / 8] as numbers [ROWS, COLUMNS] in DTYPE.

    b_scale: [ROWS, 1] or [ROWS, COLUMNS / 8] fp32, with which they are multiplied, in fp32; None: they are not.
    """
    if LOOKUP == "prmt":
        t = table
        if b_scale is None:
            b_0, b_1, b_2, b_3 = tl.inline_asm_elementwise(
                PRMT, PRMT_CONSTRAINTS, [b_words, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]],
                dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
            )  # fmt: skip
        elif DTYPE.is_bf16():
            b_0, b_1, b_2, b_3 = tl.inline_asm_elementwise(
                PRMT_SCALED_BF16, PRMT_SCALED_CONSTRAINTS,
                [b_words, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], b_scale],
                dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            b_0, b_1, b_2, b_3 = tl.inline_asm_elementwise(
                PRMT_SCALED_FP16, PRMT_SCALED_CONSTRAINTS,
                [b_words, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], b_scale],
                dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
            )  # fmt: skip
        # tl.join appends the dimension that runs fastest.
        b_pairs = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [ROWS, COLUMNS // 2])
        b_low, b_high = _halves(b_pairs)
        # Numbers only after the reshape: Triton 3.6 would give the operand of a dot the shared-memory layout of what is
        # reshaped, and fails where that does not exist.
        b_tile = tl.reshape(tl.join(b_low, b_high), [ROWS, COLUMNS]).to(DTYPE, bitcast=True)
    else:
        b_04 = tl.join(_nibble(table, b_words, b_scale, 0, LOOKUP), _nibble(table, b_words, b_scale, 4, LOOKUP))
        b_26 = tl.join(_nibble(table, b_words, b_scale, 2, LOOKUP), _nibble(table, b_words, b_scale, 6, LOOKUP))
        b_15 = tl.join(_nibble(table, b_words, b_scale, 1, LOOKUP), _nibble(table, b_words, b_scale, 5, LOOKUP))
        b_37 = tl.join(_nibble(table, b_words, b_scale, 3, LOOKUP), _nibble(table, b_words, b_scale, 7, LOOKUP))
        b_tile = tl.reshape(tl.join(tl.join(b_04, b_26), tl.join(b_15, b_37)), [ROWS, COLUMNS]).to(DTYPE)
    return b_tile


@triton.jit
def block_scales(SCALE, NESTED_CODE, NESTED_ABSMAX, offset, o_block, m_block):
    """The fp32 scales of the blocks o_block; 0 where not m_block (None: all are)."""
    b_scale = load(SCALE + o_block, m_block)
    if NESTED_CODE is not None:
        b_coarse = load(NESTED_ABSMAX + (o_block >> 8), m_block)
        b_scale = tl.load(NESTED_CODE + b_scale.to(tl.int32)) * b_coarse + offset
    return b_scale

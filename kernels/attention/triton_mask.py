"""How the attention kernels number query rows, and what each row may see.

A program works on a tile of *packed* rows. All rows of a *cluster* read the same key row and key head: the `group`
query heads of one key head and, where they are few, the queries of the `pack` batch rows that share the key row. Packed
row r of cluster c is head r % group, query r // group % queries, batch row c * pack + r // (group * queries). Heads of
one query lie side by side, so that a tile spans few queries and the union of what they see is small.

Key lengths and causal limits are one number a row: it sees the keys below `end`. Media visibility is one word of 64 bits
a row for each 64 images.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import bits_below

# Numbers that change from call to call, and whose value (1, a multiple of 16) no kernel gains from: they must not lead
# to a compilation of their own. The group is not one of them: without grouped heads, 1 saves every row a division.
UNSPECIALIZED = (
    "batch", "queries", "keys", "extra_keys", "key_base", "key_rows", "pack", "fold", "row_parts", "tile_parts", "prefix",
    "images", "tokens", "seed",
)  # fmt: skip


@triton.jit
def packed_rows(i_tile, i_cluster, queries, group, pack, BM: tl.constexpr):
    """(batch row [BM] int64, query [BM], head in the group [BM], whether the row exists [BM]) of a tile."""
    o_r = i_tile * BM + tl.arange(0, BM)
    o_g = o_r % group
    o_i = (o_r // group) % queries
    o_b = i_cluster * pack + o_r // (group * queries)
    return o_b, o_i, o_g, o_r < pack * queries * group


@triton.jit
def row_ends(KEY_LENGTHS, o_b, o_i, m_r, queries, keys, prefix, CAUSAL: tl.constexpr):
    """[BM] int32: the row sees no key at or past this one; 0 for rows that do not exist."""
    b_end = o_i * 0 + keys
    if KEY_LENGTHS is not None:
        b_length = tl.load(KEY_LENGTHS + o_b, mask=m_r, other=0).to(tl.int32)
        b_end = tl.minimum(b_end, b_length)
    if CAUSAL:
        b_end = tl.minimum(b_end, tl.maximum(o_i + 1 + keys - queries, prefix))
    return tl.where(m_r, tl.maximum(b_end, 0), 0)


@triton.jit
def uniform_rows(FIRST, LAST, o_b, o_i, m_r, s_mb, s_ml, images):
    """[BM] bool: rows with a non-empty range wholly past the last image (`MediaRanges.beyond` "mean")."""
    o_m = o_b * s_mb + o_i * s_ml
    b_first = tl.load(FIRST + o_m, mask=m_r, other=0).to(tl.int32)
    b_last = tl.load(LAST + o_m, mask=m_r, other=0).to(tl.int32)
    return m_r & (b_first >= images) & (b_first < b_last)


@triton.jit
def row_words(FIRST, LAST, WORDS, o_b, o_i, m_r, i_w, s_mb, s_ml):
    """[BM] int64: bit j set where the row sees image 64 * i_w + j. Bits of images that do not exist may be set."""
    o_m = o_b * s_mb + o_i * s_ml
    if WORDS is not None:
        b_word = tl.load(WORDS + o_m + i_w, mask=m_r, other=0)
    else:
        b_first = tl.load(FIRST + o_m, mask=m_r, other=0).to(tl.int32)
        b_last = tl.load(LAST + o_m, mask=m_r, other=0).to(tl.int32)
        b_word = bits_below(b_last - 64 * i_w) & ~bits_below(b_first - 64 * i_w)
    return b_word


@triton.jit
def any_row(b_word):
    """[64] int64 of 0 and 1: the bits that are set in some row."""
    return tl.max((b_word[:, None] >> tl.arange(0, 64)[None, :]) & 1, 0)


@triton.jit
def tiles_of_image(
    FIRST, LAST, WORDS, i_b, image, i_chunk, s_mb, s_ml, queries, group, images, UNIFORM: tl.constexpr, BM: tl.constexpr
):
    """[64] int64 of 0 and 1: which of the tiles 64 * i_chunk + [0, 64) of batch row i_b have a row that sees the image.

    Many tiles at a time: one after another would wait for memory at each.
    """
    o_r = (64 * i_chunk + tl.arange(0, 64))[:, None] * BM + tl.arange(0, BM)[None, :]  # [64, BM]
    m_r = o_r < queries * group
    o_i = o_r // group
    o_b = i_b + o_r * 0
    b_sees = sees_image(row_words(FIRST, LAST, WORDS, o_b, o_i, m_r, image // 64, s_mb, s_ml), image % 64)
    if UNIFORM:
        b_sees = b_sees | uniform_rows(FIRST, LAST, o_b, o_i, m_r, s_mb, s_ml, images)
    return tl.max((b_sees & m_r).to(tl.int64), 1)


@triton.jit
def sees_image(b_word, bit):
    """[BM] bool: the row sees the image of that bit."""
    return ((b_word >> bit) & 1) == 1

"""The kernel that goes over the query rows of a block of keys: dK and dV.

For dS as in `triton_rows`, dV = P^T dO and dK = dS^T Q * scale. Everything is computed transposed ([keys, rows]), so
that no operand of a dot is a transposed result. A program owns its keys: it goes over all batch rows that read
them, in order, and over all heads of the group, so that no sum depends on timing. Where that makes too few programs, each
goes over a part of the rows, and the parts are added in a second pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import kept, load_rows, lowest_bit, store_rows, to_base_2
from .triton_mask import UNSPECIALIZED, packed_rows, row_ends, row_words, sees_image, tiles_of_image, uniform_rows


@triton.jit
def _step(
    b_dk0,
    b_dk1,
    b_dv0,
    b_dv1,
    b_k0,
    b_k1,
    b_v0,
    b_v1,
    i_tile,
    i_b,
    i_h,
    Q,
    GRAD,
    LSE,
    DELTA,
    KEY_LENGTHS,
    FIRST,
    LAST,
    WORDS,
    o_n,
    m_n,
    m_b,
    image,
    s_qb,
    s_ql,
    s_qh,
    s_gb,
    s_gl,
    s_gh,
    s_mb,
    s_ml,
    queries,
    keys,
    key_base,
    key_heads,
    group,
    prefix,
    images,
    scale2,
    dropout_p,
    keep_scale,
    seed,
    CAUSAL: tl.constexpr,
    UNIFORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    IMAGE_WORDS: tl.constexpr,
    EIGHTS: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows of batch row i_b; of the keys o_n [BN], m_n exist, and m_b are not padding."""
    o_b, o_i, o_g, m_r = packed_rows(i_tile, i_b, queries, group, 1, BM)
    o_h = i_h * group + o_g  # [BM]
    m_s = m_b[:, None] & m_r[None, :]  # [BN, BM]: who sees what
    if CAUSAL or KEY_LENGTHS is not None:
        b_end = row_ends(KEY_LENGTHS, o_b, o_i, m_r, queries, keys, prefix, CAUSAL)  # [BM]
        m_s = m_s & (o_n[:, None] < b_end[None, :])
    b_uniform = None
    if IMAGE_WORDS > 0:
        b_word = row_words(FIRST, LAST, WORDS, o_b, o_i, m_r, image // 64, s_mb, s_ml)
        m_s = m_s & sees_image(b_word, image % 64)[None, :]
        if UNIFORM:
            b_uniform = uniform_rows(FIRST, LAST, o_b, o_i, m_r, s_mb, s_ml, images)  # [BM]
            m_s = m_s | (b_uniform[None, :] & m_n[:, None])
    o_qh, o_gh = o_h * s_qh, o_h * s_gh
    if EIGHTS:
        o_qh, o_gh = tl.multiple_of(o_qh, [8]), tl.multiple_of(o_gh, [8])
    o_q = o_b * s_qb + o_i * s_ql + o_qh
    o_grad = o_b * s_gb + o_i * s_gl + o_gh
    o_row = (o_b * queries + o_i) * (key_heads * group) + o_h
    b_lse = to_base_2(tl.load(LSE + o_row, mask=m_r, other=float("-inf")))  # [BM]
    b_delta = tl.load(DELTA + o_row, mask=m_r, other=0.0)
    # Rows that see nothing are not read: what they hold must not reach a gradient, NaN included.
    m_r = m_r & (b_lse > float("-inf"))
    b_lse = tl.where(m_r, b_lse, 0.0)
    m_q = m_r
    if b_uniform is not None:
        m_q = m_r & ~b_uniform
    b_q0 = load_rows(Q, o_q, m_q, 0, D0, D)  # [BM, D0]
    b_g0 = load_rows(GRAD, o_grad, m_r, 0, D0, D)
    b_s = tl.dot(b_k0, tl.trans(b_q0), input_precision=PRECISION)  # [BN, BM]
    b_dp = tl.dot(b_v0, tl.trans(b_g0), input_precision=PRECISION)
    if D1 > 0:
        b_q1 = load_rows(Q, o_q, m_q, D0, D1, D)  # [BM, D1]
        b_g1 = load_rows(GRAD, o_grad, m_r, D0, D1, D)
        b_s = tl.dot(b_k1, tl.trans(b_q1), b_s, input_precision=PRECISION)
        b_dp = tl.dot(b_v1, tl.trans(b_g1), b_dp, input_precision=PRECISION)
    b_s = b_s * scale2
    if b_uniform is not None:
        b_s = tl.where(b_uniform[None, :], 0.0, b_s)
    m_s = m_s & m_r[None, :]
    b_p = tl.where(m_s, tl.exp2(b_s - b_lse[None, :]), 0.0)
    b_dropped = b_p
    if DROPOUT:
        b_kept = kept(seed, dropout_p, o_row.to(tl.int32), (key_base + o_n).to(tl.int32))  # [BM, BN]
        b_factor = tl.trans(tl.where(b_kept, keep_scale, 0.0))
        b_dropped = b_p * b_factor
        b_dp = b_dp * b_factor
    b_dropped = b_dropped.to(b_g0.dtype)
    b_ds = tl.where(m_s, b_p * (b_dp - b_delta[None, :]), 0.0)
    if b_uniform is not None:
        b_ds = tl.where(b_uniform[None, :], 0.0, b_ds)
    b_ds = b_ds.to(b_q0.dtype)
    b_dv0 = tl.dot(b_dropped, b_g0, b_dv0, input_precision=PRECISION)
    b_dk0 = tl.dot(b_ds, b_q0, b_dk0, input_precision=PRECISION)
    if D1 > 0:
        b_dv1 = tl.dot(b_dropped, b_g1, b_dv1, input_precision=PRECISION)
        b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=PRECISION)
    return b_dk0, b_dk1, b_dv0, b_dv1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_keys(
    Q,
    K,
    V,
    GRAD,
    LSE,  # [B, Lq, H] fp32
    DELTA,  # [B, Lq, H] fp32
    DK,  # [Bk, Lk, Hkv, D] contiguous; with parts, fp32 and s_part apart
    DV,
    KEY_LENGTHS,
    KEY_PADDING,
    FIRST,
    LAST,
    WORDS,
    ROWS,  # batch rows ordered by the key row that they read; None: key row i is read by rows i * fold + [0, fold)
    ROW_STARTS,  # [Bk + 1], with ROWS
    s_qb,
    s_ql,
    s_qh,
    s_kb,
    s_kl,
    s_kh,
    s_vb,
    s_vl,
    s_vh,
    s_gb,
    s_gl,
    s_gh,
    s_mb,
    s_ml,
    s_part,
    queries,
    keys,
    key_base,  # number of the first key in the dropout pattern
    key_rows,
    key_heads,
    group,
    fold,
    row_parts,  # the batch rows that read a key row are split into so many parts,
    tile_parts,  # and the tiles of each into so many; the results are then added
    prefix,
    images,
    tokens,
    scale,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    CAUSAL: tl.constexpr,
    UNIFORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    IMAGE_WORDS: tl.constexpr,  # 64-bit words a row; 0: no media mask
    EIGHTS: tl.constexpr,  # all strides of heads are multiples of 8
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys; grid: (key blocks * key heads * key rows * parts). With media, a block lies within one image."""
    if IMAGE_WORDS > 0:
        image_blocks = tl.cdiv(tokens, BN)
        blocks = images * image_blocks
    else:
        blocks = tl.cdiv(keys, BN)
    i_p = tl.program_id(0)
    i_n = i_p % blocks
    i_h = ((i_p // blocks) % key_heads).to(tl.int64)
    i_kv = ((i_p // (blocks * key_heads)) % key_rows).to(tl.int64)
    i_part = i_p // (blocks * key_heads * key_rows)
    image = 0
    if IMAGE_WORDS > 0:
        image = i_n // image_blocks
        start = image * tokens + (i_n % image_blocks) * BN
        stop = (image + 1) * tokens
    else:
        start = i_n * BN
        stop = keys
    o_n = start + tl.arange(0, BN)
    m_n = o_n < stop

    o_key = o_n.to(tl.int64)
    i_kh, i_vh = i_h * s_kh, i_h * s_vh
    if EIGHTS:
        i_kh, i_vh = tl.multiple_of(i_kh, 8), tl.multiple_of(i_vh, 8)
    p_k, p_v = K + i_kv * s_kb + i_kh, V + i_kv * s_vb + i_vh
    b_k0 = load_rows(p_k, o_key * s_kl, m_n, 0, D0, D)  # [BN, D0]
    b_v0 = load_rows(p_v, o_key * s_vl, m_n, 0, D0, D)
    b_k1, b_v1 = b_k0, b_v0
    b_dk0 = tl.zeros([BN, D0], tl.float32)
    b_dv0 = tl.zeros([BN, D0], tl.float32)
    b_dk1, b_dv1 = m_n, m_n
    if D1 > 0:
        b_k1 = load_rows(p_k, o_key * s_kl, m_n, D0, D1, D)  # [BN, D1]
        b_v1 = load_rows(p_v, o_key * s_vl, m_n, D0, D1, D)
        b_dk1 = tl.zeros([BN, D1], tl.float32)
        b_dv1 = tl.zeros([BN, D1], tl.float32)
    scale2 = to_base_2(scale)

    if ROWS is not None:
        i_first = tl.load(ROW_STARTS + i_kv)
        i_end = tl.load(ROW_STARTS + i_kv + 1)
    else:
        i_first = i_kv * fold
        i_end = i_first + fold
    i_row_part, i_tile_part = i_part % row_parts, i_part // row_parts
    number = i_end - i_first
    i_end = i_first + number * (i_row_part + 1) // row_parts
    i_first = i_first + number * i_row_part // row_parts
    all_tiles = tl.cdiv(queries * group, BM)
    first_tile = all_tiles * i_tile_part // tile_parts
    end_tile = all_tiles * (i_tile_part + 1) // tile_parts
    if CAUSAL and not UNIFORM:
        # Query i sees keys up to i + keys - queries, and the prefix.
        first_query = tl.maximum(start - keys + queries, 0)
        first_tile = tl.maximum(first_tile, tl.where(start < prefix, 0, first_query * group // BM))
    for i_c in range(i_first, i_end):
        i_b = i_kv * 0 + i_c
        if ROWS is not None:
            i_b = tl.load(ROWS + i_c).to(tl.int64)
        m_b = m_n
        begin = first_tile
        tiles = end_tile
        if KEY_LENGTHS is not None and not UNIFORM:
            tiles = tl.where(start < tl.load(KEY_LENGTHS + i_b), tiles, 0)
        if KEY_PADDING is not None:
            m_b = m_b & (tl.load(KEY_PADDING + i_b * keys + o_n, mask=m_n, other=0) != 0)
        if IMAGE_WORDS > 0:
            # From set bit to set bit, without a branch in the loop: loads of the next tile can then begin in this one.
            o_t = tl.arange(0, 64)
            for i_chunk in range(begin // 64, tl.cdiv(tiles, 64)):
                b_visit = tiles_of_image(
                    FIRST, LAST, WORDS, i_b, image, i_chunk, s_mb, s_ml, queries, group, images, UNIFORM, BM
                )  # fmt: skip
                b_visit = tl.where((64 * i_chunk + o_t >= begin) & (64 * i_chunk + o_t < tiles), b_visit, 0)
                left = tl.sum(b_visit << o_t, 0)
                for _ in range(tl.sum(b_visit, 0).to(tl.int32)):
                    i_tile = 64 * i_chunk + lowest_bit(left)
                    left = left & (left - 1)
                    b_dk0, b_dk1, b_dv0, b_dv1 = _step(
                        b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, i_tile, i_b, i_h, Q, GRAD, LSE, DELTA,
                        KEY_LENGTHS, FIRST, LAST, WORDS, o_n, m_n, m_b, image, s_qb, s_ql, s_qh, s_gb, s_gl, s_gh,
                        s_mb, s_ml, queries, keys, key_base, key_heads, group, prefix, images, scale2, dropout_p, keep_scale,
                        seed, CAUSAL, UNIFORM, DROPOUT, IMAGE_WORDS, EIGHTS, D, D0, D1, BM, PRECISION,
                    )  # fmt: skip
        else:
            for i_tile in range(begin, tiles):
                b_dk0, b_dk1, b_dv0, b_dv1 = _step(
                    b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, i_tile, i_b, i_h, Q, GRAD, LSE, DELTA,
                    KEY_LENGTHS, FIRST, LAST, WORDS, o_n, m_n, m_b, image, s_qb, s_ql, s_qh, s_gb, s_gl, s_gh,
                    s_mb, s_ml, queries, keys, key_base, key_heads, group, prefix, images, scale2, dropout_p, keep_scale,
                    seed, CAUSAL, UNIFORM, DROPOUT, IMAGE_WORDS, EIGHTS, D, D0, D1, BM, PRECISION,
                )  # fmt: skip

    o_out = i_part.to(tl.int64) * s_part + ((i_kv * keys + o_key) * key_heads + i_h) * D
    store_rows(DK, o_out, m_n, b_dk0 * scale, 0, D0, D)
    store_rows(DV, o_out, m_n, b_dv0, 0, D0, D)
    if D1 > 0:
        store_rows(DK, o_out, m_n, b_dk1 * scale, D0, D1, D)
        store_rows(DV, o_out, m_n, b_dv1, D0, D1, D)

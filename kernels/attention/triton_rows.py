"""The kernel that goes over the keys of a tile of query rows: attention forward (prefill and decode), and dQ.

With the base-2 scores S = Q K^T * scale * log2(e), forward keeps a running maximum m and sum l (online softmax,
arXiv 1805.02867; FlashAttention, arXiv 2205.14135, algorithm 1); backward knows the logsumexp, and with
delta = rowsum(dO * O) sums dS K for dS = P * (dO V^T - delta) (algorithm 4).

Only keys that some row of the tile sees are visited: with media, the tiles' rows are turned into the union of their
images, and the loop steps from set bit to set bit. Ranges that are not monotone, and holes, cost nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile import kept, load_rows, lowest_bit, store_rows, to_base_2, to_base_e
from .triton_mask import UNSPECIALIZED, any_row, packed_rows, row_ends, row_words, sees_image, uniform_rows


@triton.jit
def _step(
    b_x0,
    b_x1,
    b_m,
    b_l,
    b_q0,
    b_q1,
    b_g0,
    b_g1,
    p_k,
    p_v,
    s_kl,
    s_vl,
    o_n,
    m_k,
    m_v,
    m_s,
    b_uniform,
    b_row_id,
    key_base,
    scale2,
    dropout_p,
    keep_scale,
    seed,
    BACKWARD: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys. Forward: b_x is the output, b_m and b_l maximum and sum. Backward: dQ, logsumexp, delta.

    m_k and m_v [BN] are the keys whose K and V somebody sees, and m_s [BM, BN] who sees what; None: everything.
    """
    o_n = o_n.to(tl.int64)
    b_k0 = load_rows(p_k, o_n * s_kl, m_k, 0, D0, D)  # [BN, D0]
    b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)  # [BM, BN]
    if D1 > 0:
        b_k1 = load_rows(p_k, o_n * s_kl, m_k, D0, D1, D)  # [BN, D1]
        b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=PRECISION)
    b_s = b_s * scale2
    if b_uniform is not None:
        b_s = tl.where(b_uniform[:, None], 0.0, b_s)
    b_v0 = load_rows(p_v, o_n * s_vl, m_v, 0, D0, D)  # [BN, D0]
    if D1 > 0:
        b_v1 = load_rows(p_v, o_n * s_vl, m_v, D0, D1, D)  # [BN, D1]
    if BACKWARD:
        b_p = tl.exp2(b_s - b_m[:, None])
        b_dp = tl.dot(b_g0, tl.trans(b_v0), input_precision=PRECISION)  # [BM, BN]
        if D1 > 0:
            b_dp = tl.dot(b_g1, tl.trans(b_v1), b_dp, input_precision=PRECISION)
        if DROPOUT:
            b_kept = kept(seed, dropout_p, b_row_id, (key_base + o_n).to(tl.int32))
            b_dp = tl.where(b_kept, b_dp * keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_l[:, None])
        if m_s is not None:
            b_ds = tl.where(m_s, b_ds, 0.0)
        if b_uniform is not None:
            b_ds = tl.where(b_uniform[:, None], 0.0, b_ds)
        b_ds = b_ds.to(b_k0.dtype)
        b_x0 = tl.dot(b_ds, b_k0, b_x0, input_precision=PRECISION)
        if D1 > 0:
            b_x1 = tl.dot(b_ds, b_k1, b_x1, input_precision=PRECISION)
    else:
        if m_s is not None:
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_s, 1))  # [BM]
        # A row that has seen nothing yet keeps -inf, without -inf - -inf.
        b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_alpha = tl.exp2(b_m - b_shift)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_m = b_max
        if DROPOUT:
            b_kept = kept(seed, dropout_p, b_row_id, (key_base + o_n).to(tl.int32))
            b_p = tl.where(b_kept, b_p * keep_scale, 0.0)
        b_p = b_p.to(b_v0.dtype)
        b_x0 = tl.dot(b_p, b_v0, b_x0 * b_alpha[:, None], input_precision=PRECISION)
        if D1 > 0:
            b_x1 = tl.dot(b_p, b_v1, b_x1 * b_alpha[:, None], input_precision=PRECISION)
    return b_x0, b_x1, b_m, b_l


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_rows(
    Q,
    K,
    V,
    EXTRA_K,
    EXTRA_V,
    GRAD,  # dO, backward only
    OUT,  # the output [B, Lq, H, D], contiguous; backward only
    DELTA,  # [B, Lq, H] fp32 = rowsum(dO * O), written by backward
    X,  # output, or dQ: [B, Lq, H, D] contiguous; with splits, fp32 [SPLITS, B, Lq, H, D]
    LSE,  # [B, Lq, H] fp32, written by forward and read by backward; with splits [SPLITS, B, Lq, H]
    KEY_LENGTHS,
    KEY_PADDING,
    FIRST,
    LAST,
    WORDS,
    KV_INDEX,
    s_qb,
    s_ql,
    s_qh,
    s_kb,
    s_kl,
    s_kh,
    s_vb,
    s_vl,
    s_vh,
    s_eb,
    s_el,
    s_eh,
    s_fb,
    s_fl,
    s_fh,
    s_gb,
    s_gl,
    s_gh,
    s_mb,
    s_ml,
    batch,
    queries,
    keys,
    extra_keys,
    key_heads,
    group,
    pack,
    fold,
    prefix,
    images,
    tokens,
    scale,
    dropout_p,
    keep_scale,
    seed: tl.int64,
    BACKWARD: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIFORM: tl.constexpr,
    EXTRA_OWN: tl.constexpr,  # the second source has a row for each batch row, not for each key row
    DROPOUT: tl.constexpr,
    IMAGE_WORDS: tl.constexpr,  # 64-bit words a row; 0: no media mask
    SPLITS: tl.constexpr,
    EIGHTS: tl.constexpr,  # all strides of heads are multiples of 8
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows; grid: (row tiles * splits * key heads * clusters)."""
    BOUNDED: tl.constexpr = CAUSAL or KEY_LENGTHS is not None
    tiles = tl.cdiv(pack * queries * group, BM)
    i_p = tl.program_id(0)
    i_tile = i_p % tiles
    i_split = (i_p // tiles) % SPLITS
    i_h = ((i_p // (tiles * SPLITS)) % key_heads).to(tl.int64)
    i_cluster = (i_p // (tiles * SPLITS * key_heads)).to(tl.int64)

    o_b, o_i, o_g, m_r = packed_rows(i_tile, i_cluster, queries, group, pack, BM)
    if KV_INDEX is not None:
        i_kv = tl.load(KV_INDEX + i_cluster).to(tl.int64)
    else:
        i_kv = i_cluster * pack // fold
    o_h = i_h * group + o_g  # [BM]
    o_qh = o_h * s_qh
    i_kh, i_vh = i_h * s_kh, i_h * s_vh
    if EIGHTS:
        # Triton itself looks for multiples of 16 only, and would then load a head of 72 or 88 columns one by one.
        o_qh, i_kh, i_vh = tl.multiple_of(o_qh, [8]), tl.multiple_of(i_kh, 8), tl.multiple_of(i_vh, 8)
    o_q = o_b * s_qb + o_i * s_ql + o_qh
    heads = key_heads * group
    o_row = (o_b * queries + o_i) * heads + o_h  # in [B, Lq, H]
    b_row_id = o_row.to(tl.int32)

    b_q0 = load_rows(Q, o_q, m_r, 0, D0, D)  # [BM, D0]
    b_q1, b_g0, b_g1 = b_q0, b_q0, b_q0
    if D1 > 0:
        b_q1 = load_rows(Q, o_q, m_r, D0, D1, D)  # [BM, D1]
    if BACKWARD:
        o_gh = o_h * s_gh
        if EIGHTS:
            o_gh = tl.multiple_of(o_gh, [8])
        o_grad = o_b * s_gb + o_i * s_gl + o_gh
        b_g0 = load_rows(GRAD, o_grad, m_r, 0, D0, D)  # [BM, D0]
        if D1 > 0:
            b_g1 = load_rows(GRAD, o_grad, m_r, D0, D1, D)
        b_m = to_base_2(tl.load(LSE + o_row, mask=m_r, other=0.0))
        b_m = tl.where(b_m == float("-inf"), 0.0, b_m)  # of rows that see nothing, whose P is masked
        b_l = tl.sum(load_rows(OUT, o_row * D, m_r, 0, D0, D).to(tl.float32) * b_g0.to(tl.float32), 1)
        if D1 > 0:
            b_l += tl.sum(load_rows(OUT, o_row * D, m_r, D0, D1, D).to(tl.float32) * b_g1.to(tl.float32), 1)
        tl.store(DELTA + o_row, b_l, mask=m_r)
    else:
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
    b_x0 = tl.zeros([BM, D0], tl.float32)
    b_x1 = b_l
    if D1 > 0:
        b_x1 = tl.zeros([BM, D1], tl.float32)

    scale2 = to_base_2(scale)
    p_k = K + i_kv * s_kb + i_kh
    p_v = V + i_kv * s_vb + i_vh
    b_end = row_ends(KEY_LENGTHS, o_b, o_i, m_r, queries, keys, prefix, CAUSAL)  # [BM]
    end = keys
    if BOUNDED:
        end = tl.max(b_end, 0)
    b_uniform = None
    if UNIFORM:
        b_uniform = uniform_rows(FIRST, LAST, o_b, o_i, m_r, s_mb, s_ml, images)  # [BM]
        any_uniform = tl.max(b_uniform.to(tl.int32), 0) > 0

    if IMAGE_WORDS > 0:
        blocks = tl.cdiv(tokens, BN)
        o_bit = tl.arange(0, 64)
        for i_w in range(IMAGE_WORDS):
            b_word = row_words(FIRST, LAST, WORDS, o_b, o_i, m_r, i_w, s_mb, s_ml)  # [BM]
            o_image = 64 * i_w + o_bit
            b_seen = tl.where((o_image < images) & (o_image * tokens < end), any_row(b_word), 0)  # [64]
            seen = tl.sum(b_seen << o_bit, 0)
            if UNIFORM:
                b_seen = tl.where(any_uniform & (o_image < images), 1, b_seen)
            steps = (tl.sum(b_seen, 0) * blocks).to(tl.int32)
            i_first = steps * i_split // SPLITS
            i_end = steps * (i_split + 1) // SPLITS
            # The images left to visit: those before the first step of this split are dropped.
            b_rank = tl.cumsum(b_seen, 0) - b_seen
            left = tl.sum(tl.where(b_rank >= i_first // blocks, b_seen << o_bit, 0), 0)
            i_block = i_first % blocks
            for _ in range(i_first, i_end):
                bit = lowest_bit(left)
                start = (64 * i_w + bit) * tokens + i_block * BN
                o_n = start + tl.arange(0, BN)
                m_in = o_n < (64 * i_w + bit + 1) * tokens
                m_s = sees_image(b_word, bit)[:, None] & m_in[None, :]
                m_k = m_in
                if BOUNDED:
                    m_s = m_s & (o_n[None, :] < b_end[:, None])
                    m_k = m_k & (o_n < end)
                if KEY_PADDING is not None:
                    b_pad = tl.load(KEY_PADDING + i_cluster * keys + o_n, mask=m_in, other=0) != 0
                    m_s = m_s & b_pad[None, :]
                    m_k = m_k & b_pad
                if CAUSAL:
                    # The rows that see this image may all end before a key that rows of other images reach.
                    m_k = m_k & (tl.max(m_s.to(tl.int32), 0) > 0)
                m_v = m_k
                if UNIFORM:
                    m_s = m_s | (b_uniform[:, None] & m_in[None, :])
                    m_k = m_k & (((seen >> bit) & 1) == 1)
                    m_v = m_k | (m_in & any_uniform)
                b_x0, b_x1, b_m, b_l = _step(
                    b_x0, b_x1, b_m, b_l, b_q0, b_q1, b_g0, b_g1, p_k, p_v, s_kl, s_vl, o_n, m_k, m_v, m_s, b_uniform,
                    b_row_id, 0, scale2, dropout_p, keep_scale, seed, BACKWARD, DROPOUT, D, D0, D1, PRECISION,
                )  # fmt: skip
                i_block += 1
                last = i_block == blocks
                left = tl.where(last, left & (left - 1), left)
                i_block = tl.where(last, 0, i_block)
    else:
        # Blocks that every row sees whole need no mask.
        whole = keys // BN
        if BOUNDED:
            whole = tl.min(tl.where(m_r, b_end, keys), 0) // BN
        if KEY_PADDING is not None:
            whole = 0
        steps = tl.cdiv(end, BN)
        i_first = steps * i_split // SPLITS
        i_end = steps * (i_split + 1) // SPLITS
        for i in range(i_first, tl.minimum(i_end, whole)):
            o_n = i * BN + tl.arange(0, BN)
            b_x0, b_x1, b_m, b_l = _step(
                b_x0, b_x1, b_m, b_l, b_q0, b_q1, b_g0, b_g1, p_k, p_v, s_kl, s_vl, o_n, None, None, None, None,
                b_row_id, 0, scale2, dropout_p, keep_scale, seed, BACKWARD, DROPOUT, D, D0, D1, PRECISION,
            )  # fmt: skip
        for i in range(tl.maximum(i_first, whole), i_end):
            o_n = i * BN + tl.arange(0, BN)
            m_k = o_n < end
            m_s = m_k[None, :]
            if BOUNDED:
                m_s = o_n[None, :] < b_end[:, None]
            if KEY_PADDING is not None:
                m_k = m_k & (tl.load(KEY_PADDING + i_cluster * keys + o_n, mask=m_k, other=0) != 0)
                m_s = m_s & m_k[None, :]
            b_x0, b_x1, b_m, b_l = _step(
                b_x0, b_x1, b_m, b_l, b_q0, b_q1, b_g0, b_g1, p_k, p_v, s_kl, s_vl, o_n, m_k, m_k, m_s, None,
                b_row_id, 0, scale2, dropout_p, keep_scale, seed, BACKWARD, DROPOUT, D, D0, D1, PRECISION,
            )  # fmt: skip

    if EXTRA_K is not None:
        i_extra = i_kv
        if EXTRA_OWN:
            i_extra = i_cluster
        i_kh, i_vh = i_h * s_eh, i_h * s_fh
        if EIGHTS:
            i_kh, i_vh = tl.multiple_of(i_kh, 8), tl.multiple_of(i_vh, 8)
        p_k = EXTRA_K + i_extra * s_eb + i_kh
        p_v = EXTRA_V + i_extra * s_fb + i_vh
        steps = tl.cdiv(extra_keys, BN)
        i_first = steps * i_split // SPLITS
        i_end = steps * (i_split + 1) // SPLITS
        for i in range(i_first, tl.minimum(i_end, extra_keys // BN)):
            o_n = i * BN + tl.arange(0, BN)
            b_x0, b_x1, b_m, b_l = _step(
                b_x0, b_x1, b_m, b_l, b_q0, b_q1, b_g0, b_g1, p_k, p_v, s_el, s_fl, o_n, None, None, None, None,
                b_row_id, keys, scale2, dropout_p, keep_scale, seed, BACKWARD, DROPOUT, D, D0, D1, PRECISION,
            )  # fmt: skip
        for i in range(tl.maximum(i_first, extra_keys // BN), i_end):
            o_n = i * BN + tl.arange(0, BN)
            m_k = o_n < extra_keys
            b_x0, b_x1, b_m, b_l = _step(
                b_x0, b_x1, b_m, b_l, b_q0, b_q1, b_g0, b_g1, p_k, p_v, s_el, s_fl, o_n, m_k, m_k, m_k[None, :], None,
                b_row_id, keys, scale2, dropout_p, keep_scale, seed, BACKWARD, DROPOUT, D, D0, D1, PRECISION,
            )  # fmt: skip

    if BACKWARD:
        b_x0 = b_x0 * scale
        if D1 > 0:
            b_x1 = b_x1 * scale
        o_out = o_row
    else:
        b_sum = tl.where(b_l == 0.0, 1.0, b_l)
        b_norm = 1.0 / b_sum
        b_x0 = b_x0 * b_norm[:, None]
        if D1 > 0:
            b_x1 = b_x1 * b_norm[:, None]
        o_out = o_row + i_split.to(tl.int64) * batch * queries * heads
        # The maximum of a row that sees nothing is still -inf.
        tl.store(LSE + o_out, to_base_e(b_m + tl.log2(b_sum)), mask=m_r)
    store_rows(X, o_out * D, m_r, b_x0, 0, D0, D)
    if D1 > 0:
        store_rows(X, o_out * D, m_r, b_x1, D0, D1, D)


@triton.jit
def attention_combine(PARTS, PART_LSE, OUT, LSE, rows, SPLITS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Merge the results of the splits, in order: OUT [rows, D] and LSE [rows] from fp32 [SPLITS, rows, D]; a row each."""
    i_row = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, SPLITS)
    b_lse = tl.load(PART_LSE + o_s.to(tl.int64) * rows + i_row)  # [SPLITS]
    top = tl.max(b_lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    b_weight = tl.exp2(to_base_2(b_lse - top))
    total = tl.sum(b_weight, 0)
    m_s = b_weight > 0.0
    b_parts = load_rows(PARTS, (o_s.to(tl.int64) * rows + i_row) * D, m_s, 0, BD, D)  # [SPLITS, BD]
    b_out = tl.sum(b_parts * b_weight[:, None], 0)  # [BD]
    b_out = b_out / tl.where(total == 0.0, 1.0, total)
    o_d = tl.arange(0, BD)
    tl.store(OUT + i_row * D + o_d, b_out.to(OUT.dtype.element_ty), mask=o_d < D)
    lse = top + to_base_e(tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(LSE + i_row, tl.where(total == 0.0, float("-inf"), lse))

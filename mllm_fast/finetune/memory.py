"""Memory that a training step keeps between forward and backward: what is saved, as closed formulas, block by block.

`e` is the bytes of an element in what the language model computes in (2 for bf16, 4 for fp32), `s` those of the stream of
residuals inside the bridge (that of its parameters). Statistics of norms and attention are fp32. Where e < 4, attention also
keeps what rounding took from its result (`residue`), and where parameters are wider than e, their rounded copies are kept
from forward to backward. Small vectors (gates, labels, seeds of dropout) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShape:
    """How large a batch of training is.

    Attributes:
        samples: rows of the batch.
        tokens: text tokens of a row, padding and the places of images in the text counted.
        images: images of a row.
        supervised: tokens of a row that have labels; None: all of them.
        patches: what the vision model makes of an image, tokens; None: as its configuration says.
        padded: whether its rows are of different lengths, so that the language model's attention is given a mask.

    Raises:
        ValueError: a number below what makes a batch.
    """

    samples: int
    tokens: int
    images: int = 1
    supervised: int | None = None
    patches: int | None = None
    padded: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.tokens < 1 or self.images < 0:
            raise ValueError(f"a batch has at least one sample and one token and no fewer than 0 images; got {self}")
        if self.supervised is not None and not 0 <= self.supervised <= self.tokens:
            raise ValueError(f"supervised is {self.supervised}; expected 0 to tokens={self.tokens}")
        if self.patches is not None and self.patches < 1:
            raise ValueError(f"patches is {self.patches}; expected at least 1")


# The formulas.


def decoder_layer_bytes(
    n: int, h: int, q: int, kv: int, f: int, heads: int, r: int, e: int, *, hidden: int = 2, mask: int = 0
) -> int:
    """A frozen pre-norm decoder layer through which is trained.

    e n (2 h + 2 q + 2 kv + 2 f + r) + 4 n heads: the stream before and inside; queries, keys, values and the attention's
    result; gate and up; of each low-rank term x A^T, r channels in all. Without grouped keys q = kv = h, hence
    e n (6 h + 2 f + r), and for an MLP without a gate, as OPT has it, e n (6 h + f + r). All layers of a model keep one
    mask. With a mask and grouped keys a layer on a GPU keeps less: the attention's result is computed again.

    Args:
        n: tokens of the batch.
        h, f: widths of the stream and of the MLP.
        q, kv: channels of all query heads and of all key heads.
        hidden: how often f is kept: 2 with a gate, otherwise 1.
        mask: elements of the mask, n times the tokens of a row (as a multiple of 8), in one layer of a model; 0 in others.
    """
    return e * (n * (2 * h + 2 * q + 2 * kv + hidden * f + r) + mask) + 4 * n * heads


def plain_decoder_layer_bytes(n: int, h: int, f: int, heads: int, e: int, *, mask: int = 0) -> int:
    """A frozen pre-norm decoder layer of OPT (ReLU, no gate), as autograd keeps it.

    e (n (6 h + f) + mask) + 4 n (heads + 4), with the mask as in `decoder_layer_bytes`.
    """
    return e * (n * (6 * h + f) + mask) + 4 * n * (heads + 4)


def gated_block_bytes(
    n: int, m: int, d: int, dm: int, q: int, kv: int, f: int, heads: int, e: int, *, kv_heads: int = 0, rms: bool = False,
    head_norms: bool = False, hidden: int = 2, media_casts: int = 0, weights: int = 0,
) -> int:  # fmt: skip
    """A trained gated cross-attention block over its text and media.

    e (n (6 d + 2 q + 2 f) + 2 m kv) + 4 n (heads + 4), and where e < 4 the residue e n q: the stream before, between and
    after, the results of both norms and of attention; queries and the attention's result; the network before and after its
    activation (`hidden` times f: 2, for a ReLU 1, with a gate 4); keys and values. An RMS norm keeps its input, and its
    result before the weight, in fp32: 8 bytes in place of e, and so it is for norms over the heads of queries and keys.

    Args:
        n, m: text tokens and media tokens of the batch.
        d, dm: their widths.
        q, kv: channels of all query heads and of all key heads.
        f: width of the network; `hidden` times so much of it is kept.
        media_casts: how often the block rounds the media, m dm elements, because they come wider than e.
        weights: elements of the rounded copies of weights that are wider than e.
    """
    norm = 8 + e if rms else 2 * e
    total = n * d * (2 * norm + 2 * e) + 4 * n * (heads + (2 if rms else 4))
    total += n * q * (2 * e + (e if e < 4 else 0)) + 2 * e * m * kv + e * n * f * hidden
    if head_norms:
        total += 8 * (n * q + m * kv) + 4 * (n * heads + m * kv_heads)
    return total + e * (media_casts * m * dm + weights)


def frozen_gated_block_bytes(
    n: int, m: int, d: int, q: int, kv: int, f: int, heads: int, e: int, *, kv_heads: int = 0, rms: bool = False,
    head_norms: bool = False, hidden: int = 1, media: bool = False, weights: int = 0,
) -> int:  # fmt: skip
    """A frozen gated cross-attention block, through which is trained.

    e (n (2 d + 2 q + f) + 2 m kv) + 4 n (heads + 4), and where e < 4 the residue e n q: of what `gated_block_bytes` has,
    the results of the norms, the branches before their gates and what the frozen linear layers read are not kept. An RMS
    norm keeps its input in fp32, 4 bytes in place of e, and so does the norm over the heads of queries.

    Args:
        n, m, d, q, kv, f: as in `gated_block_bytes`.
        hidden: of the network, 1, with a gate 3.
        media: whether a gradient goes to the media, too; a norm over the heads of keys then keeps its input.
        weights: elements of frozen weights wider than e that a gradient passes: their rounded copies are kept.
    """
    total = n * d * 2 * (4 if rms else e) + 4 * n * (heads + (2 if rms else 4))
    total += n * q * (2 * e + (e if e < 4 else 0)) + 2 * e * m * kv + e * n * f * hidden
    if head_norms:
        total += 4 * n * (q + heads) + (4 * m * (kv + kv_heads) if media else 0)
    return total + e * weights


def resampler_bytes(
    images: int, latents: int, m: int, d: int, q: int, kv: int, f: int, heads: int, layers: int, e: int, s: int, *,
    head_norms: bool = False, hidden: int = 2, weights: int = 0,
) -> int:  # fmt: skip
    """A trained Perceiver resampler.

    Of the media their norm and every layer's keys and values: e m (d + 2 kv layers). In each layer over R = images * latents
    rows: the stream twice (2 s R d), the results of both norms (2 e R d), queries, keys and values (e R (q + 2 kv)), the
    attention's result (e R q, and as much for the residue where e < 4), the network before and after its activation
    (2 e R f, for a ReLU half of it), statistics (4 R (heads + 4)). In the first layer, up to its attention, all images' rows
    are the same: R is the latents alone, whose stream is a parameter. Last, the stream that the final norm reads.

    Args:
        m: media tokens of all images.
        head_norms: whether queries and keys are normalised by head; their results are kept, too.
        weights: elements of stacked, folded and rounded weights.
    """
    rows = images * latents
    total = e * (m * (d + 2 * kv * layers) + weights)
    for layer in range(layers):
        own = latents if layer == 0 else rows
        total += (0 if layer == 0 else s * own * d) + e * own * (d + q + 2 * kv) + 8 * own
        total += (
            e * rows * q * (2 if e < 4 else 1) + 4 * rows * (heads + 2) + s * rows * d + e * rows * (d + hidden * f)
        )
        if head_norms:
            total += e * (own * (q + kv) + m * kv) + 8 * heads * (2 * own + m)
    return total + s * rows * d + 8 * rows


def qformer_layer_bytes(
    rows: int, d: int, f: int, heads: int, e: int, s: int, *, cross: bool, first: int | None = None, masks: bool = False,
    weights: int = 0,
) -> int:  # fmt: skip
    """A trained Q-Former layer over queries, without the image's keys and values.

    Self-attention e R (6 d) + s R d + 4 R (heads + 2): its input, queries, keys and values, its result, the norm's result
    and, in the stream's type, what the norm reads; cross-attention e R (3 d) + s R d + 4 R (heads + 2); the network
    e R (2 f) + s R d + 8 R. Where e < 4, each attention keeps its residue e R d. Dropout keeps a seed on a GPU; on a CPU, each
    of the three keeps the mask of what its norm reads, s R d.

    Args:
        rows: R, the queries of all images.
        first: R of the self-attention in a layer where it is the same for all images (the first, without dropout).
        masks: whether dropout keeps masks.
        weights: elements of stacked and of rounded weights.
    """
    own = rows if first is None else first
    residue = 1 if e < 4 else 0
    summed = s * d * (2 if masks else 1)
    total = own * (e * (6 + residue) * d + summed + 4 * (heads + 2)) + rows * (2 * e * f + summed + 8) + e * weights
    if cross:
        total += rows * (e * (3 + residue) * d + summed + 4 * (heads + 2))
    return total


def qformer_image_bytes(m: int, dv: int, d: int, layers: int, e: int, *, weights: int, norm: bool) -> int:
    """What the cross-attention layers of a Q-Former read of m image tokens of width dv: e (m (dv + 2 d layers) + weights).

    Args:
        layers: how many read the image.
        weights: elements of their key and value weights, stacked.
        norm: whether the norm that the image comes from is trained: it keeps its input, e m dv + 8 m.
    """
    return e * (m * (dv + 2 * d * layers) + weights) + (m * (e * dv + 8) if norm else 0)


def projection_bytes(rows: int, widths: tuple[int, ...], e: int, *, weights: int = 0) -> int:
    """A trained projection: linear layers from width to width, with activations between.

    e rows (widths[0] + 2 * (the widths between)): each layer's input, and what each activation reads.

    Args:
        weights: elements of rounded weights.
    """
    return e * (rows * (widths[0] + 2 * sum(widths[1:-1])) + weights)


def loss_bytes(n: int, supervised: int, h: int, e: int, *, rms: bool = True) -> int:
    """The last norm and the loss over a frozen head: n (4 h + 4) + e supervised h, or for a layer norm n (e h + 8) + ...

    The logits are never there. Transformers' RMS norm keeps its input in fp32.
    """
    return n * (4 * h + 4 if rms else e * h + 8) + e * supervised * h

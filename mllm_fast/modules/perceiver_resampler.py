"""The Perceiver resampler: any number of image features in, a fixed number of latents out (Flamingo, A.1.1).

    for each layer:  x = x + W_o attention(LN(x) W_q, [LN(media); LN(x)] W_kv)
                     x = x + ffn(x)

Three identities make it cheap, all exact in real arithmetic. The media never changes, so it is normalised once; every
layer's affine and K/V projection fold into one GEMM over that. The attention reads media and latents as two key
sources instead of concatenating them. In layer 0 the latents are the same for every image, so their norm, queries,
keys and values are computed for one image and shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.attention import Mask
from ..kernels.linear import StackedWeight, lowers_by_panels, stack_weights
from ..kernels.norm import Norm
from . import children
from .gated_cross_attention import norm_class
from .state import FusedState, Options


@dataclass(frozen=True)
class LayerNames:
    """Dotted paths of the children that play each role in one layer; `kv` (rows K then V) or `k` and `v`."""

    norm_media: str
    norm_latents: str
    q: str
    out: str
    ffn_norm: str
    ffn_up: str
    ffn_down: str
    kv: str | None = None
    k: str | None = None
    v: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    ffn_act_gate: str | None = None

    @property
    def keys_values(self) -> tuple[str, ...]:
        """The paths of the key and value projections: one or two."""
        paths = (self.kv,) if self.kv is not None else (self.k, self.v)
        return tuple(path for path in paths if path is not None)


@dataclass(frozen=True)
class PerceiverResamplerSpec:
    """What a resampler computes.

    Attributes:
        heads, head_dim, kv_heads: of the attention.
        activation: of the feed-forward network, a name of `ops.norm_linear`.
        latents: path of the latents parameter [n, D].
        layers: the roles in each layer, in order.
        final_norm: path of the norm after the last layer.
    """

    heads: int
    head_dim: int
    kv_heads: int
    activation: str
    latents: str
    layers: tuple[LayerNames, ...]
    final_norm: str


def resample(
    module: nn.Module, spec: PerceiverResamplerSpec, state: FusedState, media: Tensor, mask: Mask | None = None
) -> Tensor:
    """Run the resampler.

    Args:
        media: [N, M, D] features, position embeddings already added; N images or videos of M tokens.
        mask: of the media tokens, which the latents' own keys and values do not fall under; None: all are visible.

    Returns:
        [N, n, D] latents after the final norm.
    """
    latents = children.resolve(module, spec.latents)
    if media.shape[-1] != latents.shape[-1]:
        raise ValueError(f"media must be {latents.shape[-1]} wide like the latents, got {tuple(media.shape)}")
    images = media.shape[0]
    x = latents.unsqueeze(0)
    if state.options.level == 0:
        x = x.expand(images, -1, -1)
    for i, (layer, (k, v)) in enumerate(zip(spec.layers, _media_keys_values(module, spec, state, media), strict=True)):
        x = _attention(module, spec, state, i, x, k, v, mask)
        act_gate = None if layer.ffn_act_gate is None else children.resolve(module, layer.ffn_act_gate)
        hidden = children.norm_linear(
            x,
            children.resolve(module, layer.ffn_norm),
            children.resolve(module, layer.ffn_up),
            activation=spec.activation,
            gate=act_gate,
            packs=state.packs,
        )
        x = children.linear_residual(hidden, children.resolve(module, layer.ffn_down), x, packs=state.packs)
    return children.normalize(x.expand(images, -1, -1), children.resolve(module, spec.final_norm))


def _attention(
    module: nn.Module,
    spec: PerceiverResamplerSpec,
    state: FusedState,
    i: int,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
) -> Tensor:
    """x + attention(x, [media; x]); x [N or 1, n, D], media keys and values [N, M, kv_heads, head_dim]."""
    layer, images = spec.layers[i], k.shape[0]
    q, latent_k, latent_v = _latent_projections(module, spec, state, i, x)
    if layer.q_norm is not None:
        q = children.normalize(q, children.resolve(module, layer.q_norm))
    if layer.k_norm is not None:
        k_norm = children.resolve(module, layer.k_norm)
        k, latent_k = children.normalize(k, k_norm), children.normalize(latent_k, k_norm)
    attended = ops.attention(q.expand(images, -1, -1, -1), k, v, extra_k=latent_k, extra_v=latent_v, mask=mask).flatten(
        -2
    )
    out = children.resolve(module, layer.out)
    return children.linear_residual(attended, out, x.expand(images, -1, -1), packs=state.packs)


def _latent_projections(
    module: nn.Module, spec: PerceiverResamplerSpec, state: FusedState, i: int, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the latents [N, n, D] in one GEMM: [N, n, heads or kv_heads, head_dim] each."""
    layer = spec.layers[i]
    norm = children.resolve(module, layer.norm_latents)
    projections = [children.resolve(module, path) for path in (layer.q, *layer.keys_values)]
    if all(children.readable_linear(p) for p in projections) and not _lowers(x, projections):
        stacked = _stacked(state, ("latents", i), projections, None)
        read = children.read_norm(norm)
        x = x if read is not None else norm(x)
        parts = list(children.stacked_linear(x, stacked, read, ("latents", i), state.packs))
    else:
        normed = children.normalize(x, norm)
        parts = [children.norm_linear(normed, None, p) for p in projections]
    k, v = parts[1:] if len(parts) == 3 else parts[1].chunk(2, dim=-1)
    return (
        parts[0].unflatten(-1, (spec.heads, spec.head_dim)),
        k.unflatten(-1, (spec.kv_heads, spec.head_dim)),
        v.unflatten(-1, (spec.kv_heads, spec.head_dim)),
    )


def _media_keys_values(
    module: nn.Module, spec: PerceiverResamplerSpec, state: FusedState, media: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the media for every layer, [N, M, kv_heads, head_dim] each."""
    norms = [children.resolve(module, layer.norm_media) for layer in spec.layers]
    projections = [[children.resolve(module, path) for path in layer.keys_values] for layer in spec.layers]
    reads = [children.read_norm(norm) for norm in norms]
    flat = [p for layer in projections for p in layer]
    shared = len({(read.kind, read.eps) for read in reads if read is not None}) == 1 and None not in reads
    readable = all(children.readable_linear(p) for p in flat)
    if state.options.level >= 1 and shared and readable and not _lowers(media, flat):
        folded = [read for read, layer in zip(reads, projections, strict=True) for _ in layer]
        stacked = _stacked(state, "media", flat, folded)
        plain = Norm(reads[0].kind, None, None, reads[0].eps)
        outputs = list(children.stacked_linear(media, stacked, plain, "media", state.packs))
    else:
        outputs = []
        for norm, layer in zip(norms, projections, strict=True):
            normed = children.normalize(media, norm)
            outputs += [children.norm_linear(normed, None, p) for p in layer]
    per_layer = len(projections[0])
    pairs = [outputs[i : i + per_layer] for i in range(0, len(outputs), per_layer)]
    shape = (spec.kv_heads, spec.head_dim)
    split = [pair if per_layer == 2 else pair[0].chunk(2, dim=-1) for pair in pairs]
    return [(k.unflatten(-1, shape), v.unflatten(-1, shape)) for k, v in split]


def _lowers(x: Tensor, linears: Sequence[nn.Module]) -> bool:
    """Whether trained fp32 weights are multiplied in 16 bits on a CPU: stacks of them would be copies to keep for backward."""
    return any(lowers_by_panels(x, linear.weight) for linear in linears)


def _stacked(
    state: FusedState, name: object, linears: Sequence[nn.Module], norms: Sequence[Norm | None] | None
) -> StackedWeight:
    """The linears' weights as one, each with its norm's affine folded in; kept until one of them changes."""
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    sources = [*weights, *biases]
    for norm in norms or ():
        sources += [None, None] if norm is None else [norm.weight, norm.bias]
    all_biases = None if all(b is None for b in biases) else biases
    return state.derived.get(name, sources, lambda: stack_weights(weights, all_biases, norms))


class PerceiverResampler(nn.Module):
    """A Perceiver resampler of our own, for new models and for checkpoints without a maintained class.

    Args:
        dim: width of the media and of the latents.
        depth: number of layers.
        heads, head_dim: of the attention; heads * head_dim need not be dim.
        latents: number of output tokens.
        ffn_dim: hidden width of the feed-forward network, default 4 * dim.
        activation: a name of `ops.norm_linear` without a gate.
        norm: "layer_norm" or "rms_norm".
        eps: of the norms.
        max_frames: learn an embedding for each of up to so many frames of a video.
        max_images: learn an embedding for each of up to so many images of a sample.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        latents: int = 64,
        ffn_dim: int | None = None,
        activation: str = "gelu",
        norm: Literal["layer_norm", "rms_norm"] = "layer_norm",
        eps: float = 1e-5,
        max_frames: int | None = None,
        max_images: int | None = None,
    ) -> None:
        super().__init__()
        make_norm = norm_class(norm)
        ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        self.latents = nn.Parameter(torch.randn(latents, dim) * 0.02)
        self.frame_embeddings = None if max_frames is None else nn.Parameter(torch.randn(max_frames, dim) * 0.02)
        self.image_embeddings = None if max_images is None else nn.Parameter(torch.randn(max_images, dim) * 0.02)
        inner = heads * head_dim
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_media": make_norm(dim, eps=eps),
                    "norm_latents": make_norm(dim, eps=eps),
                    "to_q": nn.Linear(dim, inner, bias=False),
                    "to_k": nn.Linear(dim, inner, bias=False),
                    "to_v": nn.Linear(dim, inner, bias=False),
                    "to_out": nn.Linear(inner, dim, bias=False),
                    "ffn_norm": make_norm(dim, eps=eps),
                    "ffn_up": nn.Linear(dim, ffn_dim, bias=False),
                    "ffn_down": nn.Linear(ffn_dim, dim, bias=False),
                }
            )
            for _ in range(depth)
        )
        self.norm = make_norm(dim, eps=eps)
        names = tuple(
            LayerNames(
                **{role: f"layers.{i}.{role}" for role in ("norm_media", "norm_latents", "ffn_norm")},
                **{role: f"layers.{i}.{role}" for role in ("ffn_up", "ffn_down")},
                **{role: f"layers.{i}.to_{role}" for role in ("q", "k", "v", "out")},
            )
            for i in range(depth)
        )
        self.spec = PerceiverResamplerSpec(heads, head_dim, heads, activation, "latents", names, "norm")
        self._mllm_fast = FusedState(type(self), Options(), self.spec)

    def forward(self, media: Tensor, *, frames: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        """Resample.

        Args:
            media: [..., M, dim] features of one image each; or, with `max_frames` or `frames`, [..., F, M, dim] features of
                the F frames of one video each, an image being a video of one frame; with `max_images`, the dimension
                before those counts a sample's images, unless `numbers` say which they are.
            frames: [...] int64, how many of the F frames each video has; the others are padding, whatever they hold.
            numbers: [...] int64, which of its sample's images each one is, from 0, below `max_images`.

        Returns:
            [..., latents, dim]: one set of latents for each image or video.

        Raises:
            ValueError: more frames or images than there are embeddings for, or a width that does not fit.
        """
        mask = None
        if frames is not None:
            mask = Mask(key_lengths=frames.flatten() * media.shape[-2])
        if self.frame_embeddings is not None:
            media = media + _rows(self.frame_embeddings, media.shape[-3], "frames").unsqueeze(-2)
        if self.frame_embeddings is not None or frames is not None:
            media = media.flatten(-3, -2)
        if self.image_embeddings is not None:
            if numbers is None:
                media = media + _rows(self.image_embeddings, media.shape[-3], "images").unsqueeze(-2)
            else:
                media = media + self.image_embeddings[numbers].unsqueeze(-2)
        resampled = resample(self, self.spec, self._mllm_fast, media.reshape(-1, *media.shape[-2:]), mask)
        return resampled.reshape(*media.shape[:-2], *resampled.shape[1:])


def _rows(embeddings: Tensor, count: int, what: str) -> Tensor:
    if count > embeddings.shape[0]:
        raise ValueError(f"got {count} {what} but the resampler has embeddings for {embeddings.shape[0]}")
    return embeddings[:count]

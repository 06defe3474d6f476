"""Gated cross-attention: text reads images through a tanh gate that starts closed (Flamingo, arXiv 2204.14198, 3.2).

    x = x + tanh(g_attn) * W_o attention(norm(x) W_q, media W_k, media W_v)
    x = x + tanh(g_ffn)  * ffn(norm(x))

Each text token sees the images that its visibility names, usually only the last one before it. The block is written
once, over child modules found by role; the families tell which child of an upstream class plays which role.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.attention import Mask, MediaRanges, MediaSubsets
from . import children
from .media_context import MediaContext
from .state import FusedState, Options

Visibility = MediaRanges | MediaSubsets


@dataclass(frozen=True)
class Names:
    """Dotted paths of the children and parameters that play each role in a block. None: the block has no such child.

    Keys and values come from one child (`kv`, rows K then V) or from two (`k` and `v`).
    """

    norm: str = "norm"
    q: str = "to_q"
    k: str | None = "to_k"
    v: str | None = "to_v"
    kv: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    out: str = "to_out"
    attn_gate: str = "attn_gate"
    ffn_norm: str = "ffn_norm"
    ffn_up: str = "ffn_up"
    ffn_act_gate: str | None = None
    ffn_down: str = "ffn_down"
    ffn_gate: str = "ffn_gate"


@dataclass(frozen=True)
class GatedCrossAttentionSpec:
    """What a gated cross-attention block computes.

    Attributes:
        heads, head_dim: query heads and their width.
        kv_heads: key and value heads; fewer than `heads` is grouped-query attention.
        activation: of the feed-forward network, a name of `ops.norm_linear`.
        scale: softmax scale; None is head_dim ** -0.5.
        names: which child plays which role.
    """

    heads: int
    head_dim: int
    kv_heads: int
    activation: str
    scale: float | None = None
    names: Names = field(default_factory=Names)


def media_keys_values(
    block: nn.Module, spec: GatedCrossAttentionSpec, state: FusedState, media: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of the media for this block, kept between the steps of a generation.

    Args:
        media: [B, images, tokens, D_media].

    Returns:
        keys and values, [B, images * tokens, kv_heads, head_dim].
    """
    names = spec.names

    def project(images: Tensor) -> tuple[Tensor, Tensor]:
        return project_keys_values(block, spec, images.flatten(1, 2))

    if state.options.level == 0:
        return project(media)
    paths = ((names.k, names.v) if names.kv is None else (names.kv,)) + (names.k_norm,)
    weights = children.weights_of([children.resolve(block, path) for path in paths if path is not None])
    return state.shared.keys_values(id(state), media, weights, project)


def project_keys_values(block: nn.Module, spec: GatedCrossAttentionSpec, media: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, normalised where the block does that, and values of media [B, M, D_media]: [B, M, kv_heads, head_dim]."""
    names, shape = spec.names, (spec.kv_heads, spec.head_dim)
    k_norm = None if names.k_norm is None else children.resolve(block, names.k_norm)
    if names.kv is not None:
        k, v = children.norm_linear(media, None, children.resolve(block, names.kv)).chunk(2, dim=-1)
        k = k.unflatten(-1, shape)
        return (k if k_norm is None else children.normalize(k, k_norm)), v.unflatten(-1, shape)
    k = children.norm_linear(media, None, children.resolve(block, names.k), head_norm=k_norm)
    v = children.norm_linear(media, None, children.resolve(block, names.v))
    return k.unflatten(-1, shape), v.unflatten(-1, shape)


def attend(
    block: nn.Module,
    spec: GatedCrossAttentionSpec,
    state: FusedState,
    x: Tensor,
    media: Tensor | tuple[Tensor, Tensor],
    visibility: Visibility | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The attention branch before its output projection.

    Args:
        x: [B, S, D] text.
        media: [B_media, images, tokens, D_media]; text row b reads media row b // (B / B_media), so the beams of one
            sample share one copy. Or its keys and values, [B_media, M, kv_heads, head_dim] each.
        visibility: which images each token sees; None is all of them.
        dropout_p: dropout on the attention probabilities.

    Returns:
        [B, S, heads * head_dim]; exactly 0 in the rows that see no image.
    """
    names = spec.names
    q = children.norm_linear(
        x,
        children.resolve(block, names.norm),
        children.resolve(block, names.q),
        head_norm=None if names.q_norm is None else children.resolve(block, names.q_norm),
        packs=state.packs,
    )
    q = q.unflatten(-1, (spec.heads, spec.head_dim))
    k, v = media if isinstance(media, tuple) else media_keys_values(block, spec, state, media)
    mask = None if visibility is None else Mask(media=visibility)
    return ops.attention(q, k, v, mask=mask, scale=spec.scale, dropout_p=dropout_p).flatten(-2)


def gated_attention(
    block: nn.Module,
    spec: GatedCrossAttentionSpec,
    state: FusedState,
    x: Tensor,
    media: Tensor | tuple[Tensor, Tensor],
    visibility: Visibility | None,
    *,
    row_mask: Tensor | None = None,
    attention_dropout: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """x + tanh(gate) * attention; arguments as `attend`, `row_mask` [B, S] switches rows of the branch off."""
    attended = attend(block, spec, state, x, media, visibility, attention_dropout)
    out = children.resolve(block, spec.names.out)
    gate = children.resolve(block, spec.names.attn_gate)
    return children.linear_residual(
        attended, out, x, gate=gate, row_mask=row_mask, dropout_p=dropout_p, packs=state.packs
    )


def gated_ffn(
    block: nn.Module,
    spec: GatedCrossAttentionSpec,
    state: FusedState,
    x: Tensor,
    dropout_p: float = 0.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    """x + tanh(gate) * ffn(norm(x)), x [B, S, D]; `row_mask` [B, S] switches rows of the branch off."""
    names = spec.names
    act_gate = None if names.ffn_act_gate is None else children.resolve(block, names.ffn_act_gate)
    hidden = children.norm_linear(
        x,
        children.resolve(block, names.ffn_norm),
        children.resolve(block, names.ffn_up),
        activation=spec.activation,
        gate=act_gate,
        packs=state.packs,
    )
    down, gate = children.resolve(block, names.ffn_down), children.resolve(block, names.ffn_gate)
    return children.linear_residual(
        hidden, down, x, gate=gate, row_mask=row_mask, dropout_p=dropout_p, packs=state.packs
    )


def broadcast_text(x: Tensor, media: Tensor) -> Tensor:
    """The text with one row per media row where it has a single one for all; checks that the two fit.

    Args:
        x: [B, S, D]; media: [B_media, images, tokens, D_media].

    Raises:
        ValueError: wrong ranks, or a text batch that is neither 1 nor a multiple of the media batch.
    """
    if x.ndim != 3:
        raise ValueError(f"text must be [batch, length, dim], got {tuple(x.shape)}")
    if media.ndim != 4:
        raise ValueError(f"media must be [batch, images, tokens, dim], got {tuple(media.shape)}")
    if x.shape[0] == 1 < media.shape[0]:
        return x.expand(media.shape[0], -1, -1)
    if media.shape[0] == 0 or x.shape[0] % media.shape[0]:
        raise ValueError(
            f"{x.shape[0]} text rows cannot share {media.shape[0]} media rows: the text batch must be a multiple of the "
            "media batch (beams and returned sequences read the media row of their sample)"
        )
    return x


def flamingo_visibility(
    context: MediaContext,
    options: Options,
    locations: Tensor | None,
    media: Tensor,
    rows: int,
    *,
    immediate: bool,
    cached: bool = False,
) -> MediaRanges | None:
    """Who sees what in the OpenFlamingo family, from the positions of the image tokens.

    A token's time is the number of image tokens up to and including it. It sees the image of that number (`immediate`)
    or all images up to it. Upstream quirks, kept unless the named fix is on: a token whose time is beyond the last
    image sees the mean of all values ("index_beyond_images"), and where all previous images are seen, a token before
    the first image does too ("future_images").

    Args:
        locations: [B, L] bool, True at image tokens; L == rows unless `cached`. None: every token sees every image.
        media: [B_media, images, tokens, D], for its counts.
        rows: text length S.
        cached: all S tokens come after the locations, as in generation; they see what the last of them sees.

    Returns:
        ranges [B, S], shared by all layers that ask with the same locations; or None.
    """
    if locations is None:
        return None
    if not cached and locations.shape[1] < rows:
        raise ValueError(
            f"media_locations covers {locations.shape[1]} tokens but the text has {rows}; pass one flag per text token"
        )
    images, tokens = media.shape[1:3]
    beyond: Literal["zero", "mean"] = "mean"
    if immediate and "index_beyond_images" in options.fixes:
        beyond = "zero"

    def build() -> MediaRanges:
        if cached:
            time = torch.count_nonzero(locations, dim=1).unsqueeze(1).expand(-1, rows)
        else:
            time = locations.cumsum(dim=-1)[:, -rows:]
        if immediate:
            return MediaRanges((time - 1).clamp_min(0), time, images, tokens, beyond)
        first = torch.zeros_like(time)
        if "future_images" in options.fixes:
            return MediaRanges(first, time, images, tokens, beyond)
        before = time == 0
        # A range wholly past the last image is how MediaRanges spells "the mean of all values".
        return MediaRanges(
            first.masked_fill(before, images), time.masked_fill(before, images + 1), images, tokens, beyond
        )

    return context.visibility(locations, (rows, images, tokens, immediate, cached, options), build)


class GatedCrossAttentionBlock(nn.Module):
    """A gated cross-attention block of our own, for new models and for checkpoints without a maintained class.

    Args:
        dim: width of the text.
        media_dim: width of the media tokens.
        heads, head_dim, kv_heads: attention heads; `kv_heads` (default `heads`) must divide `heads`.
        ffn_dim: hidden width of the feed-forward network, default 4 * dim.
        activation: of the feed-forward network, a name of `ops.norm_linear`; "swiglu" and "geglu" add a gate projection.
        norm: "layer_norm" or "rms_norm", on the text before each branch.
        eps: of the norms.
        gate: "scalar" or "vector" tanh gates, zero at the start: the block begins as the identity.
        qk_norm: RMSNorm over each head of queries and keys.

    Raises:
        ValueError: `kv_heads` does not divide `heads`, or an unknown norm or gate.
    """

    def __init__(
        self,
        dim: int,
        media_dim: int,
        *,
        heads: int = 8,
        head_dim: int = 64,
        kv_heads: int | None = None,
        ffn_dim: int | None = None,
        activation: str = "gelu",
        norm: Literal["layer_norm", "rms_norm"] = "layer_norm",
        eps: float = 1e-5,
        gate: Literal["scalar", "vector"] = "scalar",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {kv_heads} and {heads}")
        if gate not in ("scalar", "vector"):
            raise ValueError(f"gate must be 'scalar' or 'vector', got {gate!r}")
        make_norm = norm_class(norm)
        ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        gated_activation = activation in ("swiglu", "geglu")
        self.spec = GatedCrossAttentionSpec(
            heads,
            head_dim,
            kv_heads,
            activation,
            names=Names(
                q_norm="q_norm" if qk_norm else None,
                k_norm="k_norm" if qk_norm else None,
                ffn_act_gate="ffn_act_gate" if gated_activation else None,
            ),
        )
        self.norm = make_norm(dim, eps=eps)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(media_dim, kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(media_dim, kv_heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        if qk_norm:
            self.q_norm = nn.RMSNorm(head_dim, eps=eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=eps)
        self.attn_gate = nn.Parameter(torch.zeros(1 if gate == "scalar" else dim))
        self.ffn_norm = make_norm(dim, eps=eps)
        self.ffn_up = nn.Linear(dim, ffn_dim, bias=False)
        if gated_activation:
            self.ffn_act_gate = nn.Linear(dim, ffn_dim, bias=False)
        self.ffn_down = nn.Linear(ffn_dim, dim, bias=False)
        self.ffn_gate = nn.Parameter(torch.zeros(1 if gate == "scalar" else dim))
        self._mllm_fast = FusedState(type(self), Options(), self.spec, MediaContext())

    def forward(self, x: Tensor, media: Tensor, visibility: Visibility | None = None) -> Tensor:
        """The block.

        Args:
            x: [B, S, dim] text.
            media: [B_media, images, tokens, media_dim]; B must be a multiple of B_media.
            visibility: which images each token sees; None is all of them.

        Returns:
            [B, S, dim].
        """
        x = gated_attention(self, self.spec, self._mllm_fast, broadcast_text(x, media), media, visibility)
        return gated_ffn(self, self.spec, self._mllm_fast, x)

    def share(self, context: MediaContext) -> None:
        """Use a model's context, so that one `context.clear()` reaches all its blocks."""
        self._mllm_fast.shared = context


def norm_class(norm: str) -> type[nn.LayerNorm] | type[nn.RMSNorm]:
    """The torch class behind a norm's name.

    Raises:
        ValueError: for any other name.
    """
    try:
        return {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[norm]
    except KeyError:
        raise ValueError(f"norm must be 'layer_norm' or 'rms_norm', got {norm!r}") from None

"""HF Mllama (Llama 3.2 Vision): the gated cross-attention layers of its language model.

An image lies in a fixed number of tiles, of which a small image fills one and padding the others. With the fix
"rows_without_image" nothing reads padding, so in inference it is neither projected nor cached: of a batch, the tiles are kept
that some sample fills, the same of every sample. A cached layer remembers which. (A layer that is recomputed in backward
could not ask again.)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer, MllamaModel

from ..kernels.attention import MediaSubsets
from ..modules import children
from ..modules.gated_cross_attention import (
    GatedCrossAttentionSpec,
    Names,
    gated_attention,
    gated_ffn,
    project_keys_values,
)
from ..modules.media_context import MediaContext
from ..modules.state import FusedState, Options, plain_state
from . import CannotFuseError, named_like_upstream
from ._transformers import activation_name, asked_for, hooked, model_dropin

children.RMS_NORM_CLASSES.add("MllamaTextRMSNorm")

# What a cached layer remembers, as an attribute of transformers' cache layer: it lives as long as the keys, and is copied
# with them.
_KEPT = "_mllm_fast_kept_tiles"


class Kept(NamedTuple):
    """Of `total` tiles those whose keys and values there are: their numbers [K], ascending."""

    tiles: Tensor
    total: int


# The tiles of the images that are being read; None: all are kept.
_filled: ContextVar[Kept | None] = ContextVar("mllm_fast_mllama_tiles", default=None)


@contextlib.contextmanager
def _keeping(kept: Kept) -> Iterator[None]:
    token = _filled.set(kept)
    try:
        yield
    finally:
        _filled.reset(token)


@model_dropin
class FusedMllamaModel(MllamaModel):
    """Drop-in for `MllamaModel`: with the fix "rows_without_image" it tells its layers which tiles are padding."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    @functools.wraps(MllamaModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream. With the fix, it waits once for a GPU to learn which tiles are filled, whenever images come."""
        kwargs |= dict(zip(_ARGUMENTS, args, strict=False))
        masks = kwargs.get("aspect_ratio_mask"), kwargs.get("cross_attention_mask")
        read = kwargs.get("pixel_values") is not None and all(mask is not None for mask in masks)
        serves = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not read or not serves or not self._mllm_fast.fixes("rows_without_image"):
            return super().forward(**kwargs)
        # Those of an image that no token sees yet are filled too; and what a token sees is, whatever the image's mask says.
        filled = (masks[0] != 0).flatten(1).any(dim=0)
        # Images that are cached already come first among those that tokens see.
        filled |= (masks[1] != 0).flatten(2).flatten(0, 1).any(dim=0)[-filled.numel() :]
        tiles = filled.nonzero().squeeze(1)
        if tiles.numel() in (0, filled.numel()):
            return super().forward(**kwargs)
        with _keeping(Kept(tiles, filled.numel())):
            return super().forward(**kwargs)


_ARGUMENTS = tuple(inspect.signature(MllamaModel.forward).parameters)[1:]


@named_like_upstream
class FusedMllamaCrossAttentionDecoderLayer(MllamaCrossAttentionDecoderLayer):
    """Drop-in for `MllamaCrossAttentionDecoderLayer`: grouped queries, q/k norms, keys and values in transformers' cache.

    A tile of an image is what the kernel knows as an image: a token's row of upstream's dense mask is read at the first
    vision token of each tile, and becomes a bit a tile.
    """

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        attention = module.cross_attn
        if activation_name(module.mlp.act_fn) != "silu":
            raise CannotFuseError(f"its feed-forward activation is {type(module.mlp.act_fn).__name__}, not SiLU")
        spec = GatedCrossAttentionSpec(
            heads=attention.num_heads,
            head_dim=attention.head_dim,
            kv_heads=attention.num_key_value_heads,
            activation="swiglu",
            scale=attention.scaling,
            names=Names(
                norm="input_layernorm",
                q="cross_attn.q_proj",
                k="cross_attn.k_proj",
                v="cross_attn.v_proj",
                q_norm="cross_attn.q_norm",
                k_norm="cross_attn.k_norm",
                out="cross_attn.o_proj",
                attn_gate="cross_attn_attn_gate",
                ffn_norm="post_attention_layernorm",
                ffn_up="mlp.up_proj",
                ffn_act_gate="mlp.gate_proj",
                ffn_down="mlp.down_proj",
                ffn_gate="cross_attn_mlp_gate",
            ),
        )
        return FusedState(type(module), options, spec, context)

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None,
        cross_attention_mask: Tensor | None,
        attention_mask: Tensor | None,
        full_text_row_masked_out_mask: Tensor | None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """As upstream: hidden_states [B, S, D], cross_attention_states [B * images * tiles, tokens, D].

        cross_attention_mask is [B, 1, S, images * tiles * tokens], 0 where a token sees a vision token, and
        full_text_row_masked_out_mask [B, 1, S, 1], 0 for tokens that see no image. Upstream lets such tokens attend to
        every tile, padding included; with the fix "rows_without_image" their attention is 0, as in Meta's own code.
        """
        tokens = self._tokens(cross_attention_states, past_key_values)
        index, batch = self.cross_attn.layer_idx, hidden_states.shape[0]
        layer = _cached(past_key_values, index)
        bypassed = (self.cross_attn, self.mlp, self.mlp.act_fn)
        # Without a mask SDPA takes several text rows for causal; a mask that other tools made may differ within a tile.
        odd = cross_attention_mask is None and hidden_states.shape[1] > 1
        if (
            odd
            or tokens is None
            or any(map(hooked, bypassed))
            or asked_for("output_attentions", self.cross_attn, kwargs)
        ):
            kept = None if tokens is None else _after(layer, cross_attention_states, tokens, batch, None)
            if kept is not None and cross_attention_mask is not None:
                by_tile = cross_attention_mask.unflatten(-1, (kept.total, -1))
                cross_attention_mask = by_tile.index_select(-2, kept.tiles.to(by_tile.device)).flatten(-2)
            out = super().forward(
                hidden_states,
                cross_attention_states,
                cross_attention_mask,
                attention_mask,
                full_text_row_masked_out_mask,
                position_ids,
                past_key_values,
                use_cache,
                position_embeddings,
                **kwargs,
            )
            _remember(_cached(past_key_values, index), kept)
            return out
        state, spec = self._mllm_fast, self._mllm_fast.spec
        # A cache of a fixed size has room for all of them.
        new = None if getattr(layer, "is_compileable", False) else _filled.get()
        kept = _after(layer, cross_attention_states, tokens, batch, new)
        k, v = self._keys_values(cross_attention_states, past_key_values, batch, new)
        _remember(_cached(past_key_values, index), kept)
        rows = None
        if full_text_row_masked_out_mask is not None:
            rows = state.shared.visibility(
                full_text_row_masked_out_mask, "rows", lambda: full_text_row_masked_out_mask[:, 0, :, 0] != 0
            )
        dropped = rows is not None and state.fixes("rows_without_image")
        visibility = None
        if cross_attention_mask is not None:
            visibility = state.shared.visibility(
                cross_attention_mask,
                ("tiles", tokens, dropped, None if kept is None else kept.tiles.numel()),
                lambda: _tiles(cross_attention_mask, tokens, rows if dropped else None, kept),
            )
        hidden_states = gated_attention(
            self,
            spec,
            state,
            hidden_states,
            (k, v),
            visibility,
            attention_dropout=self.cross_attn.dropout if self.training else 0.0,
        )
        return gated_ffn(self, spec, state, hidden_states, row_mask=rows)

    def _tokens(self, states: Tensor | None, cache: Any) -> int | None:
        """Vision tokens of a tile: those of the states, or, once keys and values are cached, as many as there were."""
        extra = self._mllm_fast.extra
        if states is not None:
            extra["tokens"] = states.shape[1]
        elif cache is None:
            return None
        return extra.get("tokens")

    def _keys_values(
        self, states: Tensor | None, cache: Any, batch: int, new: Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, tiles * tokens, kv_heads, head_dim] each, after the key norm, of all images and the tiles that are kept."""
        index = self.cross_attn.layer_idx
        if states is None:
            return cache.layers[index].keys.transpose(1, 2), cache.layers[index].values.transpose(1, 2)
        states = states.unflatten(0, (batch, -1))
        if new is not None:
            states = states.index_select(1, new.tiles.to(states.device))
        k, v = project_keys_values(self, self._mllm_fast.spec, states.flatten(1, 2))
        if cache is None:
            return k, v
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), index)
        return k.transpose(1, 2), v.transpose(1, 2)


def _tiles(mask: Tensor, tokens: int, rows: Tensor | None, kept: Kept | None) -> MediaSubsets:
    seen = mask[:, 0, :, ::tokens] == 0
    if rows is not None:
        seen = torch.logical_and(seen, rows.unsqueeze(-1))
    if kept is not None:
        seen = seen.index_select(-1, kept.tiles.to(seen.device))
    return MediaSubsets.from_mask(seen, tokens)


def _cached(cache: Any, index: int) -> Any:
    """transformers' cache layer; None without a cache, or before it has one."""
    return cache.layers[index] if cache is not None and index < len(cache.layers) else None


def _remembered(layer: Any, tokens: int) -> Kept | None:
    """Of the keys in a cache layer, which tiles they are; None: all. What was reset or cropped since is not known."""
    kept: Kept | None = getattr(layer, _KEPT, None)
    held = layer.get_seq_length() if kept is not None else 0
    return kept if kept is not None and held == kept.tiles.numel() * tokens else None


def _remember(layer: Any, kept: Kept | None) -> None:
    if layer is not None and (kept is not None or hasattr(layer, _KEPT)):
        setattr(layer, _KEPT, kept)


def _after(layer: Any, states: Tensor | None, tokens: int, batch: int, new: Kept | None) -> Kept | None:
    """Which tiles the keys are of once those of `states` [batch * tiles, tokens, D] are added; `new`: those of `states`."""
    before = _remembered(layer, tokens)
    if states is None or (before is None and new is None):
        return before
    if new is None:
        count = states.shape[0] // batch
        new = Kept(torch.arange(count, device=states.device), count)
    if before is None:
        held = 0 if layer is None else int(layer.get_seq_length()) // tokens
        if not held:
            return new
        before = Kept(torch.arange(held, device=new.tiles.device), held)
    return Kept(torch.cat((before.tiles, new.tiles + before.total)), before.total + new.total)

"""HF Mllama (Llama 3.2 Vision): the gated cross-attention layers of its language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

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
from ..modules.state import FusedState, Options
from . import CannotFuseError, named_like_upstream
from ._transformers import activation_name, asked_for, hooked

children.RMS_NORM_CLASSES.add("MllamaTextRMSNorm")


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
        bypassed = (self.cross_attn, self.mlp, self.mlp.act_fn)
        # Without a mask SDPA takes several text rows for causal; a mask that other tools made may differ within a tile.
        odd = cross_attention_mask is None and hidden_states.shape[1] > 1
        if (
            odd
            or tokens is None
            or any(map(hooked, bypassed))
            or asked_for("output_attentions", self.cross_attn, kwargs)
        ):
            return super().forward(
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
        state, spec = self._mllm_fast, self._mllm_fast.spec
        k, v = self._keys_values(cross_attention_states, past_key_values, hidden_states.shape[0])
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
                ("tiles", tokens, dropped),
                lambda: _tiles(cross_attention_mask, tokens, rows if dropped else None),
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

    def _keys_values(self, states: Tensor | None, cache: Any, batch: int) -> tuple[Tensor, Tensor]:
        """[B, images * tiles * tokens, kv_heads, head_dim] each, after the key norm."""
        index = self.cross_attn.layer_idx
        if states is None:
            return cache.layers[index].keys.transpose(1, 2), cache.layers[index].values.transpose(1, 2)
        k, v = project_keys_values(self, self._mllm_fast.spec, states.reshape(batch, -1, states.shape[-1]))
        if cache is None:
            return k, v
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), index)
        return k.transpose(1, 2), v.transpose(1, 2)


def _tiles(mask: Tensor, tokens: int, rows: Tensor | None) -> MediaSubsets:
    seen = mask[:, 0, :, ::tokens] == 0
    if rows is not None:
        seen = torch.logical_and(seen, rows.unsqueeze(-1))
    return MediaSubsets.from_mask(seen, tokens)

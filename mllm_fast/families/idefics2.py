"""HF Idefics2 (transformers.models.idefics2): the connector, which is a projection and a Perceiver resampler."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector, Idefics2PerceiverResampler

from ..kernels.attention import Mask
from ..modules import children
from ..modules.graphs import replayed
from ..modules.media_context import MediaContext
from ..modules.perceiver_resampler import LayerNames, PerceiverResamplerSpec, resample
from ..modules.state import FusedState, Options
from . import CannotFuseError, named_like_upstream
from ._transformers import activation_name, asked_for, hooked, model_dropin

children.RMS_NORM_CLASSES.add("Idefics2RMSNorm")


@model_dropin
class FusedIdefics2PerceiverResampler(Idefics2PerceiverResampler):
    """Drop-in for `Idefics2PerceiverResampler`: grouped queries, RMS norms, and a mask of the real patches."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        if len(module.layers) == 0:
            raise CannotFuseError("a resampler without layers is only its norm")
        for layer in module.layers:
            if activation_name(layer.mlp.act_fn) != "silu":
                raise CannotFuseError(f"its feed-forward activation is {type(layer.mlp.act_fn).__name__}, not SiLU")
        attention = module.layers[0].self_attn
        layers = tuple(
            LayerNames(
                norm_media=f"layers.{i}.input_context_norm",
                norm_latents=f"layers.{i}.input_latents_norm",
                q=f"layers.{i}.self_attn.q_proj",
                k=f"layers.{i}.self_attn.k_proj",
                v=f"layers.{i}.self_attn.v_proj",
                out=f"layers.{i}.self_attn.o_proj",
                ffn_norm=f"layers.{i}.post_attention_layernorm",
                ffn_up=f"layers.{i}.mlp.up_proj",
                ffn_act_gate=f"layers.{i}.mlp.gate_proj",
                ffn_down=f"layers.{i}.mlp.down_proj",
            )
            for i in range(len(module.layers))
        )
        spec = PerceiverResamplerSpec(
            attention.num_heads, attention.head_dim, attention.num_key_value_heads, "swiglu", "latents", layers, "norm"
        )
        return FusedState(type(module), options, spec, context)

    @replayed
    def forward(self, context: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """As upstream: context [N, patches, D] and attention_mask [N, patches] (not 0: a real patch) -> [N, latents, D]."""
        bypassed = [child for layer in self.layers for child in (layer, layer.self_attn, layer.mlp, layer.mlp.act_fn)]
        drops = self.training and self.config.attention_dropout > 0
        wanted = asked_for("output_attentions", self, kwargs) or asked_for("output_hidden_states", self, kwargs)
        if drops or wanted or attention_mask.ndim != 2 or any(map(hooked, bypassed)):
            return super().forward(context, attention_mask, **kwargs)
        state = self._mllm_fast
        return resample(self, state.spec, state, context, Mask(key_padding=attention_mask != 0))


@named_like_upstream
class FusedIdefics2Connector(Idefics2Connector):
    """Drop-in for `Idefics2Connector`: the gated projection in two ops, then the resampler."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        if activation_name(module.modality_projection.act_fn) != "silu":
            raise CannotFuseError("the activation of its projection is not SiLU")
        return FusedState(type(module), options, None, context)

    def forward(self, image_hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """As upstream: image_hidden_states [N, patches, D_vision], attention_mask [N, patches] -> [N, latents, D]."""
        mlp = self.modality_projection
        if children.hooked(mlp) or children.hooked(mlp.act_fn):
            return super().forward(image_hidden_states, attention_mask)
        packs = self._mllm_fast.packs
        hidden = children.norm_linear(
            image_hidden_states, None, mlp.up_proj, activation="swiglu", gate=mlp.gate_proj, packs=packs
        )
        projected = children.norm_linear(hidden, None, mlp.down_proj, packs=packs)
        return self.perceiver_resampler(context=projected, attention_mask=attention_mask)

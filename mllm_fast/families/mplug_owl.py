"""mPLUG-Owl (mllm_fast.models.mplug_owl, the original's classes in plain PyTorch): vision layers, visual abstractor.

The rest needs no drop-in: the models put image rows in by index, and encode images once for a whole generation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..models.mplug_owl_vision import (
    MplugOwlVisionEncoderLayer,
    MplugOwlVisualAbstractorEncoder,
    MplugOwlVisualAbstractorLayer,
)
from ..modules.media_context import MediaContext
from ..modules.state import FusedState, Options, plain_state
from ..modules.vision_layer import VisionLayerSpec, run_vision_layer
from ..modules.visual_abstractor import AbstractorLayerSpec, Layer, LayerNames, project_image, run_layer
from . import named_like_upstream, state_of
from ._transformers import activation_name, runs_plain

# The keyword by which a fused encoder tells its layers that they are given keys and values instead of the image.
PROJECTED = "mllm_fast_projected"

_NAMES = LayerNames(
    norm_queries="crossattention.norm1",
    norm_image="crossattention.normk",
    query="crossattention.attention.query",
    key="crossattention.attention.key",
    value="crossattention.attention.value",
    out="crossattention.output.out_proj",
    ffn_norm="crossattention.output.norm2",
    ffn_gate="crossattention.output.mlp.w1",
    ffn_up="crossattention.output.mlp.w3",
    ffn_inner_norm="crossattention.output.mlp.ffn_ln",
    ffn_down="crossattention.output.mlp.w2",
)


@named_like_upstream
class FusedMplugOwlVisionEncoderLayer(MplugOwlVisionEncoderLayer):
    """Drop-in for `MplugOwlVisionEncoderLayer`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        spec = VisionLayerSpec(
            heads=module.self_attn.num_heads,
            head_dim=module.self_attn.head_dim,
            activation=activation_name(module.mlp.activation_fn),
            interleaved=True,
            attention_norm="input_layernorm",
            qkv="self_attn.query_key_value",
            out="self_attn.dense",
            ffn_norm="post_attention_layernorm",
            up="mlp.fc1",
            down="mlp.fc2",
        )
        return FusedState(type(module), options, spec, context)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        if runs_plain(attention, (attention, mlp, mlp.activation_fn), kwargs):
            return super().forward(hidden_states, **kwargs)
        dropout_p = attention.attention_dropout if attention.training else 0.0
        return run_vision_layer(self, self._mllm_fast.spec, self._mllm_fast, hidden_states, dropout_p=dropout_p)


@named_like_upstream
class FusedMplugOwlVisualAbstractorLayer(MplugOwlVisualAbstractorLayer):
    """Drop-in for `MplugOwlVisualAbstractorLayer`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        attention = module.crossattention.attention
        spec = AbstractorLayerSpec(attention.num_attention_heads, attention.attention_head_size, _NAMES)
        return FusedState(type(module), options, spec, context)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        projected = kwargs.pop(PROJECTED, False)
        if not projected and _layer_runs_plain(self, kwargs):
            return super().forward(hidden_states, encoder_hidden_states, encoder_attention_mask, **kwargs)
        attention = self.crossattention.attention
        return run_layer(
            Layer(self, self._mllm_fast.spec, self._mllm_fast),
            hidden_states,
            encoder_hidden_states,
            projected=projected,
            image_mask=encoder_attention_mask,
            dropout_p=attention.attention_dropout if attention.training else 0.0,
        )


def _layer_runs_plain(layer: nn.Module, kwargs: dict[str, Any]) -> bool:
    cross = layer.crossattention
    bypassed = (cross, cross.attention, cross.output, cross.output.mlp, cross.output.mlp.act)
    return runs_plain(cross.attention, bypassed, kwargs)


@named_like_upstream
class FusedMplugOwlVisualAbstractorEncoder(MplugOwlVisualAbstractorEncoder):
    """Drop-in for `MplugOwlVisualAbstractorEncoder`: projects the image for all layers at once."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        image, mask = encoder_hidden_states, encoder_attention_mask
        fused = [state_of(layer) is not None and not _layer_runs_plain(layer, kwargs) for layer in self.layers]
        layers = [
            Layer(layer, state_of(layer).spec, state_of(layer))
            for layer, f in zip(self.layers, fused, strict=True)
            if f
        ]
        projections = iter(project_image(layers, self._mllm_fast, image))
        for layer, runs_fused in zip(self.layers, fused, strict=True):
            projected = next(projections) if runs_fused else None
            # What may need gradients goes by position, where reentrant checkpointing looks for it.
            if projected is None:
                hidden_states = layer(hidden_states, image, mask, **kwargs)
            else:
                hidden_states = layer(hidden_states, projected, mask, **kwargs, **{PROJECTED: True})
        return BaseModelOutput(last_hidden_state=hidden_states)

"""BLIP's, BLIP-2's and InstructBLIP's vision models: layers of EVA's ViT-g, and whole models for CUDA graphs alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip_2.modeling_blip_2 import Blip2EncoderLayer, Blip2VisionModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipEncoderLayer, InstructBlipVisionModel
from transformers.models.instructblipvideo.modeling_instructblipvideo import (
    InstructBlipVideoEncoderLayer,
    InstructBlipVideoVisionModel,
)

from ..modules.graphs import replayed
from ..modules.media_context import MediaContext
from ..modules.state import FusedState, Options, needs_graph, plain_state
from ..modules.vision_layer import VisionLayerSpec, run_vision_layer
from . import named_like_upstream
from ._transformers import activation_name, model_dropin, runs_plain


class _LayerState:
    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        spec = VisionLayerSpec(
            heads=module.self_attn.num_heads,
            head_dim=module.self_attn.head_dim,
            activation=activation_name(module.mlp.activation_fn),
            interleaved=False,
            attention_norm="layer_norm1",
            qkv="self_attn.qkv",
            out="self_attn.projection",
            ffn_norm="layer_norm2",
            up="mlp.fc1",
            down="mlp.fc2",
        )
        return FusedState(type(module), options, spec, context)


def _run(layer: nn.Module, upstream: Callable[..., Tensor], x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    if runs_plain(attention, (attention, mlp, mlp.activation_fn), kwargs) or _trains_narrow_on_cpu(layer, x):
        return upstream(x, **kwargs)
    dropout_p = attention.attention_dropout if attention.training else 0.0
    return run_vision_layer(layer, layer._mllm_fast.spec, layer._mllm_fast, x, dropout_p=dropout_p)


def _trains_narrow_on_cpu(layer: nn.Module, x: Tensor) -> bool:
    """Whether upstream is faster: for ViT-g's layer in bf16 on 2 cores, forward and backward take 1.04 times as long here.

    In inference they take 0.9 of the time, and in fp32 half, with or without backward.
    """
    narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return narrow and needs_graph(x, *layer.parameters())


@named_like_upstream
class FusedBlip2EncoderLayer(Blip2EncoderLayer, _LayerState):
    """Drop-in for `Blip2EncoderLayer`."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return _run(self, super().forward, hidden_states, kwargs)


@named_like_upstream
class FusedInstructBlipEncoderLayer(InstructBlipEncoderLayer, _LayerState):
    """Drop-in for `InstructBlipEncoderLayer`."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return _run(self, super().forward, hidden_states, kwargs)


@named_like_upstream
class FusedInstructBlipVideoEncoderLayer(InstructBlipVideoEncoderLayer, _LayerState):
    """Drop-in for `InstructBlipVideoEncoderLayer`."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return _run(self, super().forward, hidden_states, kwargs)


class _State:
    fused_state = staticmethod(plain_state)


@model_dropin
class FusedBlipVisionModel(BlipVisionModel, _State):
    """Drop-in for `BlipVisionModel` in a model fused with CUDA graphs."""

    @replayed
    @functools.wraps(BlipVisionModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@model_dropin
class FusedBlip2VisionModel(Blip2VisionModel, _State):
    """Drop-in for `Blip2VisionModel` in a model fused with CUDA graphs."""

    @replayed
    @functools.wraps(Blip2VisionModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@model_dropin
class FusedInstructBlipVisionModel(InstructBlipVisionModel, _State):
    """Drop-in for `InstructBlipVisionModel` in a model fused with CUDA graphs."""

    @replayed
    @functools.wraps(InstructBlipVisionModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@model_dropin
class FusedInstructBlipVideoVisionModel(InstructBlipVideoVisionModel, _State):
    """Drop-in for `InstructBlipVideoVisionModel` in a model fused with CUDA graphs."""

    @replayed
    @functools.wraps(InstructBlipVideoVisionModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

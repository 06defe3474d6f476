"""Decoder layers of LLaMA's kind while something is trained through them: the same result, far less kept for backward.

They are swapped by `fuse(model, training=True)` only. Without a gradient to be kept, in a trace, and wherever a layer is
asked for something, or holds something, that is not known here (other adapters, hooks on its parts, attention weights,
trained weights other than LoRA's), upstream's forward runs over the children as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.idefics.modeling_idefics import IdeficsDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from ..kernels.quantized_linear import Lora, Projection
from ..modules import children
from ..modules.decoder_layer import Call, FrozenNorm, gated_mlp, norm_projections, projection_residual
from ..modules.frozen_linear import FrozenLinearState
from ..modules.lora import read_lora
from ..modules.media_context import MediaContext
from ..modules.state import FusedState, Options
from . import CannotFuseError, class_path, named_like_upstream, state_of
from ._transformers import activation_name, asked_for, watched

children.RMS_NORM_CLASSES.update(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"))

# Attention that is softmax(q k^T) v over a mask that the model hands to every layer: torch's SDPA computes it.
ATTENTION = ("sdpa", "eager")
# PEFT's LoRA layers, whose term is read by `read_lora`, by the class that they had before they were fused.
LORA_LAYERS = frozenset(
    {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.bnb.Linear8bitLt"}
)


class _UnreadableError(Exception):
    """A child has to be called."""


def _state(module: nn.Module, options: Options, context: MediaContext) -> FusedState:
    if activation_name(module.mlp.act_fn) != "silu":
        raise CannotFuseError(f"its MLP's activation is {type(module.mlp.act_fn).__name__}, not SiLU")
    if getattr(module.self_attn, "qk_layer_norms", False):
        raise CannotFuseError("its attention normalises queries and keys")
    return FusedState(type(module), options)


def _trained_through(
    layer: Any, x: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    """The layer's output [B, S, h] for x [B, S, h]; None where upstream's forward has to give it."""
    if args or _upstream_serves(layer, x, kwargs):
        return None
    try:
        before, output, mlp = _calls(layer, x)
    except _UnreadableError:
        return None
    attention, past, positions = layer.self_attn, kwargs.pop("past_key_values", None), kwargs.get("position_embeddings")
    if positions is None:
        positions = attention.rotary_emb(x, kwargs["position_ids"])
    cos, sin = (t.to(before.dtype) for t in positions)
    results = norm_projections(x, dataclasses.replace(before, rotation=(cos, sin), turned=2))
    q, k, v = (y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for y in results)
    if past is not None:
        k, v = past.update(k, v, attention.layer_idx)
    dropout = getattr(attention, "attention_dropout", 0.0) if attention.training else 0.0
    attended, _ = sdpa_attention_forward(
        attention, q, k, v, attention_mask, dropout=dropout, scaling=attention.scaling, **kwargs
    )
    return gated_mlp(projection_residual(attended.flatten(2), x, output), mlp)


def _upstream_serves(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this call is none for the way of this file."""
    attention, mlp = layer.self_attn, layer.mlp
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return True
    if not x.requires_grad and not any(p.requires_grad for p in layer.parameters()):
        return True
    config = attention.config
    if config._attn_implementation not in ATTENTION or asked_for("output_attentions", attention, kwargs):
        return True
    if kwargs.get("position_embeddings") is None and kwargs.get("position_ids") is None:
        return True
    if layer.training and getattr(layer, "dropout", 0.0):  # Idefics drops entries of attention and of both branches
        return True
    return x.dim() != 3 or watched((attention, mlp, mlp.act_fn))


def _calls(layer: Any, x: Tensor) -> tuple[Call, Call, Call]:
    """What the three functions compute with: norm and q, k, v; o; norm and the MLP.

    Raises:
        _UnreadableError: a part has to be called.
    """
    device, attention, mlp = x.device.type, layer.self_attn, layer.mlp
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    before, after = (_norm(norm, x) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    qkv, output, gated = (
        tuple(_projection(child, x, dtype) for child in group)
        for group in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
    )
    return Call(dtype, qkv, before), Call(dtype, output), Call(dtype, gated, after)


def _norm(norm: nn.Module, x: Tensor) -> FrozenNorm:
    read = children.read_norm(norm)
    if read is None or read.kind != "rms_norm" or read.weight is None or read.weight.requires_grad:
        raise _UnreadableError
    # Between a 16-bit stream and an fp32 weight upstream promotes the stream, and all that follows.
    if torch.promote_types(read.weight.dtype, x.dtype) != x.dtype:
        raise _UnreadableError
    return FrozenNorm(read.weight, read.eps)


def _projection(layer: Any, x: Tensor, dtype: torch.dtype) -> Projection:
    """The layer's weight and term, where it computes in `dtype` and trains nothing but the term."""
    lora: Lora | None = None
    base = layer
    if hasattr(layer, "base_layer"):
        if _original(layer) not in LORA_LAYERS or children.hooked(layer):
            raise _UnreadableError
        base = layer.base_layer
        lora = read_lora(layer, x)
        if lora is None:
            raise _UnreadableError
    state = base.__dict__.get("_mllm_fast")
    bias = base._parameters.get("bias")
    if isinstance(state, FrozenLinearState):
        if children.hooked(base) or base.product_dtype(x.new_empty(0, dtype=dtype)) != dtype:
            raise _UnreadableError
        if state.spec.outliers is not None:
            raise _UnreadableError
        weight = base.frozen_weight()
    elif children.readable_linear(base) and base.weight.dtype == dtype and not base.weight.requires_grad:
        weight = base.weight
    else:
        raise _UnreadableError
    if bias is not None and (bias.requires_grad or bias.dtype != dtype):
        raise _UnreadableError
    return Projection.drawn(weight, bias, lora)


def _original(layer: nn.Module) -> str:
    state = state_of(layer)
    return class_path(type(layer) if state is None else state.original_class)


@named_like_upstream
class FusedLlamaDecoderLayer(LlamaDecoderLayer):
    """Drop-in for `LlamaDecoderLayer`."""

    _mllm_fast: FusedState
    fused_state = staticmethod(_state)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As upstream: [B, S, h] -> [B, S, h]."""
        y = _trained_through(self, hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs) if y is None else y


@named_like_upstream
class FusedMistralDecoderLayer(MistralDecoderLayer):
    """Drop-in for `MistralDecoderLayer`."""

    _mllm_fast: FusedState
    fused_state = staticmethod(_state)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As upstream: [B, S, h] -> [B, S, h]."""
        y = _trained_through(self, hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs) if y is None else y


@named_like_upstream
class FusedQwen2DecoderLayer(Qwen2DecoderLayer):
    """Drop-in for `Qwen2DecoderLayer`."""

    _mllm_fast: FusedState
    fused_state = staticmethod(_state)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As upstream: [B, S, h] -> [B, S, h]."""
        y = _trained_through(self, hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs) if y is None else y


@named_like_upstream
class FusedIdeficsDecoderLayer(IdeficsDecoderLayer):
    """Drop-in for `IdeficsDecoderLayer`."""

    _mllm_fast: FusedState
    fused_state = staticmethod(_state)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As upstream: [B, S, h] -> [B, S, h]."""
        y = _trained_through(self, hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs) if y is None else y

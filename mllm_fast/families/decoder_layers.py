"""Decoder layers of LLaMA's and OPT's kind while something is trained through them: far less is kept for backward.

They are swapped by `fuse(model, training=True)` only. Without a gradient to be kept, in a trace, and wherever a layer is
asked for something, or holds something, that is not known here (other adapters, hooks on its parts, attention weights,
trained weights other than LoRA's), upstream's forward runs over the children as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.idefics.modeling_idefics import IdeficsDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from ..kernels import seeds
from ..kernels.quantized_linear import Lora, Projection
from ..modules import children
from ..modules.children import resolve
from ..modules.decoder_attention import added_mask, masked_attention
from ..modules.decoder_layer import Activation, Call, FrozenNorm, mlp_residual, norm_projections, projection_residual
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
# What attention of transformers can be given that is beyond a mask.
BESIDE_A_MASK = frozenset({"cache", "position_bias", "softcap"})


@dataclass(frozen=True)
class _Parts:
    """Where a class has its children, and what it does between them.

    Attributes:
        norms: before attention and before the MLP.
        output: the projection of the attention's result.
        mlp: the MLP's projections; the last one's result is added to the stream.
        activation: the module.
        activations: which of them are served, by `activation_name`, each with its name for the MLP.
        uncalled: the modules that are read around, and not called.
        rotary: whether queries and keys are turned.
    """

    norms: tuple[str, str]
    output: str
    mlp: tuple[str, ...]
    activation: str
    activations: Mapping[str, Activation]
    uncalled: tuple[str, ...]
    rotary: bool


_LLAMA = _Parts(
    norms=("input_layernorm", "post_attention_layernorm"),
    output="self_attn.o_proj",
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    activation="mlp.act_fn",
    activations={"silu": "swiglu"},
    uncalled=("self_attn", "mlp", "mlp.act_fn"),
    rotary=True,
)
_OPT = _Parts(
    norms=("self_attn_layer_norm", "final_layer_norm"),
    output="self_attn.out_proj",
    mlp=("fc1", "fc2"),
    activation="activation_fn",
    activations={"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"},
    uncalled=("self_attn", "activation_fn"),
    rotary=False,
)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class _UnreadableError(Exception):
    """A child has to be called."""


def _state(module: nn.Module, options: Options, context: MediaContext) -> FusedState:
    _activation(module, _parts(module))
    if getattr(module.self_attn, "qk_layer_norms", False):
        raise CannotFuseError("its attention normalises queries and keys")
    if not getattr(module, "do_layer_norm_before", True):
        raise CannotFuseError("its norms follow attention and MLP instead of preceding them")
    return FusedState(type(module), options)


def _activation(layer: nn.Module, parts: _Parts) -> Activation:
    """The MLP's activation.

    Raises:
        CannotFuseError: it is none that is served here.
    """
    activation = resolve(layer, parts.activation)
    name = activation_name(activation)
    if name not in parts.activations:
        raise CannotFuseError(
            f"its MLP's activation is {type(activation).__name__}; expected {' or '.join(parts.activations)}"
        )
    return parts.activations[name]


def _parts(layer: nn.Module) -> _Parts:
    return _OPT if isinstance(layer, OPTDecoderLayer) else _LLAMA


def _trained_through(
    layer: Any, x: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    """The layer's output [B, S, h] for x [B, S, h]; None where upstream's forward has to give it."""
    parts = _parts(layer)
    if args or _upstream_serves(layer, parts, x, kwargs):
        return None
    try:
        before, output, mlp = _calls(layer, parts, x)
    except (_UnreadableError, CannotFuseError):
        return None
    attention, past = layer.self_attn, kwargs.pop("past_key_values", None)
    if parts.rotary:
        positions = kwargs.get("position_embeddings")
        if positions is None:
            positions = attention.rotary_emb(x, kwargs["position_ids"])
        cos, sin = (t.to(before.dtype) for t in positions)
        before = dataclasses.replace(before, rotation=(cos, sin), turned=2)
    results = norm_projections(x, before)
    q, k, v = (y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for y in results)
    if past is not None:
        k, v = past.update(k, v, attention.layer_idx)
    attended = _attended(attention, q, k, v, attention_mask, kwargs)
    return mlp_residual(projection_residual(attended, x, output), mlp)


def _attended(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """The attention's result [B, S, H * D] for q [B, H, S, D] and k, v [B, G, T, D]."""
    dropout = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0)) if attention.training else 0.0
    if mask is not None and not dropout and not BESIDE_A_MASK & kwargs.keys():
        return masked_attention(q, k, v, mask, attention.scaling).transpose(1, 2).flatten(2)
    mask = None if mask is None else added_mask(mask, q.dtype)
    attended, _ = sdpa_attention_forward(attention, q, k, v, mask, dropout=dropout, scaling=attention.scaling, **kwargs)
    return attended.flatten(2)


def _upstream_serves(layer: Any, parts: _Parts, x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this call is none for the way of this file."""
    attention = layer.self_attn
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return True
    if not x.requires_grad and not any(p.requires_grad for p in layer.parameters()):
        return True
    config = attention.config
    if config._attn_implementation not in ATTENTION or asked_for("output_attentions", attention, kwargs):
        return True
    if parts.rotary and kwargs.get("position_embeddings") is None and kwargs.get("position_ids") is None:
        return True
    return x.dim() != 3 or watched(resolve(layer, path) for path in parts.uncalled)


def _calls(layer: Any, parts: _Parts, x: Tensor) -> tuple[Call, Call, Call]:
    """What the three functions compute with: norm and q, k, v; the attention's output; norm and the MLP.

    Raises:
        _UnreadableError, CannotFuseError: a part has to be called.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    before, after = (_norm(resolve(layer, path), x) for path in parts.norms)
    qkv, output, mlp = (
        tuple(_projection(resolve(layer, path), x, dtype) for path in group)
        for group in (_QKV, (parts.output,), parts.mlp)
    )
    p = getattr(layer, "dropout", 0.0) if layer.training else 0.0
    return (
        Call(dtype, qkv, before),
        Call(dtype, output, dropout_p=p, seed=seeds.drawn(p, None)),
        Call(dtype, mlp, after, activation=_activation(layer, parts), dropout_p=p, seed=seeds.drawn(p, None)),
    )


def _norm(norm: nn.Module, x: Tensor) -> FrozenNorm:
    read = children.read_norm(norm)
    if read is None:
        raise _UnreadableError
    for parameter in (read.weight, read.bias):
        # Between a 16-bit stream and an fp32 weight upstream promotes the stream, and all that follows.
        if parameter is not None and (
            parameter.requires_grad or torch.promote_types(parameter.dtype, x.dtype) != x.dtype
        ):
            raise _UnreadableError
    return FrozenNorm(read)


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
    if bias is not None and bias.requires_grad:
        raise _UnreadableError
    if isinstance(state, FrozenLinearState):
        if children.hooked(base) or base.product_dtype(x.new_empty(0, dtype=dtype)) != dtype:
            raise _UnreadableError
        if state.spec.outliers is not None:
            raise _UnreadableError
        weight = base.frozen_weight()
        bias = None if bias is None else bias.to(dtype)  # as bitsandbytes does
    elif children.readable_linear(base) and not base.weight.requires_grad:
        weight = base.weight
        if any(t is not None and t.dtype != dtype for t in (weight, bias)):
            raise _UnreadableError
    else:
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


@named_like_upstream
class FusedOPTDecoderLayer(OPTDecoderLayer):
    """Drop-in for `OPTDecoderLayer`."""

    _mllm_fast: FusedState
    fused_state = staticmethod(_state)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As upstream: [B, S, h] -> [B, S, h]."""
        y = _trained_through(self, hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs) if y is None else y

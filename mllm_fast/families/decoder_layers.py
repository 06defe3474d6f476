"""Decoder layers of LLaMA's kind while something is trained through them: the same result, far less kept for backward.

They are swapped by `fuse(model, training=True)` only. Without a gradient to be kept, in a trace, and wherever a layer is
asked for something, or holds something, that is not known here (other adapters, hooks on its parts, attention weights,
trained weights other than LoRA's), upstream's forward runs over the children as they are.
"""

from __future__ import annotations

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

# Attention that is softmax(q k^T) v over a mask that the model hands to every layer: torch's SDPA computes it.
ATTENTION = ("sdpa", "eager")
# PEFT's LoRA layers, whose term is read by `read_lora`, by the class that they had before they were fused.
LORA_LAYERS = frozenset(
    {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.bnb.Linear8bitLt"}
)


class _Unreadable(Exception):
    """A child has to be called."""


class _TrainedThrough:
    """The forward that all these layers share; comes before the upstream class among a drop-in's bases."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        """The private state; raises CannotFuseError for configurations that no LLaMA has."""
        if activation_name(module.mlp.act_fn) != "silu":
            raise CannotFuseError(f"its MLP's activation is {type(module.mlp.act_fn).__name__}, not SiLU")
        if getattr(module.self_attn, "qk_layer_norms", False):
            raise CannotFuseError("its attention normalises queries and keys")
        return FusedState(type(module), options)

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As upstream: [B, S, h] -> [B, S, h]."""
        attention = self.self_attn
        if self._upstream_serves(hidden_states, kwargs):
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        try:
            before, output, mlp = self._calls(hidden_states)
        except _Unreadable:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        past = kwargs.pop("past_key_values", None)
        positions = kwargs.pop("position_embeddings", None)
        if positions is None:
            positions = attention.rotary_emb(hidden_states, kwargs["position_ids"])
        cos, sin = (t.to(before.dtype) for t in positions)
        before = Call(before.dtype, before.projections, before.norm, (cos, sin), turned=2)
        q, k, v = (
            y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for y in norm_projections(hidden_states, before)
        )
        if past is not None:
            k, v = past.update(k, v, attention.layer_idx)
        attended, _ = sdpa_attention_forward(
            attention, q, k, v, attention_mask, dropout=self._attention_dropout(), scaling=attention.scaling, **kwargs
        )
        hidden_states = projection_residual(attended.flatten(2), hidden_states, output)
        return gated_mlp(hidden_states, mlp)

    def _upstream_serves(self: Any, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether this call is none for the way of this file."""
        attention, mlp = self.self_attn, self.mlp
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return True
        if not x.requires_grad and not any(p.requires_grad for p in self.parameters()):
            return True
        config = attention.config
        if config._attn_implementation not in ATTENTION or asked_for("output_attentions", attention, kwargs):
            return True
        if kwargs.get("position_embeddings") is None and kwargs.get("position_ids") is None:
            return True
        if self.training and getattr(self, "dropout", 0.0):  # Idefics drops whole branches' entries
            return True
        return x.dim() != 3 or watched((attention, mlp, mlp.act_fn))

    def _attention_dropout(self: Any) -> float:
        attention = self.self_attn
        if not attention.training:
            return 0.0
        return float(getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0)))

    def _calls(self: Any, x: Tensor) -> tuple[Call, Call, Call]:
        """What the three functions compute with: norm and q, k, v; o; norm and the MLP.

        Raises:
            _Unreadable: a part has to be called.
        """
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
        attention, mlp = self.self_attn, self.mlp
        norms = [_norm(n, x) for n in (self.input_layernorm, self.post_attention_layernorm)]
        qkv = tuple(_projection(m, x, dtype) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
        output = _projection(attention.o_proj, x, dtype)
        gated = tuple(_projection(m, x, dtype) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        return Call(dtype, qkv, norms[0]), Call(dtype, (output,)), Call(dtype, gated, norms[1])


def _norm(norm: nn.Module, x: Tensor) -> FrozenNorm:
    read = children.read_norm(norm)
    if read is None or read.kind != "rms_norm" or read.weight is None or read.weight.requires_grad:
        raise _Unreadable
    # Between a 16-bit stream and an fp32 weight upstream promotes the stream, and all that follows.
    if torch.promote_types(read.weight.dtype, x.dtype) != x.dtype:
        raise _Unreadable
    return FrozenNorm(read.weight, read.eps)


def _projection(layer: Any, x: Tensor, dtype: torch.dtype) -> Projection:
    """The layer's weight and term, where it computes in `dtype` and trains nothing but the term."""
    lora: Lora | None = None
    base = layer
    if hasattr(layer, "base_layer"):
        if _original(layer) not in LORA_LAYERS or children.hooked(layer):
            raise _Unreadable
        base = layer.base_layer
        lora = read_lora(layer, x)
        if lora is None:
            raise _Unreadable
    state = base.__dict__.get("_mllm_fast")
    bias = base._parameters.get("bias")
    if isinstance(state, FrozenLinearState):
        if children.hooked(base) or base.product_dtype(x.new_empty(0, dtype=dtype)) != dtype:
            raise _Unreadable
        if state.spec.outliers is not None:
            raise _Unreadable
        weight = base.frozen_weight()
    elif children.readable_linear(base) and base.weight.dtype == dtype and not base.weight.requires_grad:
        weight = base.weight
    else:
        raise _Unreadable
    if bias is not None and (bias.requires_grad or bias.dtype != dtype):
        raise _Unreadable
    return Projection.drawn(weight, bias, lora)


def _original(layer: nn.Module) -> str:
    state = state_of(layer)
    return class_path(type(layer) if state is None else state.original_class)


@named_like_upstream
class FusedLlamaDecoderLayer(_TrainedThrough, LlamaDecoderLayer):
    """Drop-in for `LlamaDecoderLayer`."""


@named_like_upstream
class FusedMistralDecoderLayer(_TrainedThrough, MistralDecoderLayer):
    """Drop-in for `MistralDecoderLayer`."""


@named_like_upstream
class FusedQwen2DecoderLayer(_TrainedThrough, Qwen2DecoderLayer):
    """Drop-in for `Qwen2DecoderLayer`."""


@named_like_upstream
class FusedIdeficsDecoderLayer(_TrainedThrough, IdeficsDecoderLayer):
    """Drop-in for `IdeficsDecoderLayer`."""

"""HF Idefics (transformers.models.idefics): resampler, gated layers, and the model around them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.idefics.modeling_idefics import (
    IdeficsDecoupledEmbedding,
    IdeficsForVisionText2Text,
    IdeficsGatedCrossAttentionLayer,
    IdeficsModel,
)
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from .. import ops
from ..kernels.attention import MediaSubsets
from ..modules import children
from ..modules.gated_cross_attention import GatedCrossAttentionSpec, Names, gated_attention, gated_ffn
from ..modules.graphs import replayed
from ..modules.media_context import MediaContext, one_row_each
from ..modules.perceiver_resampler import LayerNames, PerceiverResamplerSpec, resample
from ..modules.state import FusedState, Options, plain_state, readable_on_host
from . import CannotFuseError, named_like_upstream, state_of
from ._ahead import KEYS_VALUES, project_ahead, taken
from ._transformers import activation_name, model_dropin

children.LINEAR_HEADS["IdeficsDecoupledLinear"] = lambda head: head.out_additional_features == 0

# The keyword by which a fused IdeficsModel hands its layers the [batch, length, images] mask it was given.
MEDIA_MASK = "mllm_fast_media_mask"
# Inputs of `generate` that hold one row per sample and need no copies for beams.
IMAGE_INPUTS = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings", "image_hidden_states")


@named_like_upstream
class FusedIdeficsGatedCrossAttentionLayer(IdeficsGatedCrossAttentionLayer):
    """Drop-in for `IdeficsGatedCrossAttentionLayer`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        attention = module.cross_attn
        if activation_name(module.mlp.act_fn) != "silu":
            raise CannotFuseError(f"its feed-forward activation is {type(module.mlp.act_fn).__name__}, not SiLU")
        spec = GatedCrossAttentionSpec(
            heads=attention.num_heads,
            head_dim=attention.head_dim,
            kv_heads=attention.num_heads,
            activation="swiglu",
            scale=attention.scaling,
            names=Names(
                norm="input_layernorm",
                q="cross_attn.q_proj",
                k="cross_attn.k_proj",
                v="cross_attn.v_proj",
                q_norm="cross_attn.q_layer_norm" if attention.qk_layer_norms else None,
                k_norm="cross_attn.k_layer_norm" if attention.qk_layer_norms else None,
                out="cross_attn.o_proj",
                attn_gate="alpha_cross_attn",
                ffn_norm="post_attention_layernorm",
                ffn_up="mlp.up_proj",
                ffn_act_gate="mlp.gate_proj",
                ffn_down="mlp.down_proj",
                ffn_gate="alpha_dense",
            ),
        )
        return FusedState(type(module), options, spec, context)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """As upstream: hidden_states [B, S, D], image_hidden_states [B_media, images * tokens, D_image].

        Inside a fused `IdeficsModel` the layer is told which images each token sees. Called by itself it reads that off
        the caller's dense mask.
        """
        media_mask = kwargs.pop(MEDIA_MASK, None)
        bypassed = (self.act_cross_attn, self.act_dense, self.mlp, self.mlp.act_fn)
        missing = image_hidden_states is None or cross_attention_gate is None or past_key_values is not None
        if missing or any(children.hooked(child) for child in bypassed):
            if image_hidden_states is not None:
                if media_mask is not None:
                    image_attention_mask = _dense_mask(media_mask, image_hidden_states)
                image_hidden_states = one_row_each(image_hidden_states, hidden_states.shape[0])
            return super().forward(  # which also says what is missing
                hidden_states,
                attention_mask,
                image_hidden_states,
                image_attention_mask=image_attention_mask,
                cross_attention_gate=cross_attention_gate,
                past_key_values=past_key_values,
                **kwargs,
            )
        state, spec = self._mllm_fast, self._mllm_fast.spec
        # Upstream stores config.dropout, a float, under the name `config`.
        dropout_p = self.config if self.training else 0.0
        seen: tuple[Tensor, MediaSubsets | None] | None = None
        if not children.hooked(self.cross_attn) and not self._reproduces_eager_fp16(hidden_states):
            if media_mask is not None:
                seen = _seen_images(state.shared, image_hidden_states, media_mask)
            else:
                seen = _seen_tokens(state.shared, image_hidden_states, image_attention_mask, cross_attention_gate)
        if seen is None:
            if media_mask is not None:
                image_attention_mask = _dense_mask(media_mask, image_hidden_states)
            hidden_states = self._attend_upstream(
                hidden_states, image_hidden_states, image_attention_mask, cross_attention_gate, dropout_p, kwargs
            )
        else:
            media, visibility = seen
            rows = state.shared.visibility(cross_attention_gate, "rows", lambda: cross_attention_gate != 0)
            hidden_states = gated_attention(
                self,
                spec,
                state,
                hidden_states,
                media,
                visibility,
                row_mask=rows,
                attention_dropout=self.cross_attn.dropout if self.training else 0.0,
                dropout_p=dropout_p,
            )
        return gated_ffn(self, spec, state, hidden_states, dropout_p)

    def _reproduces_eager_fp16(self, hidden_states: Tensor) -> bool:
        """Eager fp16 attention has NaN gradients in rows that see no image; without the fix they stay NaN."""
        return (
            hidden_states.dtype == torch.float16
            and torch.is_grad_enabled()
            and self.cross_attn.config._attn_implementation == "eager"
            and not self._mllm_fast.fixes("masked_row_gradients")
        )

    def _attend_upstream(
        self,
        hidden_states: Tensor,
        image_hidden_states: Tensor,
        mask: Tensor | None,
        gate: Tensor,
        dropout_p: float,
        kwargs: dict[str, Any],
    ) -> Tensor:
        attended, _ = self.cross_attn(
            hidden_states=children.normalize(hidden_states, self.input_layernorm),
            key_value_states=one_row_each(image_hidden_states, hidden_states.shape[0]),
            attention_mask=mask,
            **kwargs,
        )
        attended = nn.functional.dropout(attended, dropout_p, dropout_p > 0)
        return ops.gated_residual(hidden_states, attended, self.alpha_cross_attn, gate != 0)


def _seen_images(context: MediaContext, image_hidden_states: Tensor, media_mask: Tensor) -> tuple[Tensor, MediaSubsets]:
    """The media as [B_media, images, tokens, D], and who sees which image, from the [B, S, images] mask."""
    images, length = media_mask.shape[-1], image_hidden_states.shape[1]
    tokens = length // images
    seen = context.visibility(media_mask, ("images", tokens), lambda: MediaSubsets.from_mask(media_mask, tokens))
    return image_hidden_states.unflatten(1, (images, tokens)), seen


def _seen_tokens(
    context: MediaContext, image_hidden_states: Tensor, mask: Tensor | None, gate: Tensor
) -> tuple[Tensor, MediaSubsets | None] | None:
    """The same for a layer that is called by itself, from the caller's dense [B, 1, S, keys] mask: each key is an image.

    None where upstream's attention has to run: the mask holds other numbers than 0 and the lowest of its type, or a row
    that sees nothing is not switched off by the gate (upstream then attends to everything). To find out means to read
    the mask, which a GPU would have to be waited for.
    """
    media = image_hidden_states.unsqueeze(2)
    if mask is None:
        return media, None
    if not readable_on_host(mask) or mask.shape[1] != 1 or not mask.is_floating_point():
        return None
    rows = gate.shape

    def build() -> tuple[MediaSubsets, Tensor] | None:
        visible = mask[:, 0] == 0
        if not bool((visible | (mask[:, 0] == torch.finfo(mask.dtype).min)).all()):
            return None
        visible = visible.expand(*rows, -1)
        return MediaSubsets.from_mask(visible, 1), visible.any(dim=-1)

    built = context.visibility(mask, ("dense", rows), build)
    if built is None or bool(((gate != 0) & ~built[1]).any()):
        return None
    return media, built[0]


def _dense_mask(media_mask: Tensor, image_hidden_states: Tensor) -> Tensor:
    """The additive [B, 1, S, images * tokens] mask of upstream, for the paths that run upstream's attention."""
    tokens = image_hidden_states.shape[1] // media_mask.shape[-1]
    hidden = ~media_mask.repeat_interleave(tokens, dim=-1)[:, None]
    dense = torch.zeros(hidden.shape, dtype=image_hidden_states.dtype, device=hidden.device)
    return dense.masked_fill(hidden, torch.finfo(dense.dtype).min)


@named_like_upstream
class FusedIdeficsPerceiverResampler(IdeficsPerceiverResampler):
    """Drop-in for `IdeficsPerceiverResampler`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        if len(module.blocks) == 0:
            raise CannotFuseError("a resampler without layers is only its norm")
        if any(type(mlp.act) is not nn.ReLU for _, mlp in module.blocks):
            raise CannotFuseError("its feed-forward activation is not ReLU")
        qk_norm = module.qk_layer_norms
        layers = tuple(
            LayerNames(
                norm_media=f"blocks.{i}.0.context_layer_norm",
                norm_latents=f"blocks.{i}.0.latents_layer_norm",
                q=f"blocks.{i}.0.q_proj",
                k=f"blocks.{i}.0.k_proj",
                v=f"blocks.{i}.0.v_proj",
                q_norm=f"blocks.{i}.0.q_layer_norm" if qk_norm else None,
                k_norm=f"blocks.{i}.0.k_layer_norm" if qk_norm else None,
                out=f"blocks.{i}.0.output_proj",
                ffn_norm=f"blocks.{i}.1.ln",
                ffn_up=f"blocks.{i}.1.fc",
                ffn_down=f"blocks.{i}.1.c_proj",
            )
            for i in range(len(module.blocks))
        )
        spec = PerceiverResamplerSpec(
            module.n_heads, module.head_dim, module.n_heads, "relu", "latents", layers, "layer_norm"
        )
        return FusedState(type(module), options, spec, context)

    @replayed
    def forward(self, context: Tensor) -> Tensor:
        """As upstream: context [N, tokens, D] -> [N, latents, D]."""
        bypassed = [child for pair in self.blocks for child in (pair, *pair, pair[1].act)]
        if any(children.hooked(child) for child in bypassed):
            return super().forward(context)
        state = self._mllm_fast
        return resample(self, state.spec, state, context)


@named_like_upstream
class FusedIdeficsDecoupledEmbedding(IdeficsDecoupledEmbedding):
    """Drop-in for `IdeficsDecoupledEmbedding`: looks both tables up at once, and waits for no list of the added tokens."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    def forward(self, input_ids: Tensor) -> Tensor:
        """As upstream: [B, L] -> [B, L, D]; ids from num_embeddings on are rows of the additional table."""
        added = self.additional_embedding if self.num_additional_embeddings else None
        if added is None or type(added) is not nn.Embedding or children.hooked(added) or input_ids.ndim != 2:
            return super().forward(input_ids)
        index = (input_ids - self.num_embeddings).clamp(min=-1)
        return ops.splice_rows(self.weight, added.weight, index, token_ids=input_ids)


@model_dropin
class FusedIdeficsModel(IdeficsModel):
    """Drop-in for `IdeficsModel`: hands the layers the small image mask, so that the dense one is never built."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; text rows may be a multiple of the image rows (beams share their sample's images)."""
        keys_values, mask = kwargs.pop(KEYS_VALUES, None), kwargs.get("image_attention_mask")
        if mask is None or args or not _all_layers_fused(self):
            return super().forward(*args, **kwargs)
        text = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if kwargs.get("attention_mask") is None and text is not None:
            past = kwargs.get("past_key_values")
            length = text.shape[1] + (past.get_seq_length() if past is not None else 0)
            # Upstream would make this mask with one row per image row.
            kwargs["attention_mask"] = torch.ones((text.shape[0], length), dtype=torch.bool, device=text.device)
        sources = (kwargs.get(name) for name in IMAGE_INPUTS)
        images = next((source.shape[1] for source in sources if source is not None), mask.shape[-1])
        if images != mask.shape[-1]:
            raise ValueError(
                f"image_attention_mask names {mask.shape[-1]} images but {images} were given; give the mask one column "
                "per image"
            )
        self._encode_images(kwargs)
        mask = mask.bool()
        # Upstream spreads the mask it gets over all image tokens. One column, "sees any image", is all it needs for the
        # gate of the rows that see none.
        kwargs["image_attention_mask"] = mask.any(dim=-1, keepdim=True)
        with taken(self._mllm_fast, self.gated_cross_attn_layers, keys_values):
            return super().forward(**kwargs, **{MEDIA_MASK: mask})

    def _encode_images(self, kwargs: dict[str, Any]) -> None:
        """With CUDA graphs: put what vision encoder and resampler make of the pixels in their place, in one replay."""
        state, pixels = self._mllm_fast, kwargs.get("pixel_values")
        others = (kwargs.get(name) for name in IMAGE_INPUTS[1:])
        if state.graphs is None or pixels is None or any(other is not None for other in others):
            return
        parts = [self.vision_model, *([self.perceiver_resampler] if self.config.use_resampler else [])]

        def encode(pixels: Tensor, interpolate_pos_encoding: bool) -> Tensor:
            encoded = self.vision_model(pixels, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
            return parts[1](encoded) if len(parts) == 2 else encoded

        flat = pixels.to(self.device, self.dtype).flatten(0, 1)
        interpolate = kwargs.get("interpolate_pos_encoding", False)
        encoded = state.graphs.call(state.shared.capture, parts, encode, (flat, interpolate))
        name = "perceiver_embeddings" if len(parts) == 2 else "image_encoder_embeddings"
        kwargs |= {"pixel_values": None, name: encoded.unflatten(0, pixels.shape[:2])}


@model_dropin
class FusedIdeficsForVisionText2Text(IdeficsForVisionText2Text):
    """Drop-in for `IdeficsForVisionText2Text`: beams and returned sequences share one copy of their sample's images."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._mllm_fast.shared.clear()

    @functools.wraps(IdeficsForVisionText2Text.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if _all_layers_fused(self.model):
            name = "perceiver_embeddings" if self.config.use_resampler else "image_encoder_embeddings"
            project_ahead(self._mllm_fast, self.model.gated_cross_attn_layers, inputs.get(name), inputs)
        return inputs

    def _expand_inputs_for_generation(self, **model_kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        if not _all_layers_fused(self.model):
            return super()._expand_inputs_for_generation(**model_kwargs)
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(**model_kwargs)
        return input_ids, {**model_kwargs, **images}


def _all_layers_fused(model: IdeficsModel) -> bool:
    """Only our layers understand the small mask and let text rows share media rows."""
    return state_of(model) is not None and all(state_of(layer) is not None for layer in model.gated_cross_attn_layers)

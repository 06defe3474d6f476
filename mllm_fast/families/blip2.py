"""HF BLIP-2 (transformers.models.blip_2): the Q-Former, and the models around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2ImageTextMatchingModelOutput,
    Blip2QFormerLayer,
    Blip2QFormerModel,
    capture_outputs,
    merge_with_config_defaults,
)

from ..modules import children
from ..modules.state import FusedState
from . import named_like_upstream, state_of
from ._qformer_style import (
    CALL,
    LayerState,
    ModelState,
    check_image_tokens,
    encode,
    expand_images,
    hooked,
    only_queries,
    register_outputs,
    run,
    runs_upstream,
)


@named_like_upstream
class FusedBlip2QFormerLayer(Blip2QFormerLayer, LayerState):
    """Drop-in for `Blip2QFormerLayer`: fused inside a fused Q-Former, upstream's own when called by itself."""

    _mllm_fast: FusedState

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_length: int = 0,
        **kwargs: Any,
    ) -> Tensor:
        call = kwargs.pop(CALL, None)
        if call is not None:
            return run(self, hidden_states, encoder_hidden_states, call)
        return super().forward(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, query_length, **kwargs
        )


def embed(model: nn.Module, x: Tensor, norm: nn.Module, dropout: nn.Module) -> Tensor:
    """dropout(norm(x)) of embeddings x [B, S, D], in the norm's dtype; one row of it where the batch shares one."""
    state: FusedState = model._mllm_fast
    drops = dropout.training and dropout.p > 0
    batch = x.shape[0]
    if state.options.level >= 1 and batch > 1 and x.stride(0) == 0 and not drops and not hooked(dropout):
        x = x[:1]
    x = children.normalize(x.to(norm.weight.dtype), norm)
    return (dropout(x) if drops or hooked(dropout) else x).expand(batch, -1, -1)


@named_like_upstream
class FusedBlip2QFormerModel(Blip2QFormerModel, ModelState):
    """Drop-in for `Blip2QFormerModel`."""

    _mllm_fast: FusedState

    def forward(
        self,
        query_embeds: Tensor,
        query_length: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, and images may be shared.

        Args:
            query_embeds: [B, S, D], queries and then text; a batch made by `expand` is known to be one row.
            query_length: rows of it that are queries; default all, 0 for text alone.
            attention_mask: [B, S].
            encoder_hidden_states: [I, M, D_image] features of the images. I may be less than B: row b reads image
                image_index[b], by default b // (B / I). A batch made by `expand` is known to be one image.
            encoder_attention_mask: [I, M].
            image_index: [B] int64.
        """
        register_outputs(self)
        image = encoder_hidden_states
        if image is not None and image.shape[0] > 1 and image.stride(0) == 0 and image_index is None:
            image, image_index = image[:1], image.new_zeros(query_embeds.shape[0], dtype=torch.int64)
            encoder_attention_mask = encoder_attention_mask
        arguments = {"query_embeds": query_embeds, "query_length": query_length, "attention_mask": attention_mask}
        if runs_upstream(self, (attention_mask, encoder_attention_mask), kwargs):
            encoder_hidden_states = expand_images(encoder_hidden_states, query_embeds.shape[0], image_index)
            return super().forward(
                **arguments,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                **kwargs,
            )
        return self._fused(**arguments, image=image, image_mask=encoder_attention_mask, image_index=image_index, **kwargs)

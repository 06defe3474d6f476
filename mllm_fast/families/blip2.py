"""HF BLIP-2 (transformers.models.blip_2): the Q-Former, and the models around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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

from ..modules.graphs import replayed
from ..modules.state import FusedState
from . import named_like_upstream, state_of
from ._prompts import checks_prompt, only_queries
from ._qformer_style import (
    LayerState,
    ModelState,
    embed,
    encode,
    layer_forward,
    register_outputs,
    runs_upstream,
    unshared,
)


@named_like_upstream
class FusedBlip2QFormerLayer(Blip2QFormerLayer, LayerState):
    """Drop-in for `Blip2QFormerLayer`: fused inside a fused Q-Former, upstream's own when called by itself."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return layer_forward(self, super().forward, hidden_states, args, kwargs)


@named_like_upstream
class FusedBlip2QFormerModel(Blip2QFormerModel, ModelState):
    """Drop-in for `Blip2QFormerModel`."""

    _mllm_fast: FusedState

    @replayed
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
        text = {"query_embeds": query_embeds, "query_length": query_length, "attention_mask": attention_mask}
        image, image_mask = encoder_hidden_states, encoder_attention_mask
        if runs_upstream(self, (attention_mask, image_mask), kwargs):
            image, image_mask = unshared(image, image_mask, query_embeds.shape[0], image_index)
            return super().forward(**text, encoder_hidden_states=image, encoder_attention_mask=image_mask, **kwargs)
        return self._fused(**text, image=image, image_mask=image_mask, image_index=image_index, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _fused(
        self,
        query_embeds: Tensor,
        query_length: int | None,
        attention_mask: Tensor | None,
        image: Tensor | None,
        image_mask: Tensor | None,
        image_index: Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        x = embed(self, query_embeds, self.layernorm, self.dropout)
        hidden = encode(
            self,
            x,
            image,
            query_length=query_embeds.shape[1] if query_length is None else query_length,
            attention_mask=attention_mask,
            image_mask=image_mask,
            image_index=image_index,
            only_queries=only_queries() and not kwargs.get("output_hidden_states"),
        )
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=hidden[:, 0])


@checks_prompt
@named_like_upstream
class FusedBlip2ForConditionalGeneration(Blip2ForConditionalGeneration, ModelState):
    """Drop-in for `Blip2ForConditionalGeneration`: says so where image tokens and images do not match."""


@named_like_upstream
class FusedBlip2ForImageTextRetrieval(Blip2ForImageTextRetrieval, ModelState):
    """Drop-in for `Blip2ForImageTextRetrieval`: texts may share images, which are then encoded and projected once."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_image_text_matching_head: bool | None = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream; with the matching head, pixel_values [I, C, H, W] may hold fewer images than there are texts.

        Then text b is matched with image b // (texts / I): one image is compared with all texts. A batch of images made
        by `expand` is known to be one.

        Raises:
            ValueError: no text mask for matching, a Q-Former without text input, or texts that do not divide among images.
        """
        self._check_text(input_ids, attention_mask, use_image_text_matching_head)
        images, texts = pixel_values.shape[0], input_ids.shape[0]
        one = images > 1 and pixel_values.stride(0) == 0 and self._mllm_fast.options.level >= 1
        arguments = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        shared = state_of(self.qformer) is not None and (one or images != texts)
        if not (use_image_text_matching_head and shared):
            return super().forward(
                pixel_values, input_ids, attention_mask, use_image_text_matching_head, **arguments, **kwargs
            )
        return self._match(pixel_values[:1] if one else pixel_values, input_ids, attention_mask, arguments)

    def _check_text(self, input_ids: Tensor, attention_mask: Tensor | None, matching: bool | None) -> None:
        config = self.config
        if not config.qformer_config.use_qformer_text_input:
            raise ValueError(
                "this Q-Former has no feed-forward network for text; build it with use_qformer_text_input=True in its config"
            )
        if attention_mask is None and (matching or config.image_token_index is not None):
            raise ValueError(
                f"attention_mask is missing: pass the mask of input_ids {tuple(input_ids.shape)}, 1 for a token and 0 for "
                "padding"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids has {tuple(input_ids.shape)}; pass "
                "one value for each token"
            )

    def _match(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, arguments: dict[str, bool | None]
    ) -> Any:
        """Image-text matching of more texts than images."""
        return_dict = self.config.return_dict if arguments.pop("return_dict") is None else arguments["return_dict"]
        vision_outputs = self.vision_model(pixel_values=pixel_values, **arguments)
        queries = self.query_tokens.expand(input_ids.shape[0], -1, -1)
        if self.config.image_token_index is not None:
            input_ids = input_ids[:, self.config.num_query_tokens :]
        else:
            attention_mask = torch.cat([attention_mask.new_ones(queries.shape[:2]), attention_mask], dim=1)
        text_outputs = self.qformer(
            query_embeds=self.embeddings(input_ids=input_ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=attention_mask,
            encoder_hidden_states=vision_outputs.last_hidden_state,
        )
        hidden = text_outputs.last_hidden_state[:, : queries.shape[1]].to(self.itm_head.weight.dtype)
        logits = self.itm_head(hidden).mean(dim=1)
        outputs = Blip2ImageTextMatchingModelOutput(
            logits_per_image=logits,
            logits_per_text=logits.t(),
            image_embeds=vision_outputs.last_hidden_state,
            text_embeds=text_outputs.last_hidden_state,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )
        return outputs if return_dict else outputs.to_tuple()

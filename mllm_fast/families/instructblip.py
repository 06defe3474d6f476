"""HF InstructBLIP and InstructBLIP-Video (transformers.models.instructblip, instructblipvideo): BLIP-2's Q-Former with text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerLayer,
    InstructBlipQFormerModel,
    capture_outputs,
    merge_with_config_defaults,
)
from transformers.models.instructblipvideo.modeling_instructblipvideo import (
    InstructBlipVideoForConditionalGeneration,
    InstructBlipVideoQFormerLayer,
    InstructBlipVideoQFormerModel,
)

from ..modules.state import FusedState
from . import named_like_upstream
from ._qformer_style import (
    CALL,
    LayerState,
    ModelState,
    check_prompt,
    embed,
    encode,
    hooked,
    only_queries,
    reading_only_queries,
    register_outputs,
    run,
    runs_upstream,
    unshared,
)


@named_like_upstream
class FusedInstructBlipQFormerLayer(InstructBlipQFormerLayer, LayerState):
    """Drop-in for `InstructBlipQFormerLayer`: fused inside a fused Q-Former, upstream's own when called by itself."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = kwargs.pop(CALL, None)
        if call is not None:
            return run(self, hidden_states, args[1], call)
        return super().forward(hidden_states, *args, **kwargs)


@named_like_upstream
class FusedInstructBlipVideoQFormerLayer(InstructBlipVideoQFormerLayer, LayerState):
    """Drop-in for `InstructBlipVideoQFormerLayer`, as `FusedInstructBlipQFormerLayer`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = kwargs.pop(CALL, None)
        if call is not None:
            return run(self, hidden_states, args[1], call)
        return super().forward(hidden_states, *args, **kwargs)


@merge_with_config_defaults
@capture_outputs
def _fused(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    query_embeds: Tensor | None,
    image: Tensor | None,
    image_mask: Tensor | None,
    image_index: Tensor | None,
    **kwargs: Any,
) -> BaseModelOutputWithPoolingAndCrossAttentions:
    if input_ids is None and query_embeds is None:
        raise ValueError("You have to specify query_embeds when input_ids is None")
    embeddings = model.embeddings
    if input_ids is None:
        x = embed(model, query_embeds, embeddings.layernorm, embeddings.dropout)
    else:
        x = embeddings(input_ids=input_ids, position_ids=position_ids, query_embeds=query_embeds)
    hidden = encode(
        model,
        x,
        image,
        query_length=0 if query_embeds is None else query_embeds.shape[1],
        attention_mask=attention_mask,
        image_mask=image_mask,
        image_index=image_index,
        only_queries=only_queries() and query_embeds is not None and not kwargs.get("output_hidden_states"),
    )
    return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=hidden[:, 0])


def _forward(
    model: nn.Module,
    upstream: Callable[..., Any],
    text: dict[str, Tensor | None],
    image: Tensor | None,
    image_mask: Tensor | None,
    image_index: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    """Upstream's forward where the call needs it, else ours; `text` holds the arguments that are upstream's own."""
    register_outputs(model)
    if runs_upstream(model, (text["attention_mask"], image_mask), kwargs) or hooked(model.embeddings):
        rows = next((x.shape[0] for x in (text["input_ids"], text["query_embeds"]) if x is not None), 0)
        image, image_mask = unshared(image, image_mask, rows, image_index)
        return upstream(**text, encoder_hidden_states=image, encoder_attention_mask=image_mask, **kwargs)
    return _fused(model, **text, image=image, image_mask=image_mask, image_index=image_index, **kwargs)


@named_like_upstream
class FusedInstructBlipQFormerModel(InstructBlipQFormerModel, ModelState):
    """Drop-in for `InstructBlipQFormerModel`."""

    _mllm_fast: FusedState

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, and images may be shared as in `FusedBlip2QFormerModel`."""
        text = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "query_embeds": query_embeds,
        }
        image, image_mask = encoder_hidden_states, encoder_attention_mask
        return _forward(self, super().forward, text, image, image_mask, image_index, kwargs)


@named_like_upstream
class FusedInstructBlipVideoQFormerModel(InstructBlipVideoQFormerModel, ModelState):
    """Drop-in for `InstructBlipVideoQFormerModel`, which is `InstructBlipQFormerModel` under another name."""

    _mllm_fast: FusedState

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `FusedInstructBlipQFormerModel`."""
        text = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "query_embeds": query_embeds,
        }
        image, image_mask = encoder_hidden_states, encoder_attention_mask
        return _forward(self, super().forward, text, image, image_mask, image_index, kwargs)


@named_like_upstream
class FusedInstructBlipForConditionalGeneration(InstructBlipForConditionalGeneration, ModelState):
    """Drop-in for `InstructBlipForConditionalGeneration`: says so where image tokens and images do not match.

    `generate` shows nobody the Q-Former's text rows, so its last layer leaves them out.
    """

    @functools.wraps(InstructBlipForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        check_prompt(self, InstructBlipForConditionalGeneration.forward, args, kwargs)
        return super().forward(*args, **kwargs)

    @functools.wraps(InstructBlipForConditionalGeneration.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        check_prompt(self, InstructBlipForConditionalGeneration.generate, args, kwargs)
        with reading_only_queries():
            return super().generate(*args, **kwargs)


@named_like_upstream
class FusedInstructBlipVideoForConditionalGeneration(InstructBlipVideoForConditionalGeneration, ModelState):
    """Drop-in for `InstructBlipVideoForConditionalGeneration`, as `FusedInstructBlipForConditionalGeneration`."""

    @functools.wraps(InstructBlipVideoForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        check_prompt(self, InstructBlipVideoForConditionalGeneration.forward, args, kwargs)
        return super().forward(*args, **kwargs)

    @functools.wraps(InstructBlipVideoForConditionalGeneration.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        check_prompt(self, InstructBlipVideoForConditionalGeneration.generate, args, kwargs)
        with reading_only_queries():
            return super().generate(*args, **kwargs)

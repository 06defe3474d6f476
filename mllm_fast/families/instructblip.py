"""HF InstructBLIP and InstructBLIP-Video (transformers.models.instructblip, instructblipvideo): BLIP-2's Q-Former with text."""

from __future__ import annotations

import functools
import inspect
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

from ..modules.graphs import replayed
from ..modules.state import FusedState
from . import named_like_upstream
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
from ._transformers import hooked


@named_like_upstream
class FusedInstructBlipQFormerLayer(InstructBlipQFormerLayer, LayerState):
    """Drop-in for `InstructBlipQFormerLayer`: fused inside a fused Q-Former, upstream's own when called by itself."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return layer_forward(self, super().forward, hidden_states, args, kwargs)


@named_like_upstream
class FusedInstructBlipVideoQFormerLayer(InstructBlipVideoQFormerLayer, LayerState):
    """Drop-in for `InstructBlipVideoQFormerLayer`, as `FusedInstructBlipQFormerLayer`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return layer_forward(self, super().forward, hidden_states, args, kwargs)


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
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    image_index: Tensor | None,
) -> Any:
    """Upstream's forward where the call needs it, else ours."""
    register_outputs(model)
    kwargs |= dict(zip(_ARGUMENTS, args, strict=False))
    text = {name: kwargs.pop(name, None) for name in _TEXT}
    image, image_mask = kwargs.pop("encoder_hidden_states", None), kwargs.pop("encoder_attention_mask", None)
    if runs_upstream(model, (text["attention_mask"], image_mask), kwargs) or hooked(model.embeddings):
        rows = next((x.shape[0] for x in (text["input_ids"], text["query_embeds"]) if x is not None), 0)
        image, image_mask = unshared(image, image_mask, rows, image_index)
        return upstream(**text, encoder_hidden_states=image, encoder_attention_mask=image_mask, **kwargs)
    return _fused(model, **text, image=image, image_mask=image_mask, image_index=image_index, **kwargs)


_ARGUMENTS = tuple(inspect.signature(InstructBlipQFormerModel.forward).parameters)[1:]
_TEXT = ("input_ids", "attention_mask", "position_ids", "query_embeds")


@named_like_upstream
class FusedInstructBlipQFormerModel(InstructBlipQFormerModel, ModelState):
    """Drop-in for `InstructBlipQFormerModel`."""

    _mllm_fast: FusedState

    @replayed
    @functools.wraps(InstructBlipQFormerModel.forward, assigned=())
    def forward(self, *args: Any, image_index: Tensor | None = None, **kwargs: Any) -> Any:
        """As upstream, and images may be shared as in `FusedBlip2QFormerModel`."""
        return _forward(self, super().forward, args, kwargs, image_index)


@named_like_upstream
class FusedInstructBlipVideoQFormerModel(InstructBlipVideoQFormerModel, ModelState):
    """Drop-in for `InstructBlipVideoQFormerModel`, which is `InstructBlipQFormerModel` under another name."""

    _mllm_fast: FusedState

    @replayed
    @functools.wraps(InstructBlipVideoQFormerModel.forward, assigned=())
    def forward(self, *args: Any, image_index: Tensor | None = None, **kwargs: Any) -> Any:
        """As `FusedInstructBlipQFormerModel`."""
        return _forward(self, super().forward, args, kwargs, image_index)


@checks_prompt
@named_like_upstream
class FusedInstructBlipForConditionalGeneration(InstructBlipForConditionalGeneration, ModelState):
    """Drop-in for `InstructBlipForConditionalGeneration`: says so where image tokens and images do not match."""


@checks_prompt
@named_like_upstream
class FusedInstructBlipVideoForConditionalGeneration(InstructBlipVideoForConditionalGeneration, ModelState):
    """Drop-in for `InstructBlipVideoForConditionalGeneration`, as `FusedInstructBlipForConditionalGeneration`."""

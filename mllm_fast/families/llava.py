"""HF LLaVA (transformers.models.llava): projector, image splice, and a vision tower without the layers nobody reads."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import LinearActivation
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaMultiModalProjector,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from .. import ops
from ..modules.graphs import replayed
from ..modules.media_context import MediaContext
from ..modules.projector import ProjectorSpec, project, text_rows
from ..modules.state import FusedState, Options, plain_state, readable_on_host
from . import CannotFuseError, named_like_upstream, state_of
from ._transformers import activation_name, hooked, model_dropin

# The keywords by which a fused LlavaModel tells its vision encoder how many layers to run, and itself that nobody reads
# more than the features.
LAYERS, ONLY_FEATURES = "mllm_fast_layers", "mllm_fast_only_features"
# What a LlavaModel that is being fused leaves on its vision encoder, which is visited after it.
_OF_LLAVA = "_mllm_fast_of_llava"

_only_features: ContextVar[bool] = ContextVar("mllm_fast_llava_only_features", default=False)


@contextlib.contextmanager
def _reading_only_features() -> Iterator[None]:
    """While it lasts, nobody reads of `get_image_features` but the projected features."""
    token = _only_features.set(True)
    try:
        yield
    finally:
        _only_features.reset(token)


@named_like_upstream
class FusedLlavaMultiModalProjector(LlavaMultiModalProjector):
    """Drop-in for `LlavaMultiModalProjector`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        # None in a LLaVA 1, which has no activation (`models.llava_checkpoint`).
        activation = None if isinstance(module.act, LinearActivation) else activation_name(module.act)
        spec = ProjectorSpec(("linear_1", "linear_2"), activation)
        return FusedState(type(module), options, spec, context)

    @replayed
    def forward(self, image_features: Tensor) -> Tensor:
        """As upstream: [..., D_image] -> [..., D]."""
        if hooked(self.act):
            return super().forward(image_features)
        return project(self, self._mllm_fast.spec, image_features)


def _encoder_state(module: nn.Module, options: Options, context: MediaContext) -> FusedState:
    if not module.__dict__.pop(_OF_LLAVA, False):
        raise CannotFuseError("only in a LLaVA is it known which of its layers nobody reads")
    return FusedState(type(module), options, None, context)


def _run_layers(
    encoder: nn.Module, count: int, hidden_states: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> BaseModelOutput:
    for layer in encoder.layers[:count]:
        hidden_states = layer(hidden_states, attention_mask, **kwargs)
    return BaseModelOutput(last_hidden_state=hidden_states)


@named_like_upstream
class FusedCLIPEncoder(CLIPEncoder):
    """Drop-in for the `CLIPEncoder` of a LLaVA's vision tower: runs the layers that are read."""

    _mllm_fast: FusedState
    fused_state = staticmethod(_encoder_state)

    @functools.wraps(CLIPEncoder.forward, assigned=())
    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """As upstream: [N, tokens, D]."""
        count = kwargs.pop(LAYERS, None)
        if count is None:
            return super().forward(inputs_embeds, attention_mask, **kwargs)
        return _run_layers(self, count, inputs_embeds, attention_mask, kwargs)


@named_like_upstream
class FusedSiglipEncoder(SiglipEncoder):
    """Drop-in for the `SiglipEncoder` of a LLaVA's vision tower: runs the layers that are read."""

    _mllm_fast: FusedState
    fused_state = staticmethod(_encoder_state)

    @functools.wraps(SiglipEncoder.forward, assigned=())
    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """As upstream: [N, tokens, D]."""
        count = kwargs.pop(LAYERS, None)
        if count is None:
            return super().forward(inputs_embeds, attention_mask, **kwargs)
        return _run_layers(self, count, inputs_embeds, attention_mask, kwargs)


@model_dropin
class FusedLlavaModel(LlavaModel):
    """Drop-in for `LlavaModel`: puts image features in by row, and leaves out the vision layers that nobody reads."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        encoder = _vision_encoder(module)
        if encoder is not None and state_of(encoder) is None:
            encoder.__dict__[_OF_LLAVA] = True
        return FusedState(type(module), options, None, context)

    @functools.wraps(LlavaModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream.

        Raises:
            ValueError: image tokens that do not match the images, and what upstream raises.
        """
        kwargs |= dict(zip(_ARGUMENTS, args, strict=False))
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        pixels, encoded = kwargs.get("pixel_values"), (kwargs.get("mm_encoder_outputs") or {}).get("image")
        # The first two are for upstream to complain of; without an image there is nothing to do.
        if (ids is None) == (embeddings is None) or (pixels is not None) == (encoded is not None):
            return super().forward(**kwargs)
        features = self._features(pixels, kwargs) if encoded is None else torch.cat(tuple(encoded.pooler_output), dim=0)
        text, tokens = embeddings, None
        if ids is not None:
            text, tokens = text_rows(self.get_input_embeddings(), ids)
        features = features.to(text.device, text.dtype)
        places = self.get_placeholder_mask(ids, inputs_embeds=text, image_features=features)[..., 0]
        wanted = kwargs.get("return_dict")
        kwargs |= dict.fromkeys(("input_ids", "pixel_values", "mm_encoder_outputs"))
        spliced = ops.splice_rows(text, features, ops.image_rows(places), token_ids=tokens)
        kwargs |= {"inputs_embeds": spliced, "return_dict": True}
        outputs = super().forward(**kwargs)
        outputs.image_hidden_states = features
        return outputs if (self.config.return_dict if wanted is None else wanted) else outputs.to_tuple()

    def _features(self, pixels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The rows [N, D] of all images, and nothing else of the tower: in one replay with CUDA graphs."""

        def encode(pixels: Tensor, **settings: Any) -> Tensor:
            encoded = self.get_image_features(
                pixel_values=pixels, return_dict=True, **settings, **{ONLY_FEATURES: True}
            )
            return torch.cat(tuple(encoded.pooler_output), dim=0)

        settings = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
        given, state = {name: kwargs.get(name) for name in settings}, self._mllm_fast
        if state.graphs is None:
            return encode(pixels, **given)
        parts = (self.vision_tower, self.multi_modal_projector)
        return state.graphs.call(state.shared.capture, parts, encode, (pixels,), given)

    @functools.wraps(LlavaModel.get_image_features, assigned=())
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream: all layers of the vision tower run, and all outputs are there, unless only the features are read."""
        only = kwargs.pop(ONLY_FEATURES, False) or (not torch.compiler.is_compiling() and _only_features.get())
        if only and not args and not kwargs.get("output_hidden_states"):
            kwargs |= self._layers_to_run(kwargs.get("vision_feature_layer"))
        return super().get_image_features(*args, **kwargs)

    def _layers_to_run(self, asked: int | list[int] | None) -> dict[str, Any]:
        """Arguments by which the tower stops after the last layer that is read; none where that is not known to be safe."""
        encoder = _vision_encoder(self)
        if encoder is None or state_of(encoder) is None:
            return {}
        asked = self.config.vision_feature_layer if asked is None else asked
        states = len(encoder.layers) + 1
        indices = [asked] if isinstance(asked, int) else list(asked)
        if not all(-states <= i < states for i in indices):
            return {}
        # Counted from the front, because there will be fewer states to count from the back.
        indices = [i % states for i in indices]
        count = max(indices)
        watched = any(hooked(part) for layer in encoder.layers[count:] for part in layer.modules())
        # transformers takes a single index 0 for "no hidden states".
        if watched or count == states - 1 or indices == [0]:
            return {}
        return {"vision_feature_layer": indices[0] if isinstance(asked, int) else indices, LAYERS: count}

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """As upstream: which tokens are image tokens, [B, L, 1] bool.

        Raises:
            ValueError: their number is not that of the image features. On a GPU, where upstream waits to find out, that is
                a device-side assertion: torch reports it at the next call that waits.
        """
        if input_ids is not None and not readable_on_host(input_ids):
            places = (input_ids == self.config.image_token_id).unsqueeze(-1).to(inputs_embeds.device)
            count = image_features.numel() // inputs_embeds.shape[-1]
            if os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK", "0") != "1":
                torch._assert_async(
                    places.sum() == count, f"the images have {count} features, the text not as many places"
                )
            return places
        try:
            return super().get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)
        except ValueError as error:
            token = self.config.image_token_id
            what = f"image tokens (id {token})"
            found = "another number of" if input_ids is None else int((input_ids == token).sum())
            raise ValueError(
                f"the text has {found} {what}, but the images have {image_features.shape[0]} features; the image token "
                "must be repeated once for each feature of each image (the processor does it)"
            ) from error


_ARGUMENTS = tuple(inspect.signature(LlavaModel.forward).parameters)[1:]


def _vision_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of the vision tower, where it is one whose layers run one after another."""
    tower = model.vision_tower
    found = (module for module in tower.modules() if isinstance(module, CLIPEncoder | SiglipEncoder))
    return next(found, None)


@model_dropin
class FusedLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """Drop-in for `LlavaForConditionalGeneration`: `generate` reads nothing of the vision tower but the features."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream."""
        with _reading_only_features():
            return super().generate(*args, **kwargs)

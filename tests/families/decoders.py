"""Generation by hand, one step at a time, so that several can be interleaved and images can arrive on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.families.builders import IMAGE_TOKEN


class FlamingoDecoder:
    """One open_flamingo generation, a step at a time, which lends the model its conditioning for each step."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model, self.ids, self.logits = model, inputs["lang_x"], []
        model._encode_vision_x(inputs["vision_x"])
        self.media = model.lang_encoder._get_decoder_layers()[0].vis_x
        self.locations: Tensor | None = None
        self.past: Any = None

    def step(self, tokens: Tensor | None = None) -> None:
        """Feed `tokens` [B, 1], or the prompt first and then the likeliest tokens."""
        language_model = self.model.lang_encoder
        language_model._use_cached_vision_x = True
        for layer in language_model._get_decoder_layers():
            layer.condition_vis_x(self.media)
            layer.condition_media_locations(self.locations)
        if tokens is None:
            tokens = self.ids if self.past is None else self.logits[-1][:, :IMAGE_TOKEN].argmax(-1, keepdim=True)
        if self.past is not None:
            self.ids = torch.cat([self.ids, tokens], 1)
        out = language_model(
            input_ids=tokens, attention_mask=torch.ones_like(self.ids), past_key_values=self.past, use_cache=True
        )
        self.past = out.past_key_values
        self.logits.append(out.logits[:, -1])
        self.locations = language_model._get_decoder_layers()[0].media_locations
        language_model.clear_conditioned_layers()
        language_model._use_cached_vision_x = False

    def add_image(self, pixels: Tensor) -> None:
        """The conversation goes on with another image [B, 1, 1, 3, H, W]: features are appended to the old ones."""
        self.model._encode_vision_x(pixels)
        self.media = torch.cat([self.media, self.model.lang_encoder._get_decoder_layers()[0].vis_x], 1)
        locations = torch.zeros(self.ids.shape, dtype=torch.bool)
        locations[:, : self.media.shape[1]] = True  # every row has named as many images as there are
        self.locations = locations


class IdeficsDecoder:
    """One idefics generation, a step at a time."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model, self.ids, self.visible, self.logits = model, inputs["input_ids"], inputs["image_attention_mask"], []
        self.media: dict[str, Tensor] = {"pixel_values": inputs["pixel_values"]}
        self.past: Any = None

    def step(self) -> None:
        tokens, visible = self.ids, self.visible
        if self.past is not None:
            tokens = self.logits[-1].argmax(-1, keepdim=True)
            self.ids = torch.cat([self.ids, tokens], 1)
            visible = self.visible[:, -1:]
        out = self.model(
            input_ids=tokens, attention_mask=torch.ones_like(self.ids), image_attention_mask=visible,
            past_key_values=self.past, use_cache=True, **self.media,
        )  # fmt: skip
        self.past = out.past_key_values
        self.media = {"perceiver_embeddings": out.image_hidden_states}
        self.logits.append(out.logits[:, -1])

    def add_image(self, features: Tensor) -> None:
        """Another image's resampled features [B, 1, n, D]; from now on the text sees that image."""
        self.media = {"perceiver_embeddings": torch.cat([self.media["perceiver_embeddings"], features], 1)}
        self.visible = torch.zeros(self.ids.shape[0], 1, self.visible.shape[-1] + 1, dtype=torch.long)
        self.visible[..., -1] = 1

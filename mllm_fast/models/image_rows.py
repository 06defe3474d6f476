"""What language models have in common that read images as rows of their input: the splice, a pass, and generation.

`input_ids` hold an image token in every place of an image's rows. Those places are never looked up in the vocabulary, so
the token may be outside it; the rows of the images take them, in order.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from ..modules.projector import splice_rows
from ..modules.state import readable_on_host
from .conditioning import base_model


class ImageRows:
    """Mixin, before `PreTrainedModel` and `GenerationMixin`, of models with `language_model` and `get_image_features`.

    The config has `image_token_id` and `rows_per_image`.

    Shapes: B samples, S tokens each, N images in all samples together, R = config.rows_per_image, D the width of the
    language model's embeddings.
    """

    main_input_name = "input_ids"
    config: Any
    language_model: PreTrainedModel

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Images [N, C, H, W] to an output whose `pooler_output` are their rows [N, R, D]."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> PreTrainedModel:
        """The language model without its head."""
        return self.language_model.get_decoder()

    def embed_prompt(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_features: Tensor | None = None
    ) -> Tensor:
        """The language model's input: embedded tokens, with the images' rows in the places of the image tokens.

        Args:
            input_ids: [B, S]; in order of the samples and of their tokens, every R image tokens are one image. A sample may
                have no image, one or several, also side by side.
            pixel_values: [N, C, H, W] the images in that order, or with more leading dimensions; None: text alone.
            image_features: [N, R, D] in their place, what `get_image_features` gave as `pooler_output`.

        Returns:
            [B, S, D].

        Raises:
            ValueError: image tokens and images that do not match. On a GPU that is a device-side assertion: torch reports it
                at the next call that waits.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("both pixel_values and image_features were given; pass one of them")
        if pixel_values is not None and pixel_values.ndim > 4:
            pixel_values = pixel_values.flatten(0, -4)
        places = self.image_places(input_ids)
        given = pixel_values if image_features is None else image_features
        self._check_images(places, 0 if given is None else given.shape[0])
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(places, self._filler))
        if given is None or given.shape[0] == 0:
            return embeddings
        rows = self.get_image_features(pixel_values).pooler_output if image_features is None else image_features
        places = places.to(embeddings.device)
        return splice_rows(embeddings, places, rows.flatten(0, 1).to(embeddings.device, embeddings.dtype))

    def image_places(self, input_ids: Tensor) -> Tensor:
        """Which tokens [B, S] are image tokens, bool."""
        return input_ids == self.config.image_token_id

    @property
    def _filler(self) -> int:
        """What the language model may read in the place of an image token: a word that is in every vocabulary."""
        token, text = self.config.image_token_id, self.config.get_text_config()
        return int(token if 0 <= token < text.vocab_size else getattr(text, "bos_token_id", None) or 0)

    def _check_images(self, places: Tensor, images: int) -> None:
        if torch.compiler.is_compiling():
            return
        counted, rows = places.sum(dim=1), self.config.rows_per_image
        if not readable_on_host(counted):  # to look would be to wait, at every step of a generation
            fits = (counted.sum() == images * rows) & (counted % rows == 0).all()
            torch._assert_async(fits, f"{images} images need {rows} image tokens each, and input_ids hold others")
            return
        counts = counted.tolist()
        if sum(counts) == images * rows and not any(count % rows for count in counts):
            return
        listed = ", ".join(map(str, counts[:8])) + (", ..." if len(counts) > 8 else "")
        raise ValueError(
            f"input_ids hold {sum(counts)} image tokens (id {self.config.image_token_id}; row by row: {listed}), but "
            f"{images} images need {rows} each, {images * rows} in all; the processor writes {rows} for each image"
        )

    def supervised_labels(self, labels: Tensor, input_ids: Tensor) -> Tensor:
        """The labels [B, S] that count: what stands for an image is never predicted."""
        return labels.masked_fill(self.image_places(input_ids).to(labels.device), -100)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass of the language model over text with images.

        Args:
            input_ids, pixel_values, image_features: as in `embed_prompt`.
            attention_mask: [B, S] (with the length of the cache added, where there is one); padding on either side.
            position_ids: [B, S]; by default counted from the mask, so that padding on the left changes nothing.
            past_key_values: the cache of the language model. Tokens after it are text unless images come with them.
            inputs_embeds: [B, S, D] in place of input_ids, images in it.
            labels: [B, S], -100 where no loss is wanted; never on image tokens. The language model shifts them.
            logits_to_keep: of how many last tokens the scores are wanted; 0: of all.
            **kwargs: passed on to the language model.

        Returns:
            the language model's output (`loss`, `logits`, `past_key_values`, ...).

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, images beside inputs_embeds, or images that do not
                match the image tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        _check_placed(input_ids, pixel_values, image_features)
        if labels is not None and input_ids is not None:
            labels = self.supervised_labels(labels, input_ids)
        if inputs_embeds is None:
            # Whether generated tokens are images need not be asked: reading the answer would stall every step.
            is_text = past_key_values is not None and pixel_values is None and image_features is None
            if is_text:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                inputs_embeds = self.embed_prompt(input_ids, pixel_values, image_features)
        taken = _parameters(type(base_model(self.language_model)))
        if "position_ids" in taken:
            if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
                counted = attention_mask.long().cumsum(dim=1).sub(1).clamp(min=0)
                position_ids = counted[:, -inputs_embeds.shape[1] :]
            kwargs["position_ids"] = position_ids
        if "logits_to_keep" in taken:
            kwargs["logits_to_keep"] = logits_to_keep
        if labels is not None:
            kwargs["labels"] = labels
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts: greedy, sampling, beams, several sequences each. Images are encoded once, before the beams.

        Pad prompts on the left. As in the original, generation starts from embeddings: what looks at earlier tokens
        (`repetition_penalty`, `no_repeat_ngram_size`, stopping criteria, streamers) is shown the continuation only.

        Args:
            input_ids, pixel_values, image_features, attention_mask: as in `forward`.
            **kwargs: of transformers' `generate` (`max_new_tokens`, `num_beams`, ...).

        Returns:
            what transformers' `generate` returns: prompt and continuation, [B * sequences, S + new]. Where the image token
            is outside the vocabulary, image places hold another that can be decoded (bos).
        """
        mixin: Any = super()
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            _check_placed(None, pixel_values, image_features)
            return mixin.generate(input_ids, attention_mask=attention_mask, **kwargs)
        kwargs["inputs_embeds"] = self.embed_prompt(input_ids, pixel_values, image_features)
        text = input_ids.masked_fill(self.image_places(input_ids), self._filler)
        if attention_mask is None:
            attention_mask = torch.ones_like(text)
        out = mixin.generate(attention_mask=attention_mask, **kwargs)
        new = out if isinstance(out, Tensor) else out.sequences
        prompt = text.to(new.device).repeat_interleave(new.shape[0] // text.shape[0], dim=0)
        whole = torch.cat((prompt, new), dim=1)
        if isinstance(out, Tensor):
            return whole
        out.sequences = whole
        return out


def _check_placed(input_ids: Tensor | None, pixel_values: Tensor | None, image_features: Tensor | None) -> None:
    """Raise ValueError where images come without the tokens that say where they stand."""
    if input_ids is None and not (pixel_values is None and image_features is None):
        raise ValueError(
            "images were given without input_ids, whose image tokens say where they stand; pass input_ids, or inputs_embeds "
            "alone with the images in them (embed_prompt)"
        )


@functools.cache
def _parameters(cls: type[nn.Module]) -> frozenset[str]:
    """What a language model's forward takes by name."""
    return frozenset(inspect.signature(cls.forward).parameters)

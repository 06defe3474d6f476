"""What stands before a Flamingo: prompts with `<image>` in them, pictures and videos, to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature

from .image_prompts import ImagePromptProcessor

# Few-shot prompts are written out by whoever asks (`<image>Output: a cat.<|endofchunk|><image>Output:`); of a conversation,
# an answer ends its chunk.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '<|endofchunk|>' }}{%- endif -%}"
    "{%- endfor -%}"
)


class FlamingoProcessor(ImagePromptProcessor):
    """Image processor and tokenizer of a Flamingo.

    An image is one token of the text, which the tokenizer has to know (`prepare_tokenizer`).

    Args:
        image_processor: of pictures.
        tokenizer: of the language model.
        image_token: what stands for an image or a video in a prompt.
        chat_template: default: texts and image tokens as they come, answers ended by `<|endofchunk|>`.

    Raises:
        ValueError: the tokenizer does not know the image token.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        known = tokenizer.get_vocab()
        if image_token not in known:
            raise ValueError(
                f"the tokenizer has no token {image_token!r}; add it (FlamingoProcessor.prepare_tokenizer), and resize the "
                "language model's embeddings to the tokenizer"
            )
        # They follow from the tokenizer, whatever a saved processor says.
        kwargs.pop("image_token_id", None)
        kwargs.pop("rows_per_image", None)
        template = CHAT_TEMPLATE.replace("<image>", image_token) if chat_template is None else chat_template
        super().__init__(
            image_processor,
            tokenizer,
            image_token,
            known[image_token],
            rows_per_image=1,
            chat_template=template,
            **kwargs,
        )

    @staticmethod
    def prepare_tokenizer(tokenizer: Any, image_token: str = "<image>") -> Any:
        """Add the special tokens that OpenFlamingo adds, in its order: `<|endofchunk|>`, `<image>`, and `<PAD>` if needed.

        The language model's embeddings have to be resized to `len(tokenizer)` after it.
        """
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", image_token]})
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "<PAD>"})
        return tokenizer

    def _tokenize(self, prompt: str, add_special_tokens: bool) -> list[int]:
        # As a whole: the tokenizer knows the image token, and splits at it the way the model was trained with.
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Prompts, pictures and videos to what the model takes, as PyTorch tensors.

        Args:
            images: a picture, all pictures in the order of the prompts, or for each prompt the list of its own; PIL images,
                arrays, or names of files. In such a list, a video is a list of its frames. None: text alone.
            text: a prompt or several, each with an image token for each of its pictures and videos. None: each picture is
                a sample.
            **kwargs: as in `ImagePromptProcessor`.

        Returns:
            `input_ids` and `attention_mask` [B, S]; `pixel_values` [B, I, C, H, W] padded with zeros, or, with a video,
            [B, I, F, C, H, W]; `image_mask` [B, I] or [B, I, F], 1 for a real image or frame. Those that were asked for.

        Raises:
            ValueError: nothing was given, or image tokens and pictures do not match.
        """
        features = super().__call__(images, text, **kwargs)
        pixels = features.pop("pixel_values", None)
        if pixels is None:
            return features
        samples = _by_sample(images, self._counts(text))
        return BatchFeature({**features, **_padded(pixels, samples)})

    def _counts(self, text: str | Sequence[str] | None) -> list[int] | None:
        if text is None:
            return None
        return [prompt.count(self.image_token) for prompt in ([text] if isinstance(text, str) else text)]

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` returns."""
        return ["input_ids", "attention_mask", "pixel_values", "image_mask"]


def _by_sample(images: Any, counts: list[int] | None) -> list[list[Any]]:
    """For each prompt its pictures and videos."""
    if not isinstance(images, list | tuple):
        images = [images]
    if any(isinstance(own, list | tuple) for own in images):
        return [list(own) if isinstance(own, list | tuple) else [own] for own in images]
    counts = [1] * len(images) if counts is None else counts
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [list(images[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def _padded(pixels: torch.Tensor, samples: list[list[Any]]) -> dict[str, torch.Tensor]:
    """Pixels [N, C, H, W] of all pictures and frames in order, as [B, I, C, H, W] or [B, I, F, C, H, W], with their mask."""
    is_video = any(isinstance(image, list | tuple) for own in samples for image in own)
    lengths = [[len(image) if isinstance(image, list | tuple) else 1 for image in own] for own in samples]
    mask = torch.zeros(
        len(samples), max(map(len, lengths)), max(max(own, default=1) for own in lengths), dtype=torch.long
    )
    for row, own in enumerate(lengths):
        for place, length in enumerate(own):
            mask[row, place, :length] = 1
    padded = pixels.new_zeros(*mask.shape, *pixels.shape[1:])
    padded[mask.bool()] = pixels
    if is_video:
        return {"pixel_values": padded, "image_mask": mask}
    return {"pixel_values": padded[:, :, 0], "image_mask": mask[:, :, 0]}

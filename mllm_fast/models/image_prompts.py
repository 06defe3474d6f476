"""Prompts with places for images, and pictures, to the tensors of a model that reads images as rows of its input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

Side = Literal["left", "right"]
_NOT_OF_IMAGES = ("return_tensors", "padding", "videos", "audio")


class ImagePromptProcessor(ProcessorMixin):
    """Image processor and tokenizer. Text is cut at the image token, and the pieces are tokenised one by one.

    Args:
        image_processor: of pictures.
        tokenizer: of the language model. It need not know the image token.
        image_token: what stands for an image in a prompt.
        image_token_id: what `input_ids` hold in its places.
        rows_per_image: how many places an image has.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_token: str = "<image>",
        image_token_id: int = -1,
        rows_per_image: int = 32,
        **kwargs: Any,
    ) -> None:
        self.image_token = image_token
        self.image_token_id = image_token_id
        self.rows_per_image = rows_per_image
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding_side: Side = "left",
        add_special_tokens: bool = True,
        **images_kwargs: Any,
    ) -> BatchFeature:
        """Prompts and pictures to what the model takes, as PyTorch tensors.

        Args:
            images: a picture, all pictures in the order of the prompts, or for each prompt the list of its own; PIL images,
                arrays, or names of files. None: text alone.
            text: a prompt or several, each with an image token for each of its pictures. None: pictures alone.
            padding_side: where shorter prompts are padded; "left" is what `generate` needs.
            add_special_tokens: begin each prompt with the tokenizer's bos token.
            **images_kwargs: of the image processor.

        Returns:
            `input_ids` and `attention_mask` [B, S], `pixel_values` [N, C, H, W]; those that were asked for.

        Raises:
            ValueError: nothing was given, or image tokens and pictures do not match.
        """
        if images is None and text is None:
            raise ValueError("neither images nor text were given; pass at least one of them")
        features: dict[str, Any] = {}
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            self._check_images(prompts, images)
            features |= self._pad([self._tokenize(prompt, add_special_tokens) for prompt in prompts], padding_side)
        return BatchFeature(features | self._pixels(images, images_kwargs))

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's; image places are left out."""
        return [self.decode(sequence, *args, **kwargs) for sequence in sequences]

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's, of one sequence or of several; image places are left out."""
        ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and isinstance(ids[0], list | tuple | torch.Tensor):
            return self.batch_decode(ids, *args, **kwargs)
        return self.tokenizer.decode([i for i in ids if i != self.image_token_id], *args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Generated ids [B, S] as texts."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def _pixels(self, images: Any, images_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        pictures = _flat(images)
        if not pictures:
            return {}
        # What transformers' pipelines say of other modalities; and tensors are PyTorch's, and padded, in any case.
        options = {name: value for name, value in images_kwargs.items() if name not in _NOT_OF_IMAGES}
        pictures = self.image_processor.fetch_images(pictures)
        return {"pixel_values": self.image_processor(pictures, return_tensors="pt", **options)["pixel_values"]}

    def _check_images(self, prompts: Sequence[str], images: Any) -> None:
        wanted = [prompt.count(self.image_token) for prompt in prompts]
        nested = _is_list(images) and any(_is_list(own) for own in images)
        given = [len(own) if _is_list(own) else 1 for own in images] if nested else [len(_flat(images))]
        if given != (wanted if nested else [sum(wanted)]):
            raise ValueError(
                f"the prompts hold {', '.join(map(str, wanted))} times {self.image_token}, but {', '.join(map(str, given))} "
                f"images were given; write {self.image_token} once for each image"
            )

    def _tokenize(self, prompt: str, add_special_tokens: bool) -> list[int]:
        ids = [self.tokenizer.bos_token_id] if add_special_tokens and self.tokenizer.bos_token_id is not None else []
        for part in re.split(f"({re.escape(self.image_token)})", prompt):
            if part == self.image_token:
                ids += [self.image_token_id] * self.rows_per_image
            elif part:
                ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def _padding(self) -> int:
        """What stands in padding, which nobody reads."""
        tokenizer = self.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def _pad(self, prompts: Sequence[Sequence[int]], side: Side) -> dict[str, torch.Tensor]:
        length = max(map(len, prompts), default=0)
        ids = torch.full((len(prompts), length), self._padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            own = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
            ids[row, own], mask[row, own] = torch.tensor(prompt, dtype=torch.long), 1
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` returns."""
        return ["input_ids", "attention_mask", "pixel_values"]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not _is_list(images):
        return [images]
    parts: Iterable[list[Any]] = (_flat(own) for own in images)
    return [picture for part in parts for picture in part]

"""Prompts by a system's own processor, and captions after them: for every system whose prompts the pipeline can write.

The prompt's ids are those that the model will be asked with, and the caption's are what it should then say: the prompt alone
goes through the processor, and the caption is tokenised as it stands behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...pipeline import written_prompt
from ..data import DataError, Sample

IGNORED = -100

# Systems whose processors take pictures as one list. The others get a list of lists: the pictures of each prompt.
_ONE_LIST = ("blip-2", "instructblip", "llava")
# These read one picture a prompt.
_ONE_IMAGE = ("blip-2", "instructblip")
# What a processor returns for each token [B, S, ...]; a caption's tokens get what the prompt's last one has.
_BY_TOKEN = ("image_attention_mask", "cross_attention_mask")


@dataclass(frozen=True)
class CaptionCollator:
    """What the two kinds of language models share.

    Attributes:
        processor: of the model.
        model_type: of its configuration.
        prompt: for samples that have none.
        plain: the image tokens alone are the prompt.
        max_caption_tokens: longer captions are cut, and then have no end.
        dtype: of the images.
        end: the token that ends a caption.
    """

    processor: Any
    model_type: str
    end: int
    prompt: str = ""
    plain: bool = False
    max_caption_tokens: int | None = None
    dtype: torch.dtype = torch.float32

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The texts before the captions."""
        texts, image_token = [], _image_token(self.processor)
        for sample in samples:
            if image_token in f"{sample.prompt}{sample.caption}":
                raise DataError(
                    f"the text of a sample ({sample.caption!r}) holds {image_token}; leave it out: pictures come first, and "
                    "their places are put in here"
                )
            if self.model_type in _ONE_IMAGE and len(sample.images) != 1:
                raise DataError(
                    f"a sample ({sample.caption!r}) has {len(sample.images)} pictures; {self.model_type} reads one a caption"
                )
            asked = self.prompt if sample.prompt is None else sample.prompt
            if self.plain:
                texts.append(image_token * len(sample.images) + asked)
            else:
                texts.append(written_prompt(self.processor, self.model_type, len(sample.images), asked) or "")
        return texts

    def features(self, samples: Sequence[Sample], prompts: list[str]) -> dict[str, Tensor]:
        """Prompts and pictures through the processor, as tensors."""
        pictures: list[Any] = [list(sample.images) for sample in samples]
        if self.model_type in _ONE_LIST:
            pictures = [picture for own in pictures for picture in own]
        if self.model_type == "idefics":
            rows = [[*own, prompt] for own, prompt in zip(pictures, prompts, strict=True)]
            given = self.processor(text=rows, padding=True, return_tensors="pt")
        else:
            # On the left, padding would move what an encoder with positions of its own reads (T5, a Q-Former).
            given = self.processor(
                images=pictures, text=prompts, padding=True, padding_side="right", return_tensors="pt"
            )
        # Where all texts are empty, their ids are an empty tensor of floats.
        texts = ("_ids", "_mask")
        return {
            name: value.long() if name.endswith(texts) else value.to(self.dtype)
            for name, value in dict(given).items()
            if isinstance(value, Tensor)
        }

    def captions(self, samples: Sequence[Sample], prompts: list[str]) -> list[list[int]]:
        """Ids of the captions as they stand behind their prompts, with their end."""
        tokenizer, image_token = self.processor.tokenizer, _image_token(self.processor)
        starts = [prompt.rsplit(image_token, 1)[-1] for prompt in prompts]
        alone = tokenizer([sample.caption for sample in samples], add_special_tokens=False)["input_ids"]
        before = tokenizer(starts, add_special_tokens=False)["input_ids"]
        whole = tokenizer(
            [join(start, sample.caption) for start, sample in zip(starts, samples, strict=True)],
            add_special_tokens=False,
        )["input_ids"]
        # Where the tokenizer merges across the border, the caption is tokenised by itself.
        ids = [w[len(b) :] if w[: len(b)] == b else a for w, b, a in zip(whole, before, alone, strict=True)]
        return [[*own, self.end][: self.max_caption_tokens] for own in ids]


class DecoderCollator(CaptionCollator):
    """For decoder-only language models: the caption follows the prompt, padded on the right."""

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The model's arguments: `input_ids`, `attention_mask`, `labels` [B, S], and what the processor gives besides."""
        prompts = self.prompts(samples)
        features = self.features(samples, prompts)
        kept = features.pop("attention_mask").bool()
        tokens = [row[own] for row, own in zip(features.pop("input_ids"), kept, strict=True)]
        if not prompts[0].endswith(self.processor.tokenizer.eos_token or "\0"):
            # Some tokenizers end every text, and the caption is still to come.
            tokens = [_without_end(row, self.processor.tokenizer.eos_token_id) for row in tokens]
        captions = [torch.tensor(ids) for ids in self.captions(samples, prompts)]
        length = max(len(row) + len(ids) for row, ids in zip(tokens, captions, strict=True))
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.full((len(tokens), length), self.end if pad is None else pad)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, (row, caption) in enumerate(zip(tokens, captions, strict=True)):
            end = len(row) + len(caption)
            ids[i, : len(row)], ids[i, len(row) : end] = row, caption
            labels[i, len(row) : end], mask[i, :end] = caption, 1
        features.pop("token_type_ids", None)
        for name in _BY_TOKEN:
            if name in features:
                features[name] = _lengthened(features[name], kept, [len(row) for row in tokens], length)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **features}


class EncoderDecoderCollator(CaptionCollator):
    """For encoder-decoders (T5): the encoder reads the prompt, the decoder learns the caption."""

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The model's arguments: `input_ids`, `attention_mask` [B, S] of the encoder, `labels` [B, T] of the decoder."""
        prompts = self.prompts(samples)
        features = self.features(samples, prompts)
        captions = self.captions([Sample((), s.caption) for s in samples], [""] * len(samples))
        labels = torch.full((len(captions), max(map(len, captions))), IGNORED)
        for i, ids in enumerate(captions):
            labels[i, : len(ids)] = torch.tensor(ids)
        return {**features, "labels": labels}


def join(prompt: str, caption: str) -> str:
    """A caption behind its prompt, with one space between them where both are there."""
    return prompt + (" " if prompt and not prompt[-1].isspace() else "") + caption


def _image_token(processor: Any) -> str:
    token = getattr(processor, "image_token", "<image>")
    return str(getattr(token, "content", token))


def _without_end(row: Tensor, end: int | None) -> Tensor:
    return row[:-1] if end is not None and len(row) and int(row[-1]) == end else row


def _lengthened(values: Tensor, kept: Tensor, lengths: list[int], length: int) -> Tensor:
    """[B, S, ...] of padded prompts as [B, length, ...] of prompts and captions; what follows a prompt repeats its last."""
    longer = values.new_zeros(values.shape[0], length, *values.shape[2:])
    for i, (row, own) in enumerate(zip(values, kept, strict=True)):
        prompt = row[own][: lengths[i]]
        longer[i, : len(prompt)] = prompt
        longer[i, len(prompt) :] = prompt[-1]
    return longer

"""Batches for BLIP-2's first stage: a picture and a text each, by BERT's tokenizer. The model makes its own labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import DataError, Sample
from .answers import join


@dataclass(frozen=True)
class Stage1Collator:
    """`[CLS] PROMPT CAPTION [SEP]`; [DEC] takes the place of [CLS] in the model, where a caption is generated.

    Attributes:
        processor: image processor and BERT's tokenizer, with a row for [DEC].
        prompt: what captions begin with, for samples that have none of their own.
        max_caption_tokens: longer texts are cut, [CLS] and [SEP] included and kept; None: after the original's 32.
        dtype: of the images.
        end: [SEP], as the model has it.
    """

    processor: Any
    end: int
    prompt: str = ""
    max_caption_tokens: int | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` [B, T] and `pixel_values` [B, C, H, W].

        Raises:
            DataError: a sample has several pictures.
            ValueError: the tokenizer does not end texts with the model's [SEP].
        """
        for sample in samples:
            if len(sample.images) != 1:
                raise DataError(
                    f"a sample ({sample.caption!r}) has {len(sample.images)} pictures; stage 1 learns from pairs of one "
                    "picture and one text"
                )
        asked = [self.prompt if sample.prompt is None else sample.prompt for sample in samples]
        texts = self.processor.tokenizer(
            [join(text, sample.caption) for text, sample in zip(asked, samples, strict=True)],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=32 if self.max_caption_tokens is None else self.max_caption_tokens,
            return_tensors="pt",
        )
        ids, mask = texts["input_ids"], texts["attention_mask"]
        ends = ids.gather(1, mask.sum(dim=1, keepdim=True) - 1)
        if bool((ends != self.end).any()):
            raise ValueError(
                f"the tokenizer ends texts with token {int(ends[0])}, the model with {self.end}; expected BERT's [CLS] text "
                "[SEP], and the id of [SEP] as the model's eos_token_id"
            )
        pictures = self.processor.image_processor([sample.images[0] for sample in samples], return_tensors="pt")
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures["pixel_values"].to(self.dtype)}

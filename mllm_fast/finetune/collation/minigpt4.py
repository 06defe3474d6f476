"""Batches for MiniGPT-4: its processor makes them, as the original trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Sample


@dataclass(frozen=True)
class MiniGPT4Collator:
    """`###Human: <Img><ImageHere></Img> PROMPT ###Assistant: CAPTION###`; the caption and its end are learned.

    Attributes:
        processor: a `MiniGPT4Processor`, whose style says what stands around prompt and caption.
        prompt: for samples that have none.
        max_caption_tokens: longer captions are cut; None: after the original's 160.
        dtype: of the images.
    """

    processor: Any
    prompt: str = ""
    max_caption_tokens: int | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` [B, S], and `pixel_values`."""
        asked = [self.prompt if sample.prompt is None else sample.prompt for sample in samples]
        batch = self.processor.training_batch(
            [list(sample.images) for sample in samples],
            [self.processor.instruct(text, len(sample.images)) for text, sample in zip(asked, samples, strict=True)],
            [sample.caption for sample in samples],
            max_answer_tokens=160 if self.max_caption_tokens is None else self.max_caption_tokens,
        )
        return {**batch, "pixel_values": batch["pixel_values"].to(self.dtype)}

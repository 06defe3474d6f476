"""Samples to batches: each system's own processor, and labels that are -100 on all but the caption and its end.

`collator_for` finds the right one for a model. A collator holds no model, so that it can go to a loader's processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...families.recipes import recipe_of, resolve, unwrapped
from ..data import Sample
from .answers import IGNORED, DecoderCollator, EncoderDecoderCollator
from .minigpt4 import MiniGPT4Collator
from .stage1 import Stage1Collator

__all__ = [
    "IGNORED",
    "Collate",
    "DecoderCollator",
    "EncoderDecoderCollator",
    "MiniGPT4Collator",
    "Stage1Collator",
    "collator_for",
]

Collate = Callable[[Sequence[Sample]], dict[str, Tensor]]

# What ends a caption where the tokenizer has such a token: the end of a chunk of a Flamingo's text.
_END_OF_CHUNK = "<|endofchunk|>"
# `config.model_type` of systems whose prompts come through `pipeline.written_prompt`.
_CAPTIONED = ("blip-2", "flamingo", "idefics", "idefics2", "instructblip", "llava", "mllama", "mplug-owl")


def collator_for(
    model: nn.Module,
    processor: Any,
    *,
    prompt: str = "",
    plain: bool = False,
    max_caption_tokens: int | None = None,
) -> Collate:
    """What makes batches for a model.

    Args:
        model: a supported system that generates text, or a `Blip2Stage1`.
        processor: its own.
        prompt: for samples that have none.
        plain: the image alone stands before the caption, without the conversation around it.
        max_caption_tokens: longer captions are cut, and then have no end to learn.

    Returns:
        a function of samples that gives the arguments of the model's forward: `input_ids`, `attention_mask` [B, S], images,
        and `labels` [B, S] (of an encoder-decoder: of its decoder). Images have the vision model's dtype.

    Raises:
        ValueError: nothing is known of the model's prompts; lists what is known.
    """
    base: Any = unwrapped(model)
    dtype = _image_dtype(base)
    if type(base).__name__ == "Blip2Stage1":
        return Stage1Collator(
            processor, prompt=prompt, max_caption_tokens=max_caption_tokens, dtype=dtype, end=base.eos_token_id
        )
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if kind == "minigpt4":
        return MiniGPT4Collator(processor, prompt=prompt, max_caption_tokens=max_caption_tokens, dtype=dtype)
    if kind not in _CAPTIONED:
        raise ValueError(
            f"no collation is known for {type(base).__name__} (model_type {kind!r}); write a function of samples that gives "
            f"the model's arguments with labels. Known: {', '.join(sorted({*_CAPTIONED, 'minigpt4'}))} and Blip2Stage1"
        )
    encoder_decoder = bool(getattr(base.config.get_text_config(decoder=True), "is_encoder_decoder", False))
    cls = EncoderDecoderCollator if encoder_decoder else DecoderCollator
    return cls(
        processor,
        model_type=kind,
        prompt=prompt,
        plain=plain,
        max_caption_tokens=max_caption_tokens,
        dtype=dtype,
        end=_end_of(base, processor.tokenizer),
    )


def _image_dtype(model: nn.Module) -> torch.dtype:
    """Of the vision model's first floating point parameter."""
    vision = recipe_of(model).vision
    modules: list[Any] = [model] if vision is None else resolve(model, vision)
    dtypes = (p.dtype for module in modules for p in module.parameters() if p.is_floating_point())
    return next(dtypes, torch.float32)


def _end_of(model: Any, tokenizer: Any) -> int:
    """The token that ends an answer: the one at which the model's `generate` stops."""
    known = tokenizer.get_vocab()
    if model.config.model_type == "flamingo" and _END_OF_CHUNK in known:
        return int(known[_END_OF_CHUNK])
    for config in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True)):
        ends = getattr(config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if ends:
            own = tokenizer.eos_token_id
            return int(own if own in ends else ends[0])
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"neither {type(model).__name__} nor its tokenizer says which token ends a text; set "
            "model.generation_config.eos_token_id"
        )
    return int(tokenizer.eos_token_id)

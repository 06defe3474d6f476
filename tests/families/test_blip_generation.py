"""HF BLIP: generation, and caches in the hands of the caller, against upstream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    EncoderDecoderCache,
    StaticCache,
)

import mllm_fast
from tests.families.blip_models import IMAGE, TOKENS, check_generation, inputs, model, twins
from tests.families.instruments import (
    Results,
    check_precision,
)

# generation


GENERATION = [
    {}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 3, "use_cache": False},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 1, "num_return_sequences": 3}, {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
]  # fmt: skip


@pytest.mark.parametrize("left", [0, 3], ids=["full", "left_padded"])
@pytest.mark.parametrize("options", GENERATION, ids=str)
@pytest.mark.parametrize("head", [BlipForConditionalGeneration, BlipForQuestionAnswering], ids=lambda h: h.__name__)
def test_generate(head: type[nn.Module], options: dict[str, Any], left: int) -> None:
    fused, upstream = twins(model(head))
    check_generation(fused, upstream, inputs(left=left) | options)


@pytest.mark.parametrize("level", [0, 2])
def test_generate_at_other_levels(level: int) -> None:
    fused, upstream = twins(model(), level=level)
    check_generation(fused, upstream, inputs(left=3) | {"num_beams": 3})


def test_generate_without_a_prompt_and_under_inference_mode() -> None:
    fused, upstream = twins(model())
    with torch.inference_mode():
        for seed in range(2):
            pixels = inputs(seed=seed)["pixel_values"]
            for options in ({}, {"num_beams": 3}):
                check_generation(fused, upstream, {"pixel_values": pixels} | options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generate_with_attentions(options: dict[str, Any]) -> None:
    """Upstream's code runs every step, over images that were not copied for the beams."""
    fused, upstream = twins(model())
    check_generation(fused, upstream, inputs() | {"output_attentions": True} | options)


def test_generate_in_bf16_stays_near_fp32() -> None:
    def run(m: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        given = inputs(seed=seed)
        ids = torch.randint(3, 90, (6, 1), generator=torch.Generator().manual_seed(seed))
        image = given["pixel_values"].flatten(1)[:, : TOKENS * IMAGE].view(2, TOKENS, IMAGE).bfloat16().to(dtype)
        decoder, logits, past = m.text_decoder, [], None
        with torch.no_grad():
            for step in range(3):
                out = decoder(
                    input_ids=(ids + step) % 90,
                    encoder_hidden_states=image.repeat_interleave(3, 0),
                    past_key_values=past,
                )
                past = out.past_key_values
                logits.append(out.logits)
        return {"logits": torch.cat(logits, 1)}

    check_precision(lambda seed: model(seed=seed), mllm_fast.fuse, run, torch.bfloat16)


def decode(m: nn.Module, image: Tensor, change: Callable[[EncoderDecoderCache], Tensor | None]) -> list[Tensor]:
    """Prefill of 4 tokens for 4 texts, a change of the cache, and two more steps."""
    ids = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = m.text_decoder(input_ids=ids[:, :4], encoder_hidden_states=image, use_cache=True)
        logits, past = [out.logits], out.past_key_values
        rows = change(past)
        rows = torch.arange(4) if rows is None else rows
        for step in (4, 5):
            image_rows = image if image.shape[0] != 4 else image[rows]
            out = m.text_decoder(
                input_ids=ids[rows, step : step + 1], encoder_hidden_states=image_rows, past_key_values=past
            )
            logits.append(out.logits)
    return logits


def _reorder(past: EncoderDecoderCache) -> Tensor:
    rows = torch.tensor([1, 0, 3, 3])
    past.reorder_cache(rows)
    return rows


def _select(past: EncoderDecoderCache) -> Tensor:
    rows = torch.tensor([3, 0])
    past.batch_select_indices(rows)
    return rows


def _repeat(past: EncoderDecoderCache) -> Tensor:
    past.batch_repeat_interleave(2)
    return torch.arange(4).repeat_interleave(2)


@pytest.mark.parametrize("shared", [False, True], ids=["a_row_each", "shared"])
@pytest.mark.parametrize("change", [_reorder, _select, _repeat], ids=lambda f: f.__name__)
def test_a_cache_in_the_hands_of_the_caller(change: Any, shared: bool) -> None:
    fused, upstream = twins(model().double())
    image = torch.randn(2, TOKENS, IMAGE).double()
    copies = image.repeat_interleave(2, 0)
    ours, theirs = (
        decode(fused, image if shared and change is not _select else copies, change),
        decode(upstream, copies, change),
    )
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-9, rtol=1e-9)


def test_selecting_rows_of_a_shared_cache() -> None:
    fused, upstream = twins(model().double())
    image = torch.randn(2, TOKENS, IMAGE).double()
    rows = torch.tensor([3, 0, 1])
    logits = []
    for m, given in ((fused, image), (upstream, image.repeat_interleave(2, 0))):
        with torch.no_grad():
            ids = torch.arange(3, 11).view(4, 2)
            past = m.text_decoder(input_ids=ids, encoder_hidden_states=given, use_cache=True).past_key_values
            past.batch_select_indices(rows)
            step = {"input_ids": ids[rows, :1], "encoder_hidden_states": image.repeat_interleave(2, 0)[rows]}
            logits.append(m.text_decoder(**step, past_key_values=past).logits)
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)


def test_a_cached_image_is_not_looked_at_again() -> None:
    """As upstream: after the first step only the cache counts, whatever features the caller passes."""
    fused, upstream = twins(model().double())
    logits = []
    for m in (fused, upstream):
        image = torch.randn(2, TOKENS, IMAGE, generator=torch.Generator().manual_seed(1)).double()
        with torch.no_grad():
            ids = torch.arange(3, 9).view(2, 3)
            past = m.text_decoder(input_ids=ids, encoder_hidden_states=image, use_cache=True).past_key_values
            logits.append(m.text_decoder(input_ids=ids, encoder_hidden_states=image * 0, past_key_values=past).logits)
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)


def test_a_static_cache_runs_upstreams_code() -> None:
    fused, upstream = twins(model().double())
    image, ids = torch.randn(2, TOKENS, IMAGE).double(), torch.arange(3, 9).view(2, 3)
    logits = []
    for m in (fused, upstream):
        config = m.config.text_config
        past = EncoderDecoderCache(StaticCache(config, max_cache_len=8), StaticCache(config, max_cache_len=TOKENS))
        with torch.no_grad():
            logits += [
                m.text_decoder(input_ids=ids, encoder_hidden_states=image, past_key_values=past, use_cache=True).logits
            ]
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)

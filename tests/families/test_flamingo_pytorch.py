"""flamingo-pytorch 0.1.2: the fused gated block, resampler and FlamingoPaLM against the unfused ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.builders import (
    IMAGE_TOKEN,
    MEDIA_DIM,
    TEXT_DIM,
    location_cases,
    luc_block,
    luc_resampler,
    of_inputs,
    palm,
)
from tests.families.instruments import Results, assert_same, backward_results, check_precision, run_module

CASES = {name: (locations, images) for name, locations, images in location_cases()}
TOKENS = 4


def block_inputs(images: int, *, batch: int = 2, media_batch: int = 2, length: int = 11) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, length, TEXT_DIM, dtype=torch.float64),
        "media": torch.randn(media_batch, images, TOKENS, TEXT_DIM, dtype=torch.float64),
    }


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def check(upstream: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> None:
    fused, upstream = twins(upstream)
    assert_same(
        run_module(fused, inputs, torch.float64, **kwargs), run_module(upstream, inputs, torch.float64, **kwargs)
    )


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
@pytest.mark.parametrize("case", CASES)
def test_block(case: str, immediate: bool) -> None:
    locations, images = CASES[case]
    check(luc_block(immediate), block_inputs(images), media_locations=locations)


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
def test_block_without_locations_sees_every_image(immediate: bool) -> None:
    check(luc_block(immediate), block_inputs(3))


@pytest.mark.parametrize("batches", [(3, 1), (1, 3)], ids=str)
def test_block_broadcasts_a_batch_of_one(batches: tuple[int, int]) -> None:
    locations = torch.zeros(1, 11, dtype=torch.bool)
    locations[0, [1, 6]] = True
    check(luc_block(), block_inputs(2, batch=batches[0], media_batch=batches[1]), media_locations=locations)
    check(luc_block(), block_inputs(2, batch=batches[0], media_batch=batches[1]))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_block_at_every_level(level: int) -> None:
    locations, images = CASES["more_tokens_than_images"]
    fused, upstream = twins(luc_block(), level=level)
    inputs = block_inputs(images)
    ours = run_module(fused, inputs, torch.float64, media_locations=locations)
    assert_same(ours, run_module(upstream, inputs, torch.float64, media_locations=locations))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_block_precision(dtype: torch.dtype) -> None:
    locations, images = CASES["fewer_tokens_than_images"]

    def run(block: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        torch.manual_seed(seed)
        inputs = {name: t.bfloat16().half() for name, t in block_inputs(images).items()}
        return run_module(block, inputs, dtype, media_locations=locations)

    check_precision(lambda seed: luc_block(seed=seed), mllm_fast.fuse, run, dtype)


@pytest.mark.parametrize("shape", [(2, 7), (2, 1, 7), (2, 3, 7), (1, 4, 1)], ids=str)
def test_resampler(shape: tuple[int, ...]) -> None:
    """3-D input is one image a row; `media_pos_emb` is indexed by the image."""
    check(luc_resampler(), {"x": torch.randn(*shape, MEDIA_DIM)})


def test_resampler_broadcasts_a_single_position() -> None:
    check(luc_resampler(num_media_embeds=1), {"x": torch.randn(2, 3, 7, MEDIA_DIM)})


@pytest.mark.parametrize("level", [0, 1, 2])
def test_resampler_at_every_level(level: int) -> None:
    fused, upstream = twins(luc_resampler(), level=level)
    inputs = {"x": torch.randn(2, 3, 7, MEDIA_DIM)}
    assert_same(run_module(fused, inputs, torch.float64), run_module(upstream, inputs, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resampler_precision(dtype: torch.dtype) -> None:
    def run(resampler: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        x = torch.randn(2, 2, 9, MEDIA_DIM, generator=torch.Generator().manual_seed(seed)).bfloat16().half()
        return run_module(resampler, {"x": x}, dtype)

    check_precision(lambda seed: luc_resampler(seed=seed), mllm_fast.fuse, run, dtype)


def test_resampler_of_too_many_images_is_an_error_with_both_numbers() -> None:
    fused, _ = twins(luc_resampler())
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)(5.*4|4.*5)") as caught:
        fused(torch.randn(1, 5, 7, MEDIA_DIM))
    assert "must match the size of tensor" not in str(caught.value)  # torch's broadcasting error names no cause


# the whole model


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
def test_model(immediate: bool) -> None:
    """`forward` itself freezes all but the resampler and the gated blocks. (Its `embeds=` has never worked.)"""
    ids = of_inputs(images=3)["lang_x"]
    images = torch.randn(2, 3, 6, 20, dtype=torch.float64)
    fused, upstream = (m.double() for m in twins(palm(immediate)))
    assert_same(*[backward_results(m(ids, images=images), {}, m) for m in (fused, upstream)])


def test_model_on_videos() -> None:
    ids = of_inputs()["lang_x"]
    fused, upstream = (m.double() for m in twins(palm(max_video_frames=3, img_encoder=FrameEncoder())))
    videos = torch.randn(2, 2, 3, 3, 4, 4, dtype=torch.float64)
    results = [backward_results(m(ids, videos=videos), {}, m) for m in (fused, upstream)]
    assert_same(*results)


def test_model_on_text_alone() -> None:
    """Without media upstream skips the gated blocks and unfreezes the rest."""
    ids = torch.randint(3, IMAGE_TOKEN, (2, 9))
    fused, upstream = (m.double() for m in twins(palm()))
    assert_same(*[backward_results(m(ids), {}, m) for m in (fused, upstream)])


def test_model_growing_the_text_token_by_token() -> None:
    """flamingo-pytorch has no generation code: users run the whole text again, one token longer."""
    fused, upstream = twins(palm())
    with torch.no_grad():
        for seed in range(2):
            ids = of_inputs(batch=1, seed=seed)["lang_x"]
            images = torch.randn(1, 2, 6, 20)
            texts = []
            for model in (fused, upstream):
                text = ids
                for _ in range(5):
                    text = torch.cat([text, model(text, images=images)[:, -1:, :IMAGE_TOKEN].argmax(-1)], 1)
                texts.append(text.tolist())
            assert texts[0] == texts[1]


class FrameEncoder(nn.Module):
    """[N, 3, H, W] to three tokens [N, 3, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, TEXT_DIM)

    def forward(self, frames: Tensor) -> Tensor:
        return self.project(frames.flatten(2))

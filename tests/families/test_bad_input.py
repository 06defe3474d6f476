"""Requests that do not fit: each is an error that says what was given and what was expected, in numbers."""

from __future__ import annotations

import pytest
import torch

import mllm_fast
from tests.families.blocks import KINDS, BlockKind
from tests.families.builders import MEDIA_DIM, TEXT_DIM, idefics, idefics_inputs, of_resampler

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


@kinds
@pytest.mark.parametrize("what", ["media_batch", "media_width", "text_width"])
def test_shapes_that_do_not_fit_are_an_error_with_both_numbers(kind: BlockKind, what: str) -> None:
    fused = kind.build()
    mllm_fast.fuse(fused)
    x, media, locations = kind.inputs(batch=3)
    numbers = {
        "media_batch": (2, 3),
        "media_width": (kind.media_dim - 1, kind.media_dim),
        "text_width": (TEXT_DIM - 1, TEXT_DIM),
    }[what]
    if what == "media_batch":
        media = media[:2]
    elif what == "media_width":
        media = media[..., :-1]
    else:
        x = x[..., :-1]
    with pytest.raises((ValueError, RuntimeError, AssertionError)) as caught:
        kind.call(fused, x, media, locations)
    assert all(str(n) in str(caught.value) for n in numbers), caught.value


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name != "idefics"], ids=str)
def test_locations_of_another_length_are_an_error_with_both_numbers(kind: BlockKind) -> None:
    fused = kind.build()
    mllm_fast.fuse(fused)
    x, media, locations = kind.inputs(length=9)
    with pytest.raises((ValueError, RuntimeError, AssertionError)) as caught:
        kind.call(fused, x, media, locations[:, :7])
    assert "7" in str(caught.value) and "9" in str(caught.value)


def test_a_mask_for_another_number_of_images_is_an_error_with_both_numbers() -> None:
    model = idefics()
    mllm_fast.fuse(model)
    inputs = idefics_inputs(images=3)
    inputs["image_attention_mask"] = inputs["image_attention_mask"][..., :2]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        model(**inputs)
    numbers = str(caught.value)
    assert ("2" in numbers and "3" in numbers) or ("16" in numbers and "24" in numbers)


@pytest.mark.parametrize(
    ("options", "shape", "numbers"),
    [({"max_num_frames": 2}, (1, 1, 3, 4), "23"), ({"max_num_media": 2}, (1, 3, 1, 4), "23")],
    ids=str,
)
def test_too_many_frames_or_images_for_the_embeddings(
    options: dict[str, int], shape: tuple[int, ...], numbers: str
) -> None:
    resampler = of_resampler(**options)
    mllm_fast.fuse(resampler)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        resampler(torch.randn(*shape, MEDIA_DIM))
    assert all(n in str(caught.value) for n in numbers)

"""Batches in which a prompt has several images, one, or none, and videos of one frame and several: fused as upstream."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families import llava_models, qformers, test_idefics2, test_mllama

Inputs = dict[str, Tensor]


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _prompts(token: int, tokens: int, pad: int = 0) -> Inputs:
    """Two images, the second in the middle; one; none. The shorter ones are padded on the left."""
    image = [token] * tokens
    rows = [[1, *image, 5, 6, *image, 7], [1, 8, *image, 9, 10], [1, 11, 12, 13]]
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def llava() -> tuple[nn.Module, Inputs]:
    prompts = _prompts(llava_models.IMAGE_TOKEN, llava_models.PATCHES)
    return llava_models.model(), prompts | {"pixel_values": _drawn(3, 3, 28, 28)}


def idefics2() -> tuple[nn.Module, Inputs]:
    """What is all zeros is padding, and no image."""
    pixels = _drawn(3, 2, 3, 56, 56)
    seen = torch.ones(3, 2, 56, 56, dtype=torch.bool)
    for row, images in enumerate((2, 1, 0)):
        pixels[row, images:] = 0
        seen[row, images:] = False
    seen[0, 1, 28:] = False
    prompts = _prompts(test_idefics2.IMAGE_TOKEN, test_idefics2.LATENTS)
    return test_idefics2.model(3), prompts | {"pixel_values": pixels, "pixel_attention_mask": seen}


def mllama() -> tuple[nn.Module, Inputs]:
    """As the processor has it: an image belongs to the tokens from its own on, a missing one to nobody."""
    prompts = _prompts(128, 1)
    ids = prompts["input_ids"]
    mask = torch.zeros(*ids.shape, 2, 4, dtype=torch.long)
    tiles = {(0, 0): 1, (0, 1): 2, (1, 0): 4}
    for (row, image), count in tiles.items():
        start = int((ids[row] == 128).nonzero()[image])
        mask[row, start:, image, :count] = 1
    shapes = torch.tensor([[1, 2], [4, 0], [0, 0]])
    filled = torch.zeros(3, 2, 4, dtype=torch.long)
    filled[:, :, 0] = 1
    filled[0, 1, :2], filled[1, 0] = 1, 1
    pixels = _drawn(3, 2, 4, 3, 28, 28)
    pictures = {"pixel_values": pixels, "aspect_ratio_ids": shapes, "aspect_ratio_mask": filled}
    return test_mllama.model(3), prompts | pictures | {"cross_attention_mask": mask}


def video(frames: int) -> Callable[[], tuple[nn.Module, Inputs]]:
    def build() -> tuple[nn.Module, Inputs]:
        return qformers.generator("instructblipvideo"), qformers.prompt("instructblipvideo", frames=frames, padded=True)

    return build


SYSTEMS = {
    "llava": llava, "idefics2": idefics2, "mllama": mllama, "one frame": video(1), "three frames": video(3),
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_as_upstream(name: str) -> None:
    upstream, given = SYSTEMS[name]()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    real = given["attention_mask"].bool()
    changed = given | {"pixel_values": given["pixel_values"] * 0.5 + (given["pixel_values"] != 0)}
    with torch.no_grad():
        ours, theirs = (net(**given).logits[real] for net in (fused, upstream))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(fused(**changed).logits[real], ours, atol=1e-2)
    for beams in (1, 3):
        settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        assert torch.equal(fused.generate(**given, **settings), upstream.generate(**given, **settings))


@pytest.mark.parametrize("name", ["llava", "idefics2"])
def test_a_prompt_without_an_image_is_the_language_models_alone(name: str) -> None:
    """Whatever stands beside it in the batch."""
    upstream, given = SYSTEMS[name]()
    mllm_fast.fuse(upstream)
    ids = given["input_ids"][2:, given["attention_mask"][2].bool()]
    with torch.no_grad():
        together = upstream(**given).logits[2, -ids.shape[1] :]
        torch.testing.assert_close(upstream(input_ids=ids).logits[0], together, rtol=1e-4, atol=1e-4)

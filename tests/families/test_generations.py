"""Several generations on one model: one after the other, interleaved, and with images that arrive on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.builders import idefics, idefics_inputs, of_inputs, of_model
from tests.families.decoders import FlamingoDecoder, IdeficsDecoder
from tests.families.upstream_versions import IDEFICS_BEAMS

STEPS = 4


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def compare(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_open_flamingo_generates_for_one_prompt_after_another(options: dict[str, Any]) -> None:
    """The same text with other images, each freed before the next: what is kept from one must not serve another."""
    fused, upstream = twins(of_model())
    prompt = of_inputs()
    seen = set()
    for seed in range(6):
        inputs = prompt | {"vision_x": of_inputs(seed=seed)["vision_x"]}
        ours, theirs = (
            m.generate(**inputs, max_new_tokens=5, pad_token_id=0, **options).tolist() for m in (fused, upstream)
        )
        assert ours == theirs
        seen.add(str(theirs))
        del inputs
    assert len(seen) > 1, "the images make no difference: this test shows nothing"


@pytest.mark.parametrize("options", [{}, pytest.param({"num_beams": 3}, marks=IDEFICS_BEAMS)], ids=str)
@pytest.mark.parametrize("resampler", [True, False], ids=["resampler", "patches"])
def test_idefics_generates_for_one_prompt_after_another(resampler: bool, options: dict[str, Any]) -> None:
    fused, upstream = twins(idefics(resampler=resampler))
    prompt = idefics_inputs()
    seen = set()
    for seed in range(6):
        inputs = prompt | {"pixel_values": idefics_inputs(seed=seed)["pixel_values"]}
        ours, theirs = (
            m.generate(**inputs, max_new_tokens=5, do_sample=False, **options).tolist() for m in (fused, upstream)
        )
        assert ours == theirs
        seen.add(str(theirs))
        del inputs
    assert len(seen) > 1, "the images make no difference: this test shows nothing"


def test_generate_after_the_pixels_were_modified_in_place() -> None:
    fused, upstream = twins(idefics())
    inputs = idefics_inputs()
    for _ in range(3):
        ours, theirs = (m.generate(**inputs, max_new_tokens=4, do_sample=False).tolist() for m in (fused, upstream))
        assert ours == theirs
        inputs["pixel_values"].normal_()


@pytest.mark.parametrize("system", ["open_flamingo", "idefics"])
def test_two_generations_interleave(system: str) -> None:
    decoder, build, inputs = {
        "open_flamingo": (FlamingoDecoder, of_model, of_inputs),
        "idefics": (IdeficsDecoder, idefics, idefics_inputs),
    }[system]
    results = []
    with torch.no_grad():
        for model in twins(build()):
            both = [decoder(model, inputs(seed=1)), decoder(model, inputs(seed=2, images=3, batch=2, length=11))]
            for _ in range(STEPS):
                for generation in both:
                    generation.step()
            results.append([step for generation in both for step in generation.logits])
        alone = []
        model = build()
        for seed, kw in ((1, {}), (2, {"images": 3, "batch": 2, "length": 11})):
            generation = decoder(model, inputs(seed=seed, **kw))
            for _ in range(STEPS):
                generation.step()
            alone += generation.logits
    compare(results[0], results[1])
    compare(results[0], alone)


@pytest.mark.parametrize("system", ["open_flamingo", "idefics"])
def test_an_image_arrives_during_a_generation(system: str) -> None:
    decoder, build, inputs = {
        "open_flamingo": (FlamingoDecoder, of_model, of_inputs),
        "idefics": (IdeficsDecoder, idefics, idefics_inputs),
    }[system]
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(*((2, 1, 1, 3, 28, 28) if system == "open_flamingo" else (2, 1, 8, 48)), generator=generator)
    results = []
    with torch.no_grad():
        for model in twins(build()):
            generation = decoder(model, inputs())
            for _ in range(STEPS):
                generation.step()
            generation.add_image(image)
            for _ in range(STEPS):
                generation.step()
            results.append(generation.logits)
    compare(*results)


def test_training_between_two_generations() -> None:
    """Generate, one optimiser step, generate: with the same images."""
    modules = twins(of_model().train())
    inputs = of_inputs()
    for model in modules:
        model.requires_grad_(True)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in modules]
    for _ in range(3):
        generated = [m.eval().generate(**inputs, max_new_tokens=4, pad_token_id=0).tolist() for m in modules]
        assert generated[0] == generated[1]
        for model, optimiser in zip(modules, optimisers, strict=True):
            optimiser.zero_grad()
            model.train()(**inputs, labels=inputs["lang_x"]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()

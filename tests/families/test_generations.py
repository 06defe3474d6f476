"""Several generations on one model: one after the other, interleaved, and with images that arrive on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import IMAGE_TOKEN, idefics, idefics_inputs, of_inputs, of_model
from torch import Tensor, nn

import mllm_fast

STEPS = 4


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


class FlamingoDecoder:
    """One open_flamingo generation, a step at a time, which lends the model its conditioning for each step."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model, self.ids, self.logits = model, inputs["lang_x"], []
        model._encode_vision_x(inputs["vision_x"])
        self.media = model.lang_encoder._get_decoder_layers()[0].vis_x
        self.locations: Tensor | None = None
        self.past: Any = None

    def step(self, tokens: Tensor | None = None) -> None:
        """Feed `tokens` [B, 1], or the prompt first and then the likeliest tokens."""
        language_model = self.model.lang_encoder
        language_model._use_cached_vision_x = True
        for layer in language_model._get_decoder_layers():
            layer.condition_vis_x(self.media)
            layer.condition_media_locations(self.locations)
        if tokens is None:
            tokens = self.ids if self.past is None else self.logits[-1][:, :IMAGE_TOKEN].argmax(-1, keepdim=True)
        if self.past is not None:
            self.ids = torch.cat([self.ids, tokens], 1)
        out = language_model(
            input_ids=tokens, attention_mask=torch.ones_like(self.ids), past_key_values=self.past, use_cache=True
        )
        self.past = out.past_key_values
        self.logits.append(out.logits[:, -1])
        self.locations = language_model._get_decoder_layers()[0].media_locations
        language_model.clear_conditioned_layers()
        language_model._use_cached_vision_x = False

    def add_image(self, pixels: Tensor) -> None:
        """The conversation goes on with another image [B, 1, 1, 3, H, W]: features are appended to the old ones."""
        self.model._encode_vision_x(pixels)
        self.media = torch.cat([self.media, self.model.lang_encoder._get_decoder_layers()[0].vis_x], 1)
        locations = torch.zeros(self.ids.shape, dtype=torch.bool)
        locations[:, : self.media.shape[1]] = True  # every row has named as many images as there are
        self.locations = locations


class IdeficsDecoder:
    """One idefics generation, a step at a time."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model, self.ids, self.visible, self.logits = model, inputs["input_ids"], inputs["image_attention_mask"], []
        self.media: dict[str, Tensor] = {"pixel_values": inputs["pixel_values"]}
        self.past: Any = None

    def step(self) -> None:
        tokens, visible = self.ids, self.visible
        if self.past is not None:
            tokens = self.logits[-1].argmax(-1, keepdim=True)
            self.ids = torch.cat([self.ids, tokens], 1)
            visible = self.visible[:, -1:]
        out = self.model(
            input_ids=tokens, attention_mask=torch.ones_like(self.ids), image_attention_mask=visible,
            past_key_values=self.past, use_cache=True, **self.media,
        )  # fmt: skip
        self.past = out.past_key_values
        self.media = {"perceiver_embeddings": out.image_hidden_states}
        self.logits.append(out.logits[:, -1])

    def add_image(self, features: Tensor) -> None:
        """Another image's resampled features [B, 1, n, D]; from now on the text sees that image."""
        self.media = {"perceiver_embeddings": torch.cat([self.media["perceiver_embeddings"], features], 1)}
        self.visible = torch.zeros(self.ids.shape[0], 1, self.visible.shape[-1] + 1, dtype=torch.long)
        self.visible[..., -1] = 1


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


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
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

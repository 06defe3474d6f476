"""The models around the Q-Formers: BLIP-2 and InstructBLIP over OPT and T5, and BLIP-2's image-text retrieval."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.instruments import assert_same, backward_results, recording
from tests.families.qformers import DIM, FFN, IMAGE, IMAGE_TOKEN, QUERIES, draw, generator, prompt, retrieval

NAMES = ["blip2", "instructblip", "instructblipvideo"]
PATCHES = 5  # four and the class token
names = pytest.mark.parametrize("name", NAMES)
languages = pytest.mark.parametrize("language", ["opt", "t5"])


def twins(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(model)
    mllm_fast.fuse(fused, **options)
    return fused, model


def labelled(inputs: dict[str, Tensor], language: str) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100) if language == "opt" else ids[:, -4:].contiguous()
    return inputs | {"labels": labels}


@names
@languages
@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_gradients_equal_upstream(name: str, language: str, padded: bool) -> None:
    results = []
    for model in twins(generator(name, language).double().train()):
        inputs = labelled(prompt(name, padded=padded), language)
        pixels = inputs["pixel_values"].clone().requires_grad_()
        outputs = model(**inputs | {"pixel_values": pixels})
        results.append(backward_results(outputs.loss, {"pixels": pixels}, model) | {"logits": outputs.logits.detach()})
        results[-1]["qformer"] = outputs.qformer_outputs.last_hidden_state.detach()
    assert_same(*results)


@names
@languages
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}], ids=str
)
def test_generation_equals_upstream(name: str, language: str, how: dict[str, Any]) -> None:
    fused, upstream = twins(generator(name, language, seed=1).double())
    for padded in (False, True):
        results = []
        for model in (fused, upstream):
            torch.manual_seed(0)
            given = prompt(name, 1, padded=padded)
            results.append(
                model.generate(**given, max_new_tokens=6, output_scores=True, return_dict_in_generate=True, **how)
            )
        assert torch.equal(results[0].sequences, results[1].sequences)
        for ours, theirs in zip(results[0].scores, results[1].scores, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_generation_of_a_captionless_prompt(dtype: torch.dtype) -> None:
    fused, upstream = twins(generator("blip2").to(dtype))
    pixels = prompt("blip2")["pixel_values"].to(dtype)
    ours, theirs = (m.generate(pixels, max_new_tokens=3) for m in (fused, upstream))
    assert ours.shape == theirs.shape


@names
def test_the_image_is_read_once_however_many_beams_and_tokens(name: str) -> None:
    fused, _ = twins(generator(name))
    given = {k: v.float() if v.is_floating_point() else v for k, v in prompt(name).items()}
    images = 4 if name == "instructblipvideo" else 2
    with recording() as record:
        fused.generate(**given, max_new_tokens=4, num_beams=3)
    assert [(g.m, g.n) for g in record.gemms if g.k == IMAGE and g.n % DIM == 0] == [(images * PATCHES, 3 * 2 * DIM)]


@pytest.mark.parametrize("name", NAMES[1:])
def test_generate_leaves_out_the_last_layers_text_rows(name: str) -> None:
    fused, _ = twins(generator(name))
    given = {k: v.float() if v.is_floating_point() else v for k, v in prompt(name).items()}
    rows = []
    for run in (fused.generate, fused):
        with torch.no_grad(), recording() as record:
            run(**given, **({"max_new_tokens": 1} if run == fused.generate else {}))
        rows.append(record.work(FFN))
    images = 4 if name == "instructblipvideo" else 2
    assert rows[1] - rows[0] == images * 6 * DIM


@languages
def test_gradient_checkpointing_and_dropout(language: str) -> None:
    model = generator("instructblip", language, hidden_dropout_prob=0.2).double().train()
    fused, upstream = twins(model)
    results = []
    for m in (fused, upstream):
        m.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        inputs = labelled(prompt("instructblip"), language)
        results.append(backward_results(m(**inputs).loss, {}, m))
    assert_same(*results)


@names
def test_hidden_states_and_attentions(name: str) -> None:
    fused, upstream = twins(generator(name).double())
    for model in (fused, upstream):
        model.qformer.set_attn_implementation("eager")
        model.qformer.config.output_attentions = model.qformer.config.output_hidden_states = True
    ours, theirs = (m(**prompt(name)).qformer_outputs for m in (fused, upstream))
    for field in ("hidden_states", "attentions", "cross_attentions"):
        assert len(ours[field]) == len(theirs[field]) > 0
        for mine, reference in zip(ours[field], theirs[field], strict=True):
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-11)


@names
def test_image_tokens_that_do_not_match_the_images(name: str) -> None:
    fused, _ = twins(generator(name).double())
    given = prompt(name)
    images = 4 if name == "instructblipvideo" else 2
    total = images * QUERIES
    given["input_ids"][1, 0] = 5
    message = rf"input_ids hold {total - 1} image tokens .* but {images} images of 4 tokens each need {total}"
    for call in (fused, fused.generate):
        with pytest.raises(ValueError, match=message):
            call(**given)
    with pytest.raises(ValueError, match=f"hold 0 image tokens .* need {total}"):
        fused(**given | {"input_ids": torch.full_like(given["input_ids"], 5)})


def test_a_row_with_part_of_an_image_or_without_a_token_id() -> None:
    fused, upstream = twins(generator("blip2").double())
    given = prompt("blip2")
    given["input_ids"][0, QUERIES] = IMAGE_TOKEN
    given["input_ids"][1, 0] = 5
    with pytest.raises(ValueError, match="row by row: 5, 3"):
        fused(**given)
    # Two images in one row are upstream's business, and right.
    ids = torch.tensor([[IMAGE_TOKEN] * 2 * QUERIES + [5, 6]])
    both = {"pixel_values": given["pixel_values"], "input_ids": ids}
    torch.testing.assert_close(fused(**both).logits, upstream(**both).logits, rtol=0, atol=1e-10)
    fused.config.image_token_index = None
    with pytest.raises(ValueError, match="image_token_index is None"):
        fused(**given)


def pairs(images: int = 3, texts: int = 3) -> dict[str, Tensor]:
    drawn = draw(3, texts)
    pixels = torch.randn(images, 3, 28, 28, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return {"pixel_values": pixels, "input_ids": drawn["ids"], "attention_mask": drawn["text_mask"]}


@pytest.mark.parametrize("matching", [False, True])
def test_retrieval_equals_upstream(matching: bool) -> None:
    fused, upstream = twins(retrieval().double())
    results = []
    for model in (fused, upstream):
        outputs = model(**pairs(), use_image_text_matching_head=matching)
        results.append(backward_results(outputs.logits_per_image, {}, model))
        results[-1] |= {"text": outputs.text_model_output.last_hidden_state.detach()}
        as_tuple = model(**pairs(), use_image_text_matching_head=matching, return_dict=False)
        results[-1] |= {"first": as_tuple[0].detach(), "second": as_tuple[1].detach()}
    assert_same(*results)


def test_contrast_of_unequally_many_images_and_texts() -> None:
    fused, upstream = twins(retrieval().double())
    ours, theirs = (m(**pairs(2, 5)).logits_per_image for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("images", "texts", "expand"), [(1, 4, False), (2, 6, False), (4, 4, True)])
def test_matching_of_shared_images(images: int, texts: int, expand: bool) -> None:
    fused, upstream = twins(retrieval())
    given = {k: v.float() if v.is_floating_point() else v for k, v in pairs(images, texts).items()}
    pixels = given["pixel_values"]
    if expand:
        given["pixel_values"] = pixels[:1].expand(images, -1, -1, -1)
    copied = pixels[:1].repeat(texts, 1, 1, 1) if expand else pixels.repeat_interleave(texts // images, 0)
    with torch.no_grad(), recording() as record:
        ours = fused(**given, use_image_text_matching_head=True)
    theirs = upstream(**given | {"pixel_values": copied}, use_image_text_matching_head=True)
    torch.testing.assert_close(ours.logits_per_image, theirs.logits_per_image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits_per_text, ours.logits_per_image.t(), rtol=0, atol=0)
    unique = 1 if expand else images
    assert [g.m for g in record.gemms if g.k == IMAGE and g.n % DIM == 0] == [unique * PATCHES]
    assert [g.m for g in record.gemms if g.k == 44] == 2 * [unique * PATCHES]  # the vision tower's second GEMMs


def test_retrieval_with_bad_input() -> None:
    fused, _ = twins(retrieval().double())
    given = pairs()
    with pytest.raises(ValueError, match=r"attention_mask is missing: pass the mask of input_ids \(3, 6\)"):
        fused(**given | {"attention_mask": None}, use_image_text_matching_head=True)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 5\), but input_ids has \(3, 6\)"):
        fused(**given | {"attention_mask": given["attention_mask"][:, 1:]}, use_image_text_matching_head=True)
    with pytest.raises(ValueError, match="3 sequences cannot share 2 images"):
        fused(**given | {"pixel_values": given["pixel_values"][:2]}, use_image_text_matching_head=True)
    blind, _ = twins(retrieval(use_qformer_text_input=True).double())
    blind.config.qformer_config.use_qformer_text_input = False
    with pytest.raises(ValueError, match="use_qformer_text_input=True"):
        blind(**given)


def test_fuse_reports_and_unfuse_restores() -> None:
    model = generator("instructblip").double()
    classes = [type(m) for m in model.modules()]
    report = mllm_fast.fuse(model)
    assert {row.path for row in report.fused} >= {"qformer", *(f"qformer.encoder.layer.{i}" for i in range(5))}
    assert "grouped_linear" in str(report)
    mllm_fast.unfuse(model)
    assert [type(m) for m in model.modules()] == classes

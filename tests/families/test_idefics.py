"""HF idefics: the fused gated layer, resampler and whole model against the unfused ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding

import mllm_fast
from tests.families.builders import MEDIA_DIM, TEXT_DIM, idefics, idefics_inputs, idefics_mask, randomise
from tests.families.instruments import (
    Results,
    assert_same,
    assert_within_twice,
    backward_results,
    check_precision,
    run_module,
)
from tests.families.upstream_versions import IDEFICS_BEAMS

MASKS = ["incremental", "many", "scattered", "nothing", "everything"]
TOKENS = 8
MODEL_TOLERANCE = 1e-5  # in fp64: upstream takes the statistics of its norms in fp32


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def layer(seed: int = 0, **options: Any) -> nn.Module:
    """A bare gated layer."""
    return idefics(seed=seed, **options).model.gated_cross_attn_layers[0]


def layer_masks(
    kind: str, dtype: torch.dtype, *, batch: int = 2, length: int = 10, images: int = 3
) -> dict[str, Tensor]:
    """The additive mask [B, 1, S, I * n] and the gate [B, S], as IdeficsModel.forward makes them."""
    seen = idefics_mask(kind, batch, length, images).repeat_interleave(TOKENS, -1).bool()[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"image_attention_mask": mask, "cross_attention_gate": seen.any(-1)[:, 0].to(dtype)}


def run_layer(module: nn.Module, dtype: torch.dtype, masks: dict[str, Tensor], seed: int = 0) -> Results:
    """Output and every gradient of one gated layer, with inputs that fp16 and bf16 both hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    images = masks["image_attention_mask"].shape[-1] // TOKENS
    batch, length = masks["cross_attention_gate"].shape
    h = torch.randn(batch, length, TEXT_DIM, generator=generator).bfloat16().half().to(dtype).requires_grad_()
    media = (
        torch.randn(batch, images * TOKENS, MEDIA_DIM, generator=generator).bfloat16().half().to(dtype).requires_grad_()
    )
    module.zero_grad()
    return backward_results(module(h, None, media, **masks), {"h": h, "media": media}, module)


def check_layer(upstream: nn.Module, masks: dict[str, Tensor], **options: Any) -> None:
    """Eager is compared in fp32, sdpa in fp64 up to 1e-6, because upstream takes the statistics of its norms in fp32.

    So does its eager softmax, which makes the lowest fp64 number -inf and a row that sees nothing NaN.
    """
    dtype = torch.float32 if upstream.cross_attn.config._attn_implementation == "eager" else torch.float64
    masks = {name: m.clamp_min(torch.finfo(dtype).min).to(dtype) for name, m in masks.items()}
    fused, upstream = twins(upstream.to(dtype), **options)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    assert_same(run_layer(fused, dtype, masks), run_layer(upstream, dtype, masks), tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
def test_layer(mask: str, attention: str) -> None:
    check_layer(layer(attention=attention), layer_masks(mask, torch.float64))


@pytest.mark.parametrize("qk_norms", [True, False], ids=["qk_norms", "plain"])
@pytest.mark.parametrize("alpha", ["vector", "float"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_layer_variants(qk_norms: bool, alpha: str, level: int) -> None:
    check_layer(layer(qk_norms=qk_norms, alpha=alpha), layer_masks("scattered", torch.float64), level=level)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layer_whose_gate_closes_rows_that_see_images(attention: str) -> None:
    masks = layer_masks("many", torch.float64)
    masks["cross_attention_gate"][:, 5:] = 0
    check_layer(layer(attention=attention), masks)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layer_whose_gate_opens_rows_that_see_nothing(attention: str) -> None:
    """Upstream adds the lowest number to every score of such a row, which leaves the mean of all V."""
    masks = layer_masks("scattered", torch.float64)
    masks["cross_attention_gate"].fill_(1)
    check_layer(layer(attention=attention), masks)


@pytest.mark.parametrize("kind", ["part_of_an_image", "bias"])
def test_layer_under_a_mask_that_is_not_one_of_images(kind: str) -> None:
    """Callers may pass any additive mask; upstream adds it to the scores."""
    masks = layer_masks("everything", torch.float64)
    if kind == "bias":
        masks["image_attention_mask"].copy_(torch.randn(masks["image_attention_mask"].shape))
    else:
        masks["image_attention_mask"][:, :, 3:, 5:11] = torch.finfo(torch.float64).min
    check_layer(layer(), masks)


def test_layer_without_a_mask_sees_every_image() -> None:
    fused, upstream = twins(layer(attention="eager"))
    h, media, gate = torch.randn(2, 10, TEXT_DIM), torch.randn(2, 24, MEDIA_DIM), torch.ones(2, 10)
    ours, theirs = (m(h, None, media, image_attention_mask=None, cross_attention_gate=gate) for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("alpha", ["vector", "float"])
def test_layer_precision(dtype: torch.dtype, attention: str, alpha: str) -> None:
    def run(module: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        if dtype == torch.float64:  # eager attention would compute its softmax in fp32
            module.cross_attn.config._attn_implementation = "sdpa"
        return run_layer(module, dtype, layer_masks("incremental", dtype), seed)

    check_precision(lambda seed: layer(seed, attention=attention, alpha=alpha), mllm_fast.fuse, run, dtype)


def test_layer_under_autocast() -> None:
    ours, theirs, exact = [], [], []
    masks = layer_masks("incremental", torch.float32)
    for seed in range(6):
        fused, upstream = twins(layer(seed))
        exact.append(run_layer(upstream, torch.float32, masks, seed))
        with torch.autocast("cpu", torch.bfloat16):
            ours.append(run_layer(fused, torch.float32, masks, seed))
            theirs.append(run_layer(upstream, torch.float32, masks, seed))
    assert_within_twice(ours, theirs, exact, eps=torch.finfo(torch.bfloat16).eps)


# the resampler


@pytest.mark.parametrize("qk_norms", [True, False], ids=["qk_norms", "plain"])
@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_resampler(images: int, qk_norms: bool, level: int) -> None:
    fused, upstream = twins(idefics(qk_norms=qk_norms).model.perceiver_resampler, level=level)
    inputs = {"x": torch.randn(images, 5, MEDIA_DIM)}
    assert_same(run_module(fused, inputs, torch.float64), run_module(upstream, inputs, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("qk_norms", [True, False], ids=["qk_norms", "plain"])
def test_resampler_precision(dtype: torch.dtype, qk_norms: bool) -> None:
    def run(resampler: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        x = torch.randn(3, 9, MEDIA_DIM, generator=torch.Generator().manual_seed(seed)).bfloat16().half()
        return run_module(resampler, {"x": x}, dtype)

    build = lambda seed: idefics(seed=seed, qk_norms=qk_norms).model.perceiver_resampler  # noqa: E731
    check_precision(build, mllm_fast.fuse, run, dtype, kinks=True)


# the whole model


def model_results(
    model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64, **kwargs: Any
) -> Results:
    model.to(dtype).zero_grad()
    pixels = inputs["pixel_values"].to(dtype).requires_grad_()
    logits = model(**(inputs | {"pixel_values": pixels}), **kwargs).logits
    return backward_results(logits, {"pixels": pixels}, model)


@pytest.mark.parametrize("resampler", [True, False], ids=["resampler", "patches"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
def test_model(mask: str, attention: str, resampler: bool) -> None:
    dtype, tolerance = (
        (torch.float32, 2e-5) if attention == "eager" else (torch.float64, MODEL_TOLERANCE)
    )  # see check_layer
    fused, upstream = twins(idefics(resampler=resampler, attention=attention))
    inputs = idefics_inputs(mask)
    assert_same(model_results(fused, inputs, dtype), model_results(upstream, inputs, dtype), tolerance)


@pytest.mark.parametrize("qk_norms", [True, False], ids=["qk_norms", "plain"])
@pytest.mark.parametrize("alpha", ["vector", "float"])
def test_model_variants(qk_norms: bool, alpha: str) -> None:
    fused, upstream = twins(idefics(qk_norms=qk_norms, alpha=alpha))
    assert_same(model_results(fused, idefics_inputs()), model_results(upstream, idefics_inputs()), MODEL_TOLERANCE)


def test_model_bf16() -> None:
    def run(model: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        inputs = idefics_inputs(seed=seed)
        with torch.no_grad():
            return {"logits": model(**(inputs | {"pixel_values": inputs["pixel_values"].bfloat16().to(dtype)})).logits}

    check_precision(lambda seed: idefics(seed=seed), mllm_fast.fuse, run, torch.bfloat16)


@pytest.mark.parametrize("given", ["image_encoder_embeddings", "perceiver_embeddings"])
def test_model_on_precomputed_features(given: str) -> None:
    fused, upstream = twins(idefics())
    inputs = idefics_inputs()
    del inputs["pixel_values"]
    inputs[given] = torch.randn(2, 3, 8, MEDIA_DIM)
    torch.testing.assert_close(fused(**inputs).logits, upstream(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_model_outputs_hidden_states_and_attentions() -> None:
    fused, upstream = twins(idefics(attention="eager"))
    ours, theirs = (m(**idefics_inputs(), output_hidden_states=True, output_attentions=True) for m in (fused, upstream))
    for name in ("hidden_states", "attentions"):
        assert len(ours[name]) == len(theirs[name]) > 0
        for mine, reference in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(mine, reference, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(ours.image_hidden_states, theirs.image_hidden_states, atol=1e-5, rtol=1e-5)


def padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Row 1 with three padding tokens on its left, which see no image."""
    inputs = {k: v.clone() for k, v in inputs.items()}
    for name, fill in (("input_ids", 0), ("image_attention_mask", 0)):
        row = inputs[name][1]
        inputs[name][1] = torch.cat([torch.full_like(row[:3], fill), row[:-3]])
    inputs["attention_mask"][1, :3] = 0
    return inputs


GENERATION = [
    {}, {"use_cache": False}, {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    *(pytest.param({"num_beams": 3} | more, marks=IDEFICS_BEAMS)
      for more in ({}, {"use_cache": False}, {"num_return_sequences": 2})),
]  # fmt: skip


@pytest.mark.parametrize("left_padded", [False, True], ids=["full", "left_padded"])
@pytest.mark.parametrize("options", GENERATION, ids=str)
@pytest.mark.parametrize("resampler", [True, False], ids=["resampler", "patches"])
def test_generate(resampler: bool, options: dict[str, Any], left_padded: bool) -> None:
    """Row 0 of the prompt sees three images, row 1 two: the batch has different image counts."""
    fused, upstream = twins(idefics(resampler=resampler))
    inputs = padded(idefics_inputs()) if left_padded else idefics_inputs()
    options = {
        "do_sample": False,
        "max_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_logits": True,
    } | options
    ours, theirs = (m.generate(**inputs, **options) for m in (fused, upstream))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, pytest.param({"num_beams": 3}, marks=IDEFICS_BEAMS)], ids=str)
def test_generate_under_inference_mode(options: dict[str, Any]) -> None:
    """Inference tensors have no version counter."""
    fused, upstream = twins(idefics())
    with torch.inference_mode():
        for seed in range(2):
            inputs = idefics_inputs(seed=seed)
            ours, theirs = (
                m.generate(**inputs, do_sample=False, max_new_tokens=5, **options) for m in (fused, upstream)
            )
            assert ours.tolist() == theirs.tolist()
    inputs = idefics_inputs()
    assert_same(model_results(fused, inputs), model_results(upstream, inputs), MODEL_TOLERANCE)


# the two tables of embeddings


@pytest.mark.parametrize("added", [0, 3])
def test_embedding(added: int) -> None:
    upstream = randomise(IdeficsDecoupledEmbedding(7, added, 5)).double()
    fused, ids = copy.deepcopy(upstream), torch.randint(0, 7 + added, (3, 9))
    mllm_fast.fuse(fused)
    results = []
    for embedding in (fused, upstream):
        out = embedding(ids)
        out.backward(torch.arange(out.numel()).view(out.shape).double())
        gradients = {name: p.grad for name, p in embedding.named_parameters()}
        results.append({"output": out.detach()} | gradients)
    assert_same(*results)


def test_embedding_whose_added_table_is_wrapped() -> None:
    upstream = randomise(IdeficsDecoupledEmbedding(7, 3, 5))
    fused, ids, seen = copy.deepcopy(upstream), torch.randint(0, 10, (3, 9)), []
    mllm_fast.fuse(fused)
    fused.additional_embedding.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(fused(ids), upstream(ids)) and seen

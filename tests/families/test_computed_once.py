"""What the drop-ins compute once where upstream computes it every step, layer or beam: counted below autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.blocks import KINDS, TOKENS, BlockKind
from tests.families.builders import (
    MEDIA_DIM,
    TEXT_DIM,
    idefics,
    idefics_inputs,
    luc_block,
    luc_resampler,
    of_block,
    of_inputs,
    of_model,
    of_resampler,
)
from tests.families.instruments import Recorder, recording
from tests.families.upstream_versions import beams

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def recorded(run: Callable[[], Any]) -> Recorder:
    with torch.no_grad(), recording() as record:
        run()
    return record


# media keys and values of one block


@kinds
def test_media_are_projected_once(kind: BlockKind) -> None:
    fused, _ = twins(kind.build())
    x, media, locations = kind.inputs(images=3)
    first, second = (recorded(lambda: kind.call(fused, x, media, locations)) for _ in range(2))
    assert first.work(kind.media_dim) - second.work(kind.media_dim) == kind.media_work(2, 3)
    if kind.media_dim != TEXT_DIM:
        assert first.work(kind.media_dim) == kind.media_work(2, 3)
        assert second.work(kind.media_dim) == 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k.has_decode], ids=str)
def test_decode_projects_no_media(kind: BlockKind) -> None:
    fused, upstream = twins(kind.build())
    x, media, locations = kind.inputs(images=3)
    recorded(lambda: kind.call(fused, x, media, locations))
    for _ in range(3):
        step = torch.randn(2, 1, TEXT_DIM)
        assert (
            recorded(lambda step=step: kind.call(fused, step, media, locations, decode=True)).work(kind.media_dim) == 0
        )
        ours, theirs = (kind.call(m, step, media, locations, decode=True) for m in (fused, upstream))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@kinds
def test_a_new_image_projects_only_its_own_rows(kind: BlockKind) -> None:
    """The prompt grows from two images to three: the new media hold the old ones as a prefix, in a new tensor."""
    fused, upstream = twins(kind.build())
    x, media, locations = kind.inputs(images=2)
    first = recorded(lambda: kind.call(fused, x, media, locations))
    text_only = first.work(kind.media_dim) - kind.media_work(2, 2)  # flamingo-pytorch's text has the width of its media
    grown = torch.cat([media, torch.randn(2, 1, TOKENS, kind.media_dim)], 1)
    locations = locations.clone()
    locations[:, -1] = True
    step = recorded(lambda: kind.call(fused, x, grown, locations))
    assert step.work(kind.media_dim) - text_only == kind.media_work(2, 1)
    with torch.no_grad():
        ours, theirs = (kind.call(m, x, grown, locations) for m in (fused, upstream))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        other = torch.cat([media.flip(1), grown[:, 2:], torch.randn(2, 1, TOKENS, kind.media_dim)], 1)  # prefix changed
        ours, theirs = (kind.call(m, x, other, locations) for m in (fused, upstream))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@kinds
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_images_that_no_row_sees_are_not_read(kind: BlockKind, decode: bool) -> None:
    """NaN in their features must not reach any output. (Upstream multiplies them by a weight of 0, which gives NaN.)"""
    if decode and not kind.has_decode:
        pytest.skip("flamingo-pytorch has no decode mode")
    fused, _ = twins(kind.build())
    x, media, locations = kind.inputs(images=4, length=8)
    locations[0, 5:] = False  # row 0 sees images 1 and 2 of 4, row 1 image 1
    poisoned = media.clone()
    poisoned[0, 2:] = torch.nan
    poisoned[1, 1:] = torch.nan
    if decode:
        x = x[:, :1]
        poisoned[0, 0] = torch.nan  # every new token follows the last image
    with torch.no_grad():
        clean, ours = (kind.call(fused, x, m, locations, decode=decode) for m in (media, poisoned))
    assert ours.isfinite().all()
    assert torch.equal(ours, clean)


# media keys and values of a whole generation


def generate(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Recorder:
    return recorded(lambda: model.generate(**inputs, pad_token_id=0, do_sample=False, **options))


def test_open_flamingo_generation() -> None:
    batch, images, patches, layers = 2, 2, 4, 2
    fused, _ = twins(of_model())
    inputs = of_inputs(batch, images=images)
    features = torch.randn(batch, images, 1, patches, MEDIA_DIM)
    resampler = recorded(lambda: copy.deepcopy(fused).perceiver(features)).work(MEDIA_DIM)
    expected = resampler + layers * batch * images * 64 * 1024
    for options in ({"max_new_tokens": 1}, {"max_new_tokens": 7}, {"max_new_tokens": 7, "num_beams": 3}):
        fused.vision_encoder.images_seen = 0
        assert generate(fused, inputs, **options).work(MEDIA_DIM) == expected, options
        assert fused.vision_encoder.images_seen == batch * images, options


@pytest.mark.parametrize("resampler", [True, False], ids=["resampler", "patches"])
def test_idefics_generation(resampler: bool) -> None:
    batch, images, layers = 2, 3, 2
    tokens = 8 if resampler else 5
    fused, _ = twins(idefics(resampler=resampler))
    inputs = idefics_inputs(batch=batch, images=images)

    def towers() -> None:
        model = copy.deepcopy(fused).model
        features = model.vision_model(inputs["pixel_values"].flatten(0, 1)).last_hidden_state
        if resampler:
            model.perceiver_resampler(features)

    seen: list[int] = []
    fused.model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["pixel_values"]).shape[0]), with_kwargs=True
    )
    expected = recorded(towers).work(MEDIA_DIM) + layers * batch * images * tokens * 2 * TEXT_DIM
    seen.clear()
    for options in ({"max_new_tokens": 1}, *({"max_new_tokens": 7, "num_beams": n} for n in beams("idefics"))):
        assert generate(fused, inputs, **options).work(MEDIA_DIM) == expected, options
        assert sum(seen) == batch * images, options
        seen.clear()


# the resampler

RESAMPLERS: dict[str, tuple[Callable[[int], nn.Module], int, int]] = {  # build(depth), inner width, latents
    "open_flamingo": (lambda depth: of_resampler(depth=depth), 32, 5),
    "flamingo_pytorch": (lambda depth: luc_resampler(depth=depth), 32, 5),
    "idefics": (lambda depth: _idefics_resampler(depth, qk_norms=False), 64, 8),
    "idefics_qk_norms": (lambda depth: _idefics_resampler(depth, qk_norms=True), 64, 8),
}


def _idefics_resampler(depth: int, qk_norms: bool) -> nn.Module:
    model = idefics(qk_norms=qk_norms)
    config = model.config
    return type(model.model.perceiver_resampler)(config, MEDIA_DIM, depth, 4, 16, 8)


def _resampler_input(name: str, images: int, tokens: int) -> Tensor:
    x = torch.randn(1, images, 1, tokens, MEDIA_DIM)
    return {"open_flamingo": x, "flamingo_pytorch": x[:, :, 0]}.get(name, x[0, :, 0])


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", RESAMPLERS)
def test_resampler_work(name: str, grad: bool) -> None:
    """Media normalised once; K and V of all layers in one GEMM; no concatenation; layer 0 shared by the images."""
    build, inner, latents = RESAMPLERS[name]
    depth, images, tokens = 4, 4, 301
    fused, _ = twins(build(depth))
    x = _resampler_input(name, images, tokens)
    with torch.set_grad_enabled(grad), recording() as record:
        fused(x)
    rows, media_rows = images * latents, images * tokens
    once = latents * 3 * inner  # q, k and v of the first layer's latents
    expected = once + depth * media_rows * 2 * inner + (depth - 1) * rows * 3 * inner + depth * rows * 4 * MEDIA_DIM
    assert record.work(MEDIA_DIM) <= expected, (
        "the first layer's latents are projected for every image, or the media twice"
    )
    over_media = [g for g in record.gemms if g.k == MEDIA_DIM and media_rows in (g.m, g.n, g.batch * g.m)]
    assert len(over_media) == 1, over_media
    assert record.count("native_layer_norm", lambda shapes: shapes[0][-1] == MEDIA_DIM and tokens in shapes[0]) <= 1
    assert not [a for a in record.allocations if a[0] == "cat" and a[1] >= media_rows * MEDIA_DIM]


@pytest.mark.parametrize("name", RESAMPLERS)
def test_resampler_passes_over_the_media_do_not_grow_with_depth(name: str) -> None:
    """Ops whose result has the size of the media (norms, copies) are as many for two layers as for five."""
    build, _, _ = RESAMPLERS[name]
    images, tokens = 3, 301
    x = _resampler_input(name, images, tokens)
    size = images * tokens * MEDIA_DIM
    passes = []
    for depth in (2, 5):
        record = recorded(lambda depth=depth: twins(build(depth))[0](x))
        passes.append(sum(elements == size for _, elements in record.allocations))
    assert passes[0] == passes[1], passes


# memory

LENGTH, IMAGES, LATENTS, HEADS = 256, 64, 16, 2
DENSE = LENGTH * IMAGES * LATENTS  # the entries of a dense media mask; whole scores have HEADS times as many


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("images", [IMAGES, IMAGES // 2], ids=["every_image_present", "some_beyond"])
@pytest.mark.parametrize("build", [of_block, luc_block], ids=["open_flamingo", "flamingo_pytorch"])
def test_prefill_allocates_no_dense_mask_or_scores(
    build: Callable[..., nn.Module], images: int, training: bool
) -> None:
    sizes = {"dim": 32, "heads": HEADS, "dim_head": 16, "ff_mult": 2} | (
        {"dim_visual": 32} if build is of_block else {}
    )
    fused, _ = twins(build(**sizes))
    locations = torch.zeros(1, LENGTH, dtype=torch.bool)
    locations[0, :: LENGTH // IMAGES] = True
    x, media = torch.randn(1, LENGTH, 32), torch.randn(1, images, LATENTS, 32, requires_grad=training)
    with torch.set_grad_enabled(training), recording() as record:
        out = fused(x, media, media_locations=locations)
        if training:
            out.sum().backward()
    assert record.largest()[1] < LENGTH * images * LATENTS // 2, record.largest()


@pytest.mark.parametrize("build", [of_block, luc_block], ids=["open_flamingo", "flamingo_pytorch"])
def test_prefill_attending_to_all_previous_images_allocates_no_whole_scores(build: Callable[..., nn.Module]) -> None:
    sizes = {"dim": 32, "heads": HEADS, "dim_head": 16, "ff_mult": 2} | (
        {"dim_visual": 32} if build is of_block else {}
    )
    fused, _ = twins(build(immediate=False, **sizes))
    locations = torch.zeros(1, LENGTH, dtype=torch.bool)
    locations[0, :: LENGTH // IMAGES] = True
    x, media = torch.randn(1, LENGTH, 32), torch.randn(1, IMAGES, LATENTS, 32)
    record = recorded(lambda: fused(x, media, media_locations=locations))
    assert record.largest()[1] < DENSE, record.largest()


def test_idefics_prefill_allocates_no_more_than_upstream_s_own_mask() -> None:
    """IdeficsModel hands the layer a dense mask; the layer must not spread it over the heads."""
    fused, _ = twins(idefics(attention="eager").model.gated_cross_attn_layers[0])
    index = torch.arange(LENGTH) // (LENGTH // IMAGES)
    mask = torch.where(index[:, None] == torch.arange(IMAGES), 0.0, torch.finfo(torch.float32).min)
    mask = mask.repeat_interleave(LATENTS, -1)[None, None]
    x, media = torch.randn(1, LENGTH, TEXT_DIM), torch.randn(1, IMAGES * LATENTS, MEDIA_DIM)
    gate = torch.ones(1, LENGTH)
    record = recorded(lambda: fused(x, None, media, image_attention_mask=mask, cross_attention_gate=gate))
    assert record.largest()[1] <= DENSE, record.largest()

"""The known upstream bugs: reproduced by default, and repaired by the option of their name alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.builders import IMAGE_TOKEN, MEDIA_DIM, TEXT_DIM, idefics, luc_block, of_block, of_inputs, of_model
from tests.families.decoders import FlamingoDecoder
from tests.families.instruments import Results, assert_within_twice, backward_results

BLOCKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "open_flamingo": (of_block, MEDIA_DIM),
    "flamingo_pytorch": (luc_block, TEXT_DIM),
}
blocks = pytest.mark.parametrize("name", BLOCKS)
FIXES = [
    "index_beyond_images", "future_images", "generated_image_tokens", "missing_media_locations", "num_return_sequences",
    "masked_row_gradients",
]  # fmt: skip


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def others(fix: str) -> tuple[str, ...]:
    return tuple(f for f in FIXES if f != fix)


def without_attention(block: nn.Module, x: Tensor) -> Tensor:
    """What an upstream block makes of rows whose attention is 0: only its feed-forward part."""
    return block.ff(x) * block.ff_gate.tanh() + x


def locations(*rows: tuple[int, ...], length: int = 9) -> Tensor:
    out = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, positions in enumerate(rows):
        out[row, list(positions)] = True
    return out


# index_beyond_images: a row that follows more image tokens than there are images


@blocks
@pytest.mark.parametrize("fixes", [("index_beyond_images",), "all"], ids=str)
def test_rows_beyond_the_images_see_nothing(name: str, fixes: Any) -> None:
    build, width = BLOCKS[name]
    fused, upstream = twins(build(), fixes=fixes)
    x, media = torch.randn(2, 9, TEXT_DIM), torch.randn(2, 2, 4, width)
    where = locations((0, 2, 5), (1,))  # row 0 is beyond from position 5 on
    ours, theirs = fused(x, media, media_locations=where), upstream(x, media, media_locations=where)
    torch.testing.assert_close(ours[0, 5:], without_attention(upstream, x)[0, 5:])
    torch.testing.assert_close(ours[0, :5], theirs[0, :5])
    torch.testing.assert_close(ours[1], theirs[1])
    assert not torch.allclose(theirs[0, 5:], ours[0, 5:], atol=1e-3)


@blocks
def test_rows_beyond_the_images_see_the_mean_by_default(name: str) -> None:
    build, width = BLOCKS[name]
    fused, upstream = twins(build(), fixes=others("index_beyond_images"))
    x, media = torch.randn(2, 9, TEXT_DIM), torch.randn(2, 2, 4, width)
    where = locations((0, 2, 5), (1,))
    torch.testing.assert_close(fused(x, media, media_locations=where), upstream(x, media, media_locations=where))


def test_decode_beyond_the_images_sees_nothing() -> None:
    fused, upstream = twins(of_block(), fixes=("index_beyond_images",))
    x, media, where = torch.randn(2, 1, TEXT_DIM), torch.randn(2, 2, 4, MEDIA_DIM), locations((0, 2, 5), (1,))
    ours = fused(x, media, media_locations=where, use_cached_media=True)
    theirs = upstream(x, media, media_locations=where, use_cached_media=True)
    torch.testing.assert_close(ours[0], without_attention(upstream, x)[0])
    torch.testing.assert_close(ours[1], theirs[1])


# future_images: rows before the first image, where all previous images are attended to


@blocks
def test_rows_before_the_first_image_see_nothing(name: str) -> None:
    build, width = BLOCKS[name]
    fused, upstream = twins(build(immediate=False), fixes=("future_images",))
    x, media, where = torch.randn(2, 9, TEXT_DIM), torch.randn(2, 2, 4, width), locations((3, 6), ())
    ours, theirs = fused(x, media, media_locations=where), upstream(x, media, media_locations=where)
    expected = without_attention(upstream, x)
    torch.testing.assert_close(ours[0, :3], expected[0, :3])
    torch.testing.assert_close(ours[1], expected[1])
    torch.testing.assert_close(ours[0, 3:], theirs[0, 3:])
    assert not torch.allclose(theirs[0, :3], ours[0, :3], atol=1e-3)


@blocks
def test_rows_before_the_first_image_see_every_image_by_default(name: str) -> None:
    build, width = BLOCKS[name]
    fused, upstream = twins(build(immediate=False), fixes=others("future_images"))
    x, media, where = torch.randn(2, 9, TEXT_DIM), torch.randn(2, 2, 4, width), locations((3, 6), ())
    torch.testing.assert_close(fused(x, media, media_locations=where), upstream(x, media, media_locations=where))


# generated_image_tokens: an <image> token fed or generated during decode


def feed_image_token(model: nn.Module) -> tuple[FlamingoDecoder, Tensor]:
    """Two images a row, of which the prompt names one; then row 0 is fed <image> and row 1 a word; then three steps."""
    inputs = of_inputs(images=1) | {"vision_x": of_inputs(images=2)["vision_x"]}
    generation = FlamingoDecoder(model, inputs)
    with torch.no_grad():
        generation.step()
        generation.step(torch.tensor([[IMAGE_TOKEN], [7]]))
        for word in (11, 12, 13):
            generation.step(torch.full((2, 1), word))
    return generation, torch.stack(generation.logits[1:])


def test_an_image_token_in_decode_moves_its_own_row_on() -> None:
    """The repaired decode equals upstream's forward over the whole sequence, which counts right."""
    fused, upstream = twins(of_model(), fixes=("generated_image_tokens",))
    generation, ours = feed_image_token(fused)
    with torch.no_grad():
        whole = upstream(of_inputs(images=2)["vision_x"], generation.ids, torch.ones_like(generation.ids)).logits
    torch.testing.assert_close(ours, whole[:, -4:].transpose(0, 1), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(feed_image_token(upstream)[1], ours, atol=1e-2)


def test_an_image_token_in_decode_overwrites_all_locations_by_default() -> None:
    fused, upstream = twins(of_model(), fixes=others("generated_image_tokens"))
    torch.testing.assert_close(feed_image_token(fused)[1], feed_image_token(upstream)[1], atol=1e-4, rtol=1e-4)


def test_generate_counts_image_tokens_it_generates() -> None:
    """The language model is made to answer <image> to a certain word: decode must equal generation without a cache."""
    fused, upstream = twins(of_model(), fixes="all")
    inputs = of_inputs(images=1) | {"vision_x": of_inputs(images=2)["vision_x"]}
    options = {"max_new_tokens": 5, "pad_token_id": 0}
    processor = [lambda ids, scores: _forced(ids, scores, inputs["lang_x"].shape[1] + 1)]
    cached = fused.generate(**inputs, **options, logits_processor=processor)
    whole = upstream.generate(**inputs, **options, logits_processor=processor, use_cache=False)
    assert (cached == IMAGE_TOKEN).sum(1).tolist() == [2, 1]
    assert cached.tolist() == whole.tolist()


def _forced(ids: Tensor, scores: Tensor, position: int) -> Tensor:
    """Row 0 must say <image> at `position`; nobody may say it elsewhere."""
    scores = scores.clone()
    scores[:, IMAGE_TOKEN] = -torch.inf
    if ids.shape[1] == position:
        scores[0] = -torch.inf
        scores[0, IMAGE_TOKEN] = 0
    return scores


# missing_media_locations: open_flamingo's own default argument


def test_missing_locations_are_an_error_that_names_the_fix() -> None:
    fused, upstream = twins(of_block(), fixes=others("missing_media_locations"))
    x, media = torch.randn(2, 5, TEXT_DIM), torch.randn(2, 2, 4, MEDIA_DIM)
    with pytest.raises(AttributeError):
        upstream(x, media)
    with pytest.raises(Exception, match="missing_media_locations"):
        fused(x, media)


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
def test_missing_locations_mean_every_image(immediate: bool) -> None:
    fused, upstream = twins(of_block(immediate), fixes=("missing_media_locations",))
    x, media = torch.randn(2, 5, TEXT_DIM), torch.randn(2, 2, 4, MEDIA_DIM)
    torch.testing.assert_close(fused(x, media), upstream(x, media, use_cached_media=True))


# num_return_sequences: several samples for each row of a batch

SAMPLES: dict[str, Any] = {
    "max_new_tokens": 4,
    "pad_token_id": 0,
    "do_sample": True,
    "top_k": 1,
    "num_return_sequences": 3,
}


def test_several_sequences_a_row_are_an_error_that_names_the_fix() -> None:
    fused, upstream = twins(of_model(), fixes=others("num_return_sequences"))
    with pytest.raises(RuntimeError):
        upstream.generate(**of_inputs(), **SAMPLES)
    with pytest.raises(Exception, match="num_return_sequences") as caught:
        fused.generate(**of_inputs(), **SAMPLES)
    assert "fix" in str(caught.value)


def test_several_sequences_a_row() -> None:
    """Sampling from the likeliest token alone returns the greedy answer of each row, three times."""
    fused, upstream = twins(of_model(), fixes=("num_return_sequences",))
    greedy = upstream.generate(**of_inputs(), max_new_tokens=4, pad_token_id=0)
    assert fused.generate(**of_inputs(), **SAMPLES).tolist() == greedy.repeat_interleave(3, 0).tolist()


def test_several_beams_a_row_need_no_fix() -> None:
    fused, upstream = twins(of_model())
    options = {"max_new_tokens": 4, "pad_token_id": 0, "num_beams": 3, "num_return_sequences": 2}
    assert fused.generate(**of_inputs(), **options).tolist() == upstream.generate(**of_inputs(), **options).tolist()


# masked_row_gradients: idefics, eager attention, fp16, a row that sees no image


def masked_row_results(layer: nn.Module, dtype: torch.dtype, seed: int = 0) -> Results:
    """The first row sees nothing, and its scores are so low that adding the lowest fp16 number overflows."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(1, 4, TEXT_DIM, generator=generator).half().to(dtype).requires_grad_()
    media = 20 * torch.randn(1, 1, MEDIA_DIM, generator=generator) + torch.randn(1, 6, MEDIA_DIM, generator=generator)
    media = media.half().to(dtype).requires_grad_()
    mask = torch.zeros(1, 1, 4, 6, dtype=dtype)
    mask[:, :, 0] = torch.finfo(dtype).min
    gate = torch.tensor([[0, 1, 1, 1]], dtype=dtype)
    layer.zero_grad()
    out = layer(h, None, media, image_attention_mask=mask, cross_attention_gate=gate)
    return backward_results(out, {"h": h, "media": media}, layer)


def half_layer(attention: str = "eager", seed: int = 0) -> nn.Module:
    return idefics(attention=attention, qk_norms=False, seed=seed).model.gated_cross_attn_layers[0].half()


def test_masked_rows_have_finite_gradients() -> None:
    """As precise as upstream under sdpa, which has not the bug."""
    ours, theirs, exact = [], [], []
    for seed in range(6):
        fused, upstream = twins(half_layer(seed=seed), fixes=("masked_row_gradients",))
        ours.append(masked_row_results(fused, torch.float16, seed))
        theirs.append(masked_row_results(half_layer("sdpa", seed), torch.float16, seed))
        exact.append(masked_row_results(upstream.float(), torch.float32, seed))
    assert_within_twice(ours, theirs, exact)


def test_masked_rows_poison_gradients_by_default() -> None:
    fused, upstream = twins(half_layer(), fixes=others("masked_row_gradients"))
    ours, theirs = (masked_row_results(m, torch.float16) for m in (fused, upstream))
    torch.testing.assert_close(ours["output"], theirs["output"], atol=2e-2, rtol=2e-2)
    assert theirs["d h"].isnan().any(), "upstream no longer has the bug: drop the fix"
    assert {n for n, g in ours.items() if g.isnan().any()} == {n for n, g in theirs.items() if g.isnan().any()}


# the option itself


def test_a_fix_may_be_given_by_its_name_alone() -> None:
    fused, upstream = twins(of_block(), fixes="missing_media_locations")
    x, media = torch.randn(2, 5, TEXT_DIM), torch.randn(2, 2, 4, MEDIA_DIM)
    torch.testing.assert_close(fused(x, media), upstream(x, media, use_cached_media=True))


@pytest.mark.parametrize("fixes", [("index_beyond_image",), "everything", ("index_beyond_images", "")], ids=str)
def test_an_unknown_fix_is_an_error_that_lists_the_known(fixes: Any) -> None:
    block = of_block()
    before = type(block)
    with pytest.raises(ValueError, match="index_beyond_images"):
        mllm_fast.fuse(block, fixes=fixes)
    assert type(block) is before


@pytest.mark.parametrize("level", [-1, 3, "1", None], ids=str)
def test_an_unknown_level_is_an_error(level: Any) -> None:
    block = of_block()
    before = type(block)
    with pytest.raises(ValueError, match="level"):
        mllm_fast.fuse(block, level=level)
    assert type(block) is before

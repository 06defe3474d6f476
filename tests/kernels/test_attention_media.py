"""attention with media visibility: dense masks in fp64, open_flamingo, and what is allocated."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels.attention import Mask, MediaRanges, MediaSubsets, attention
from tests.kernels.attention_dense import Recorder, dense_attention, gradients, plain_path, visible

TIGHT = {"rtol": 0.0, "atol": 1e-11}


def phi(locations: Tensor, images: int, tokens: int, beyond: str = "zero") -> MediaRanges:
    """Flamingo's mask: each token sees the last image before it. `locations` [B, L] bool: <image> tokens."""
    last = locations.long().cumsum(-1)
    return MediaRanges(last - 1, last, images, tokens, beyond)  # type: ignore[arg-type]


@st.composite
def media_calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    key_rows, fold = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, queries = key_rows * fold, draw(st.integers(1, 8))
    images, tokens = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 99)))
    q = torch.randn(batch, queries, key_heads * group, 4, dtype=torch.double)
    leaves = [q, *(torch.randn(key_rows, images * tokens, key_heads, 4, dtype=torch.double) for _ in "kv")]
    if draw(st.booleans()):
        extra = draw(st.sampled_from([1, key_rows, batch])), 2, key_heads, 4
        leaves += [torch.randn(extra, dtype=torch.double) for _ in "kv"]
    rows = draw(st.sampled_from([1, batch])), queries
    kind = draw(st.sampled_from(["last", "all so far", "any order", "subsets"]))
    media: MediaRanges | MediaSubsets
    if kind == "subsets":
        media = MediaSubsets.from_mask(torch.rand(*rows, images) < 0.5, tokens)
    else:
        beyond = draw(st.sampled_from(["zero", "mean"]))
        if kind == "any order":
            first = torch.randint(-1, images + 2, rows)
            last = first + torch.randint(-1, 4, rows)
        else:
            last = (torch.rand(rows) < 0.4).long().cumsum(-1)
            first = last - 1 if kind == "last" else torch.zeros_like(last)
        dtype = draw(st.sampled_from([torch.int32, torch.int64]))
        media = MediaRanges(first.to(dtype), last.to(dtype), images, tokens, beyond)
    parts: dict[str, Any] = {"media": media}
    if draw(st.booleans()):
        parts["key_lengths"] = torch.randint(0, images * tokens + 1, (batch,))
    if draw(st.booleans()):
        parts["key_padding"] = torch.rand(batch, images * tokens) < 0.7
    if draw(st.integers(0, 3)) == 0:
        parts["causal"] = True
    settings: dict[str, Any] = {"mask": Mask(**parts)}
    if draw(st.booleans()):
        settings["kv_index"] = torch.randint(0, key_rows, (batch,))
    return [x.requires_grad_() for x in leaves], settings


@pytest.mark.parametrize("path", ["flash", "plain"])
@given(media_calls())
@settings(max_examples=150)
def test_matches_sdpa_under_a_dense_mask(path: str, call: tuple[list[Tensor], dict[str, Any]]) -> None:
    leaves, settings = call
    if len(leaves) > 3:
        settings = settings | {"extra_k": leaves[3], "extra_v": leaves[4]}
    grad = torch.randn(leaves[0].shape, dtype=torch.double)
    expected = dense_attention(*leaves[:3], **settings)
    with plain_path() if path == "plain" else contextlib.nullcontext():
        out = attention(*leaves[:3], **settings)
        ours = torch.autograd.grad(out, leaves, grad)
        with torch.no_grad():
            assert torch.equal(attention(*leaves[:3], **settings), out)
    torch.testing.assert_close(out, expected, **TIGHT)
    for mine, theirs in zip(ours, gradients(expected, leaves, grad), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


@pytest.mark.parametrize("immediate", [True, False])
def test_matches_open_flamingo(immediate: bool) -> None:
    """The module that the mask comes from; one row has more <image> tokens than images, one begins with none."""
    helpers = pytest.importorskip("open_flamingo.src.helpers")
    dim, tokens, images = 16, 4, 3
    module = helpers.MaskedCrossAttention(
        dim=dim, dim_visual=dim, dim_head=8, heads=2, only_attend_immediate_media=immediate
    ).double()
    x, media = torch.randn(2, 12, dim, dtype=torch.double), torch.randn(2, images, tokens, dim, dtype=torch.double)
    locations = torch.zeros(2, 12, dtype=torch.bool)
    locations[0, ::3] = True  # four, for three images
    locations[1, [0, 6]] = True
    if immediate:
        locations[1, 0] = False
        mask = Mask(media=phi(locations, images, tokens, "mean"))
    else:
        last = locations.long().cumsum(-1)
        mask = Mask(media=MediaRanges(torch.zeros_like(last), last, images, tokens))
    q = module.to_q(module.norm(x)).unflatten(-1, (2, 8))
    k, v = (y.unflatten(-1, (2, 8)) for y in module.to_kv(media.flatten(1, 2)).chunk(2, -1))
    ours = module.to_out(attention(q, k, v, mask=mask).flatten(2))
    theirs = module(x, media, media_locations=locations)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    grad, parameters = torch.randn_like(ours), list(module.parameters())
    for mine, other in zip(gradients(ours, parameters, grad), gradients(theirs, parameters, grad), strict=True):
        torch.testing.assert_close(mine, other, **TIGHT)


@pytest.mark.parametrize("beyond", ["zero", "mean"])
@pytest.mark.parametrize("path", ["flash", "plain"])
def test_gradcheck(beyond: str, path: str) -> None:
    q = torch.randn(2, 5, 2, 3, dtype=torch.double, requires_grad=True)
    k, v = (torch.randn(2, 4, 2, 3, dtype=torch.double, requires_grad=True) for _ in "kv")
    # Nothing, image 0, a hole, both in part beyond, wholly beyond.
    first, last = torch.tensor([[0, 0, 1, 1, 2]]), torch.tensor([[0, 1, 1, 3, 4]])
    mask = Mask(media=MediaRanges(first, last, 2, 2, beyond))  # type: ignore[arg-type]
    with plain_path() if path == "plain" else contextlib.nullcontext():
        assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask=mask), (q, k, v))


def test_beyond_mean_is_the_mean_of_all_values_whatever_the_keys_hold() -> None:
    q, v = torch.randn(2, 2, 2, 8, requires_grad=True), torch.randn(2, 6, 2, 8, requires_grad=True)
    k = torch.full_like(v, torch.nan).requires_grad_()
    mask = Mask(
        media=MediaRanges(torch.tensor([[3, 0]]), torch.tensor([[4, 0]]), 3, 2, "mean"),
        key_lengths=torch.tensor([1, 0]),
    )
    out = attention(q, k, v, mask=mask)
    torch.testing.assert_close(out[:, 0], v.mean(1))
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    assert (dq == 0).all()
    assert (dk == 0).all()
    torch.testing.assert_close(dv, (grad[:, :1] / 6).expand_as(v))


@pytest.mark.parametrize("images", [1, 63, 64, 65, 130])
def test_subsets_of_many_images(images: int) -> None:
    seen = torch.rand(2, 6, images) < 0.3
    seen[0, 0] = False
    seen[0, 1] = True
    seen[1, :, -1] = True
    media = MediaSubsets.from_mask(seen, 2)
    assert media.words.shape == (2, 6, -(-images // 64))
    assert torch.equal(visible(Mask(media=media), 2, 6, images * 2), seen.repeat_interleave(2, -1))
    leaves = [
        torch.randn(2, length, 2, 4, dtype=torch.double, requires_grad=True) for length in (6, images * 2, images * 2)
    ]
    out, expected = attention(*leaves, mask=Mask(media=media)), dense_attention(*leaves, mask=Mask(media=media))
    torch.testing.assert_close(out, expected, **TIGHT)
    grad = torch.randn_like(out)
    for mine, theirs in zip(gradients(out, leaves, grad), gradients(expected, leaves, grad), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["last", "all so far", "subsets"])
def test_half_precision_is_at_most_twice_as_wrong_as_sdpa(dtype: torch.dtype, kind: str) -> None:
    locations = torch.zeros(2, 48, dtype=torch.bool)
    locations[0, 1::9], locations[1, ::12] = True, True
    last = locations.long().cumsum(-1)
    media: MediaRanges | MediaSubsets = phi(locations, 6, 16)
    if kind == "all so far":
        media = MediaRanges(torch.zeros_like(last), last, 6, 16)
    if kind == "subsets":
        media = MediaSubsets.from_mask(torch.rand(2, 48, 6) < 0.5, 16)
    leaves = [torch.randn(2, length, 4, 64).to(dtype).requires_grad_() for length in (48, 96, 96)]
    grad = torch.randn(leaves[0].shape).to(dtype)

    def run(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        out = function(*leaves, mask=Mask(media=media))
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact = run(dense_attention, [x.detach().float().requires_grad_() for x in leaves])
    for e, t, o in zip(exact, run(dense_attention, leaves), run(attention, leaves), strict=True):
        assert o.dtype == dtype
        assert (o - e).abs().max() <= 2 * (t - e).abs().max()
        assert (o - e).norm() <= 2 * (t - e).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ranges", "subsets"])
@pytest.mark.parametrize("path", ["flash", "plain"])
def test_images_that_nobody_sees_are_not_read(dtype: torch.dtype, kind: str, path: str) -> None:
    seen = torch.zeros(2, 7, 5, dtype=torch.bool)
    seen[:, 1:4, 1] = seen[0, 4:, 3] = seen[1, 5, 1] = seen[0, 2, 4] = True
    media: MediaRanges | MediaSubsets = MediaSubsets.from_mask(seen, 3)
    if kind == "ranges":
        seen[0, 2, 4] = False
        first = seen.long().argmax(-1)
        media = MediaRanges(first, first + seen.any(-1), 5, 3)
    hidden = ~seen.any(1).repeat_interleave(3, -1)[..., None, None]
    clean = [torch.randn(2, length, 2, 8).to(dtype).requires_grad_() for length in (7, 15, 15)]
    dirty = [clean[0].detach().clone().requires_grad_()]
    dirty += [x.detach().masked_fill(hidden, torch.nan).requires_grad_() for x in clean[1:]]
    grad = torch.randn(2, 7, 2, 8).to(dtype)
    with plain_path() if path == "plain" else contextlib.nullcontext():
        first_out, second_out = (attention(*leaves, mask=Mask(media=media)) for leaves in (clean, dirty))
        grads = torch.autograd.grad(first_out, clean, grad), torch.autograd.grad(second_out, dirty, grad)
    assert torch.equal(first_out, second_out)
    assert (first_out[:, 0] == 0).all()
    for mine, theirs in zip(*grads, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()
    for dx in grads[0][1:]:
        assert (dx[hidden.expand_as(dx)] == 0).all()


def test_two_runs_are_bitwise_equal() -> None:
    seen = torch.rand(2, 30, 6) < 0.4
    leaves = [torch.randn(2, length, 4, 16, requires_grad=True) for length in (30, 48, 48)]
    grad = torch.randn(leaves[0].shape)
    runs = []
    for _ in range(2):
        out = attention(*leaves, mask=Mask(media=MediaSubsets.from_mask(seen, 8)))
        runs.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_neither_a_dense_mask_nor_scores_are_allocated(dtype: torch.dtype, train: bool) -> None:
    length, images, tokens, heads, size = 512, 16, 64, 2, 32
    locations = torch.zeros(1, length, dtype=torch.bool)
    locations[:, :: length // images] = True
    q = torch.randn(1, length, heads, size).to(dtype).requires_grad_(train)
    k, v = (torch.randn(1, images * tokens, heads, size).to(dtype).requires_grad_(train) for _ in "kv")
    for media in (
        phi(locations, images, tokens),
        MediaSubsets.from_mask(torch.arange(images) == locations.long().cumsum(-1)[..., None] - 1, tokens),
    ):
        with Recorder() as recorder:
            out = attention(q, k, v, mask=Mask(media=media))
            if train:
                torch.autograd.grad(out.sum(), (q, k, v))
        # The mask would be length * images * tokens elements, and the scores heads times that.
        assert recorder.largest <= k.numel()
        assert recorder.flash_calls == images


def test_the_plain_path_bounds_its_scores() -> None:
    q, k, v = torch.randn(1, 300, 2, 8), torch.randn(1, 300, 2, 8), torch.randn(1, 300, 2, 8)
    with plain_path(scores=6000), torch.no_grad(), Recorder() as recorder:
        attention(q, k, v)
    assert recorder.largest <= 6000


class TestDecode:
    """One token a row, against keys that stay where they are."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equal_ranges_are_one_call_over_a_slice(self, dtype: torch.dtype) -> None:
        q, k, v = (torch.randn(4, length, 2, 8).to(dtype) for length in (1, 640, 640))
        at = torch.full((4, 1), 7)
        mask = Mask(media=MediaRanges(at, at + 1, 10, 64))
        with torch.inference_mode(), Recorder() as recorder:
            out = attention(q, k, v, mask=mask)
        assert recorder.flash_calls == 1
        # Half precision widens the slice, and only that.
        assert recorder.largest <= (q.numel() if dtype == torch.float32 else k.numel() // 10)
        exact = dense_attention(q.float(), k.float(), v.float(), mask=mask)
        torch.testing.assert_close(out, exact.to(dtype))

    def test_beams_share_a_slice(self) -> None:
        q, k, v = torch.randn(6, 1, 2, 8), torch.randn(2, 640, 2, 8), torch.randn(2, 640, 2, 8)
        at = torch.tensor([3, 3, 3, 9, 9, 9])[:, None]
        mask = Mask(media=MediaRanges(at, at + 1, 10, 64))
        with torch.inference_mode(), Recorder() as recorder:
            out = attention(q, k, v, mask=mask)
        assert recorder.flash_calls == 2
        assert recorder.largest <= q.numel()
        torch.testing.assert_close(out, dense_attention(q, k, v, mask=mask))

    def test_steps_are_rows_of_the_whole(self) -> None:
        q, k, v = (torch.randn(2, length, 2, 8, dtype=torch.double) for length in (9, 12, 12))
        locations = torch.zeros(2, 9, dtype=torch.bool)
        locations[0, [0, 3, 5]], locations[1, [2, 4]] = True, True
        media = phi(locations, 3, 4)
        whole = attention(q, k, v, mask=Mask(media=media))
        for i in range(9):
            step = MediaRanges(media.first[:, i : i + 1], media.last[:, i : i + 1], 3, 4)
            part = attention(q[:, i : i + 1], k, v, mask=Mask(media=step))
            torch.testing.assert_close(part, whole[:, i : i + 1], **TIGHT)


def test_scattered_rows_are_gathered_into_one_call_a_range() -> None:
    q, k, v = torch.randn(1, 64, 2, 8), torch.randn(1, 8, 2, 8), torch.randn(1, 8, 2, 8)
    at = torch.arange(64)[None] % 4
    mask = Mask(media=MediaRanges(at, at + 1, 4, 2))
    with torch.no_grad(), Recorder() as recorder:
        out = attention(q, k, v, mask=mask)
    assert recorder.flash_calls == 4
    torch.testing.assert_close(out, dense_attention(q, k, v, mask=mask))


def test_dropout_repeats_its_pattern_over_segments_and_sources() -> None:
    """A finite difference along a random direction: it is right only if backward drops what forward dropped."""
    leaves = [torch.randn(2, length, 2, 4, dtype=torch.double, requires_grad=True) for length in (6, 6, 6, 3, 3)]
    media = MediaSubsets.from_mask(torch.rand(2, 6, 3) < 0.5, 2)

    def call(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor, extra_v: Tensor) -> Tensor:
        mask = Mask(media=media)
        return attention(q, k, v, extra_k=extra_k, extra_v=extra_v, mask=mask, dropout_p=0.4, seed=11)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)

"""The Triton kernels of attention against SDPA with dense masks in fp64; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from mllm_fast.kernels.attention import Mask, MediaRanges, MediaSubsets
from tests.kernels.attention_dense import gradients
from tests.kernels.attention_on_triton import check, exact, moved, on_triton, qkv, random
from tests.kernels.test_attention import calls
from tests.kernels.test_attention_media import media_calls, phi
from tests.kernels.triton_device import DEVICE, INTERPRETING, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")

# The drawn calls come from the strategies of the reference's tests, but fewer of them: the interpreter
# is slow, and so is the compiler.
EXAMPLES = settings(max_examples=6 if INTERPRETING else 30)


@EXAMPLES
@given(calls())
def test_drawn_calls(call: tuple[int, list[Tensor], dict[str, Any]]) -> None:
    batch, leaves, settings = call
    check(leaves, batch, **settings)


@EXAMPLES
@given(media_calls())
def test_drawn_media_calls(call: tuple[list[Tensor], dict[str, Any]]) -> None:
    leaves, settings = call
    check(leaves, **settings)


@pytest.mark.parametrize("size", [8, 40, 64, 72, 80, 88, 96, 112, 128])
def test_head_dims(size: int) -> None:
    check([*random((2, 5, 4, size), (1, 37, 2, size), (1, 37, 2, size), (2, 3, 2, size), (2, 3, 2, size))])


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 67), (37, 1), (13, 64), (67, 101)])
@pytest.mark.parametrize("kind", ["all", "causal", "prefix", "lengths and padding"])
def test_lengths_past_one_tile(queries: int, keys: int, kind: str) -> None:
    mask = None
    if kind == "causal":
        mask = Mask(causal=True)
    if kind == "prefix":
        mask = Mask(causal=True, prefix=keys // 2)
    if kind == "lengths and padding":
        mask = Mask(key_lengths=torch.tensor([keys, keys // 3]), key_padding=torch.rand(2, keys) < 0.7)
    check(qkv(2, queries, keys), mask=mask)


@pytest.mark.parametrize("extra_rows", [1, 2, 4])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("queries", [1, 21])
def test_two_sources_beams_and_grouped_heads(extra_rows: int, index: bool, queries: int) -> None:
    leaves = random((4, queries, 6, 8), *((2, 35, 2, 8),) * 2, *((extra_rows, 33, 2, 8),) * 2)
    settings: dict[str, Any] = {"mask": Mask(key_lengths=torch.tensor([35, 0, 20, 31]))}
    if index:
        settings["kv_index"] = torch.tensor([1, 0, 1, 1])
    check(leaves, **settings)


def test_queries_shared_by_the_batch() -> None:
    check(random((1, 9, 2, 8), (3, 20, 2, 8), (3, 20, 2, 8)), batch=3)


@pytest.mark.parametrize("kind", ["last", "all so far", "any order", "beyond", "no image seen", "no image"])
def test_media_ranges_of_several_tiles(kind: str) -> None:
    batch, queries, images, tokens = 2, 45, 4, 19
    if kind == "no image":
        images = 0
    locations = torch.rand(batch, queries) < 0.15
    last = locations.long().cumsum(-1)
    media = phi(locations, images, tokens, "mean" if kind == "beyond" else "zero")
    if kind == "all so far":
        media = MediaRanges(torch.zeros_like(last), last, images, tokens)
    if kind == "any order":
        first = torch.randint(-1, images + 1, (1, queries))
        media = MediaRanges(first, first + torch.randint(-1, 3, (1, queries)), images, tokens)
    if kind == "no image seen":
        media = MediaRanges(last, last, images, tokens)
    check(qkv(batch, queries, images * tokens), mask=Mask(media=media))


@pytest.mark.parametrize("images", [1, 64, 70])
def test_media_of_many_images(images: int) -> None:
    seen = torch.rand(1, 6, images) < 0.1
    seen[0, 0] = False
    seen[0, 1, -1] = True
    leaves = qkv(1, 6, images, heads=1, key_heads=1)
    check(leaves, mask=Mask(media=MediaSubsets.from_mask(seen, 1)))
    last = torch.tensor([[0, 1, images // 2, images, images, images + 2]])
    first = (last - 5).index_fill(1, torch.tensor([5]), images + 1)
    check(leaves, mask=Mask(media=MediaRanges(first, last, images, 1, "mean")))


@pytest.mark.parametrize(
    ("size", "kind"), [(64, "all"), (72, "causal"), (88, "media"), (96, "two sources"), (160, "causal"), (256, "media")]
)
def test_fp16_is_at_most_twice_as_wrong_as_sdpa(size: int, kind: str) -> None:
    leaves = [x.to(DEVICE, torch.float16).requires_grad_() for x in qkv(1, 40, 64, size=size)]
    settings: dict[str, Any] = {}
    if kind == "two sources":
        leaves += [x.to(DEVICE, torch.float16).requires_grad_() for x in qkv(1, 17, 17, size=size)[1:]]
    if kind == "causal":
        settings["mask"] = Mask(causal=True)
    if kind == "media":
        settings["mask"] = Mask(media=phi(torch.arange(40)[None] % 9 == 1, 4, 16, "mean"))
    grad = torch.randn(1, 40, 2, size).half()
    wide, narrow = ([x.detach().cpu().to(t).requires_grad_() for x in leaves] for t in (torch.float32, torch.float16))
    results = []
    for run, inputs in ((on_triton, leaves), (exact, narrow), (exact, wide)):
        out = run(inputs, **settings)
        assert out.dtype == inputs[0].dtype
        results.append([x.cpu() for x in (out, *gradients(out, inputs, grad.to(out)))])
    for ours, theirs, reference in zip(*results, strict=True):
        assert (ours - reference).norm() <= 2 * (theirs - reference).norm()
        assert (ours - reference).abs().max() <= 2 * (theirs - reference).abs().max()


@pytest.mark.parametrize("kind", ["lengths", "padding", "ranges", "subsets", "beyond", "causal media"])
def test_what_nobody_sees_is_not_read(kind: str) -> None:
    queries, images, tokens = 9, 5, 7
    keys = images * tokens
    seen = torch.zeros(2, queries, keys, dtype=torch.bool)
    first = torch.tensor([[0, 1, 1, 1, 4, 4, 0, 1, 4]]).expand(2, -1)
    last = torch.tensor([[0, 2, 2, 2, 5, 5, 0, 2, 5]]).expand(2, -1)
    image = torch.arange(keys) // tokens
    in_range = (image >= first[..., None]) & (image < last[..., None])
    if kind == "lengths":
        lengths = torch.tensor([keys - 3, 0])
        mask, seen = Mask(key_lengths=lengths), (torch.arange(keys) < lengths[:, None, None]).expand(-1, queries, -1)
    elif kind == "padding":
        padding = torch.rand(2, keys) < 0.5
        mask, seen = Mask(key_padding=padding), padding[:, None].expand(-1, queries, -1)
    elif kind == "ranges":
        mask, seen = Mask(media=MediaRanges(first, last, images, tokens)), in_range
    elif kind == "subsets":
        mask, seen = Mask(media=MediaSubsets.from_mask(in_range[..., ::tokens], tokens)), in_range
    elif kind == "causal media":
        causal = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
        mask, seen = Mask(media=MediaRanges(first, last, images, tokens), causal=True), in_range & causal
    else:
        # Row 0 becomes the mean of all values, and sees no key.
        first, last = (x.clone().index_fill(1, torch.tensor([0]), images + n) for n, x in enumerate((first, last)))
        mask, seen = Mask(media=MediaRanges(first, last, images, tokens, "mean")), in_range
    clean = moved(qkv(2, queries, keys), torch.float32)
    hidden = ~seen.any(1)[..., None, None].to(DEVICE)
    blind = ~seen.any(2)[..., None, None].to(DEVICE)
    hidden_values = torch.zeros_like(hidden) if kind == "beyond" else hidden
    dirty = [
        x.detach().masked_fill(m, torch.nan).requires_grad_()
        for x, m in zip(clean, (blind, hidden, hidden_values), strict=True)
    ]
    grad = torch.randn(clean[0].shape, device=DEVICE)
    outs = [on_triton(leaves, mask=mask) for leaves in (clean, dirty)]
    assert torch.equal(*outs)
    if kind != "beyond":
        assert (outs[0][blind.expand_as(outs[0])] == 0).all()
    found = [torch.autograd.grad(out, leaves, grad) for out, leaves in zip(outs, (clean, dirty), strict=True)]
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()
    for dx, m in zip(found[0], (blind, hidden, hidden_values), strict=True):
        assert (dx[m.expand_as(dx)] == 0).all()


def test_two_runs_are_bitwise_equal_and_write_into_nothing() -> None:
    leaves = moved(random((3, 20, 4, 24), *((1, 40, 2, 24),) * 2, *((1, 5, 2, 24),) * 2), torch.float32)
    before = [x.detach().clone() for x in leaves]
    runs = []
    for _ in range(2):
        out = on_triton(leaves, mask=Mask(causal=True))
        kept, grad = out.detach().clone(), torch.ones_like(out)
        runs += [[out, *torch.autograd.grad(out, leaves, grad, retain_graph=True)] for _ in range(2)]
        assert torch.equal(out, kept)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))
    assert all(map(torch.equal, leaves, before))


class TestDropout:
    def pattern(self, p: float, seed: int, queries: int, keys: int, mask: Mask | None = None) -> Tensor:
        """What each probability was multiplied with, read off with one-hot values: [2, 2, queries, keys]."""
        q = torch.zeros(2, queries, 2, keys)
        v = torch.eye(keys)[None, :, None].expand(2, -1, 2, -1)
        leaves = [x.to(DEVICE) for x in (q, torch.zeros(v.shape), v)]
        out, seen = on_triton(leaves, dropout_p=p, seed=seed, mask=mask), on_triton(leaves, mask=mask)
        return torch.where(seen > 0, out / seen, torch.nan).transpose(1, 2).cpu()

    def test_rate_and_mean(self) -> None:
        factors = self.pattern(0.3, 1, 150, 100)
        assert set(factors.double().round(decimals=4).unique().tolist()) == {0.0, round(1 / 0.7, 4)}
        assert abs((factors == 0).double().mean() - 0.3) < 0.01
        for dim in range(4):
            # No row, key, head or batch row repeats another.
            assert not torch.equal(factors.select(dim, 0), factors.select(dim, 1))

    def test_pattern_is_a_function_of_the_seed(self) -> None:
        first = self.pattern(0.5, 3, 6, 9)
        assert torch.equal(first, self.pattern(0.5, 3, 6, 9))
        assert not torch.equal(first, self.pattern(0.5, 4, 6, 9))
        assert not torch.equal(first, self.pattern(0.5, 3 + (1 << 40), 6, 9))

    @pytest.mark.parametrize("kind", ["causal", "media", "two sources"])
    def test_output_and_gradients_match_the_same_pattern(self, kind: str) -> None:
        queries, keys = 21, 40
        mask = Mask(causal=True)
        if kind == "media":
            mask = Mask(media=phi(torch.arange(queries)[None] % 6 == 1, 5, 8))
        if kind == "two sources":
            mask = Mask(key_lengths=torch.tensor([33, 33]))
        # The second source's keys are numbered after the first's, as if they were one.
        factors = self.pattern(0.4, 9, queries, keys, mask if kind != "two sources" else None)
        leaves = [x.double().requires_grad_() for x in qkv(2, queries, keys)]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        scores = q @ k.mT * 8**-0.5
        if kind != "two sources":
            scores = scores.masked_fill(factors.isnan(), -1e300)
        weights = scores.softmax(-1) * (1 - factors.isnan().all(-1, keepdim=True).double())
        expected = (weights * factors.nan_to_num(0.0) @ v).transpose(1, 2)
        given = moved(leaves, torch.float32)
        if kind == "two sources":
            parts = [given[0], *(x[:, :33] for x in given[1:]), *(x[:, 33:] for x in given[1:])]
            out = on_triton(parts, mask=mask, dropout_p=0.4, seed=9)
        else:
            out = on_triton(given, mask=mask, dropout_p=0.4, seed=9)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-5)
        grad = torch.randn(out.shape)
        found = torch.autograd.grad(out, given, grad.to(DEVICE))
        for mine, theirs in zip(found, gradients(expected, leaves, grad.double()), strict=True):
            torch.testing.assert_close(mine.cpu().double(), theirs, rtol=1e-4, atol=1e-5)

    def test_everything_dropped(self) -> None:
        leaves = moved(qkv(1, 3, 5), torch.float32)
        out = on_triton(leaves, dropout_p=1.0, seed=1)
        assert (out == 0).all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))

"""attention: the parts that do not concern media, against torch's SDPA with dense masks in fp64."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.attention import Mask, MediaRanges, attention, op, plan
from tests.kernels.attention_dense import Recorder, dense_attention, gradients, plain_path

TIGHT = {"rtol": 0.0, "atol": 1e-11}


def strided(shape: tuple[int, ...], layout: str) -> Tensor:
    """Random fp64 [B, L, H, D] in one of the layouts that models produce."""
    batch, length, heads, size = shape
    if layout == "heads first":
        return torch.randn(batch, heads, length, size, dtype=torch.double).transpose(1, 2)
    if layout == "packed":  # a slice of one projection's output that also holds other things
        return torch.randn(batch, length, 3, heads, size, dtype=torch.double)[:, :, 1]
    if layout == "offset":
        return torch.randn(batch + 1, length + 2, heads, size + 1, dtype=torch.double)[1:, 1:-1, :, 1:]
    if layout == "dim first":  # the head dimension not contiguous
        return torch.randn(batch, length, size, heads, dtype=torch.double).transpose(2, 3)
    return torch.randn(shape, dtype=torch.double)


LAYOUTS = st.sampled_from(["contiguous", "heads first", "packed", "offset", "dim first"])


@st.composite
def calls(draw: st.DrawFn) -> tuple[int, list[Tensor], dict[str, Any]]:
    """(batch, leaves q, k, v [, extra_k, extra_v], further arguments) of one call. q may have one row for the batch."""
    key_rows, fold = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, key_heads = key_rows * fold, draw(st.integers(1, 2))
    heads, size = key_heads * draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 9]))
    queries, keys = draw(st.integers(0, 6)), draw(st.integers(0, 9))
    torch.manual_seed(draw(st.integers(0, 99)))
    leaves = [strided((draw(st.sampled_from([1, batch])), queries, heads, size), draw(LAYOUTS))]
    leaves += [strided((key_rows, keys, key_heads, size), draw(LAYOUTS)) for _ in "kv"]
    if draw(st.booleans()):
        extra = draw(st.sampled_from([1, key_rows, batch])), draw(st.integers(0, 3)), key_heads, size
        leaves += [strided(extra, draw(LAYOUTS)) for _ in "kv"]
    settings: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.3]))}
    if draw(st.booleans()):
        settings["kv_index"] = torch.randint(
            0, key_rows, (batch,), dtype=draw(st.sampled_from([torch.int32, torch.int64]))
        )
    parts: dict[str, Any] = {}
    if draw(st.booleans()):
        parts["key_lengths"] = torch.randint(0, keys + 2, (batch,))
    if draw(st.booleans()):
        parts["key_padding"] = torch.rand(batch, keys) < 0.6
    if draw(st.booleans()):
        parts.update(causal=True, prefix=draw(st.integers(0, keys)))
    if parts:
        settings["mask"] = Mask(**parts)
    return batch, [x.requires_grad_() for x in leaves], settings


@pytest.mark.parametrize("path", ["flash", "plain"])
@given(calls())
@settings(max_examples=150)
def test_matches_sdpa_under_a_dense_mask(path: str, call: tuple[int, list[Tensor], dict[str, Any]]) -> None:
    batch, leaves, settings = call
    q, k, v, *extra = leaves
    q = q.expand(batch, -1, -1, -1)
    if extra:
        settings = settings | {"extra_k": extra[0], "extra_v": extra[1]}
    grad = torch.randn(q.shape, dtype=torch.double)
    expected = dense_attention(q, k, v, **settings)
    with plain_path() if path == "plain" else contextlib.nullcontext():
        out = attention(q, k, v, **settings)
        ours = torch.autograd.grad(out, leaves, grad)
        with torch.no_grad():
            assert torch.equal(attention(q, k, v, **settings), out)
    torch.testing.assert_close(out, expected, **TIGHT)
    for mine, theirs in zip(ours, gradients(expected, leaves, grad), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


@pytest.mark.parametrize("path", ["flash", "plain"])
@pytest.mark.parametrize(
    "mask",
    [None, Mask(causal=True), Mask(causal=True, prefix=2), Mask(key_lengths=torch.tensor([3, 0]))],
    ids=["all", "causal", "prefix", "lengths"],
)
def test_gradcheck(mask: Mask | None, path: str) -> None:
    q = torch.randn(2, 3, 4, 3, dtype=torch.double, requires_grad=True)
    k, v = (torch.randn(2, 4, 2, 3, dtype=torch.double, requires_grad=True) for _ in "kv")
    extra_k, extra_v = (torch.randn(1, 2, 2, 3, dtype=torch.double, requires_grad=True) for _ in "kv")

    def call(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor, extra_v: Tensor) -> Tensor:
        return attention(q, k, v, extra_k=extra_k, extra_v=extra_v, mask=mask)

    with plain_path() if path == "plain" else contextlib.nullcontext():
        assert torch.autograd.gradcheck(call, (q, k, v, extra_k, extra_v))
        alone = Mask(key_lengths=torch.tensor([3, 0])) if mask is None else mask
        assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask=alone), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["all", "causal", "lengths", "two sources", "gqa beams"])
def test_half_precision_is_at_most_twice_as_wrong_as_sdpa(dtype: torch.dtype, kind: str) -> None:
    batch, key_rows, key_heads = (6, 2, 2) if kind == "gqa beams" else (2, 2, 4)
    q = torch.randn(batch, 24, 4, 40).to(dtype).requires_grad_()
    k, v = (torch.randn(key_rows, 40, key_heads, 40).to(dtype).requires_grad_() for _ in "kv")
    leaves, settings = [q, k, v], {}
    if kind == "causal":
        settings["mask"] = Mask(causal=True)
    if kind == "lengths":
        settings["mask"] = Mask(key_lengths=torch.tensor([40, 11]))
    if kind == "two sources":
        leaves += [torch.randn(1, 9, key_heads, 40).to(dtype).requires_grad_() for _ in "kv"]

    def run(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        more = dict(zip(("extra_k", "extra_v"), leaves[3:], strict=False))
        out = function(*leaves[:3], **more, **settings)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    grad = torch.randn(q.shape).to(dtype)
    exact = run(dense_attention, [x.detach().float().requires_grad_() for x in leaves])
    theirs, ours = run(dense_attention, leaves), run(attention, leaves)
    for e, t, o in zip(exact, theirs, ours, strict=True):
        assert o.dtype == dtype
        assert (o - e).abs().max() <= 2 * (t - e).abs().max()
        assert (o - e).norm() <= 2 * (t - e).norm()


@pytest.mark.parametrize("size", [8, 72, 80, 88, 96, 128, 256])
def test_head_dims(size: int) -> None:
    leaves = [torch.randn(2, length, 2, size, requires_grad=True) for length in (3, 7, 7)]
    out, expected = attention(*leaves), dense_attention(*leaves)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(gradients(out, leaves, grad), gradients(expected, leaves, grad), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("step", [1, 2])
def test_causal_decode_steps_are_rows_of_the_whole(prefix: int, step: int) -> None:
    q, k, v = (torch.randn(2, 8, 2, 8, dtype=torch.double) for _ in "qkv")
    mask = Mask(causal=True, prefix=prefix)
    whole = attention(q, k, v, mask=mask)
    for end in range(max(step, prefix), 9, step):
        part = attention(q[:, end - step : end], k[:, :end], v[:, :end], mask=mask)
        torch.testing.assert_close(part, whole[:, end - step : end], **TIGHT)


def test_rows_that_see_nothing_give_zero_and_no_gradient() -> None:
    q, k, v = (torch.randn(3, 5, 2, 8, requires_grad=True) for _ in "qkv")
    # Row 1 sees nothing; with more queries than keys, neither do the first causal rows.
    out = attention(q, k, v, mask=Mask(key_lengths=torch.tensor([5, 0, 2])))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    for x in (out, dq, dk, dv):
        assert (x[1] == 0).all()
        assert x.isfinite().all()
    assert (dk[2, 2:] == 0).all()
    out = attention(q, k[:, :2], v[:, :2], mask=Mask(causal=True))
    (dq,) = torch.autograd.grad(out, q, torch.randn_like(out))
    assert (out[:, :3] == 0).all()
    assert (dq[:, :3] == 0).all()
    assert (out[:, 3:] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["flash", "plain"])
def test_what_nobody_sees_is_not_read(dtype: torch.dtype, path: str) -> None:
    padding = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    grad = torch.randn(3, 4, 2, 8).to(dtype)
    for mask in (
        Mask(key_padding=padding),
        Mask(key_padding=padding, causal=True),
        Mask(key_lengths=torch.tensor([6, 3, 1])),
    ):
        seen = torch.ones(3, 6, dtype=torch.bool)
        if mask.key_padding is not None:
            seen &= padding
        if mask.key_lengths is not None:
            seen &= torch.arange(6) < mask.key_lengths[:, None]
        clean = [torch.randn(3, length, 2, 8).to(dtype).requires_grad_() for length in (4, 6, 6)]
        dirty = [clean[0].detach().clone().requires_grad_()]
        dirty += [x.detach().masked_fill(~seen[..., None, None], torch.nan).requires_grad_() for x in clean[1:]]
        with plain_path() if path == "plain" else contextlib.nullcontext():
            first, second = attention(*clean, mask=mask), attention(*dirty, mask=mask)
            assert torch.equal(first, second)
            grads = torch.autograd.grad(first, clean, grad), torch.autograd.grad(second, dirty, grad)
        for mine, theirs in zip(*grads, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.isfinite().all()


def test_empty_lengths() -> None:
    for batch, queries, keys in ((2, 0, 3), (2, 3, 0), (0, 3, 3), (2, 0, 0)):
        q = torch.randn(batch, queries, 2, 8, requires_grad=True)
        k, v = (torch.randn(batch, keys, 2, 8, requires_grad=True) for _ in "kv")
        out = attention(q, k, v)
        assert out.shape == q.shape
        assert (out == 0).all()
        for x in torch.autograd.grad(out.sum(), (q, k, v)):
            assert (x == 0).all()


def test_backward_runs_twice_and_writes_into_nothing() -> None:
    leaves = [torch.randn(2, length, 2, 8, requires_grad=True) for length in (3, 6, 6, 2, 2)]
    before = [x.detach().clone() for x in leaves]
    q, k, v, extra_k, extra_v = leaves
    out = attention(q, k, v, extra_k=extra_k, extra_v=extra_v, mask=Mask(causal=True))
    kept = out.detach().clone()
    grad = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, leaves, before))
    assert all(x._version == 0 for x in leaves)
    assert torch.equal(out, kept)


def test_second_derivatives_are_refused() -> None:
    q, k, v = (torch.randn(1, 2, 1, 4, requires_grad=True) for _ in "qkv")
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_saves_only_inputs_output_and_statistics() -> None:
    saved: list[tuple[int, ...]] = []
    q, k, v = (torch.randn(2, length, 2, 8, requires_grad=True) for length in (4, 6, 6))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        attention(q, k, v, mask=Mask(causal=True), dropout_p=0.1, seed=1)
    assert saved == [(2, 4, 2, 8), (2, 6, 2, 8), (2, 6, 2, 8), (2, 4, 2, 8), (2, 4, 2)]


def test_beams_read_one_copy_of_the_keys_in_one_call() -> None:
    q, k, v = torch.randn(6, 1, 4, 8), torch.randn(2, 50, 2, 8), torch.randn(2, 50, 2, 8)
    with torch.no_grad(), Recorder() as recorder:
        out = attention(q, k, v)
    assert recorder.flash_calls == 1
    assert recorder.largest < k.numel()
    torch.testing.assert_close(out, dense_attention(q, k, v))


def test_a_shared_second_source_is_not_repeated() -> None:
    q, k, v = torch.randn(4, 3, 2, 8), torch.randn(4, 5, 2, 8), torch.randn(4, 5, 2, 8)
    extra_k, extra_v = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    with torch.no_grad(), Recorder() as recorder:
        out = attention(q, k, v, extra_k=extra_k, extra_v=extra_v)
    assert recorder.flash_calls == 2
    assert recorder.largest < extra_k.numel()
    torch.testing.assert_close(out, dense_attention(q, k, v, extra_k=extra_k, extra_v=extra_v))


class TestAutocast:
    def test_casts_like_sdpa(self) -> None:
        q, k, v = torch.randn(2, 3, 2, 8, requires_grad=True), torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(q, k.bfloat16(), v, dropout_p=0.0)
            theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
            assert attention(q.double(), k.double(), v.double()).dtype == torch.float64
        assert out.dtype == theirs.dtype == torch.bfloat16
        out.sum().backward()
        assert q.grad is not None
        assert q.grad.dtype == torch.float32

    def test_the_plain_path_stays_wide_inside(self) -> None:
        q, k, v = (torch.randn(2, 5, 2, 8).bfloat16().requires_grad_() for _ in "qkv")
        grad = torch.randn(q.shape).bfloat16()
        with plain_path():
            plain = attention(q, k, v)
            expected = torch.autograd.grad(plain, (q, k, v), grad)
            with torch.autocast("cpu", torch.bfloat16):
                out = attention(q, k, v)
                found = torch.autograd.grad(out, (q, k, v), grad)
        assert torch.equal(out, plain)
        assert all(map(torch.equal, found, expected))


class TestPlans:
    def test_one_plan_for_all_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        built = []
        build = plan.build_plan
        monkeypatch.setattr(plan, "build_plan", lambda *args: built.append(args) or build(*args))
        q, k, v = (torch.randn(2, 4, 2, 8) for _ in "qkv")
        mask, index = Mask(key_lengths=torch.tensor([3, 4])), torch.tensor([1, 0])
        for _ in range(3):
            attention(q, k, v, mask=mask)
        assert len(built) == 1
        for _ in range(3):
            attention(q, k, v, mask=mask, kv_index=index)
        assert len(built) == 2
        media = MediaRanges(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64), 2, 2)
        for _ in range(3):
            attention(q, k, v, mask=Mask(media=media))
        assert len(built) == 3

    def test_changes_in_place_are_noticed(self) -> None:
        q, k, v = (torch.randn(2, 4, 2, 8) for _ in "qkv")
        mask, index = Mask(key_lengths=torch.tensor([3, 4])), torch.tensor([1, 0])
        attention(q, k, v, mask=mask, kv_index=index)
        assert mask.key_lengths is not None
        mask.key_lengths[0] = 1
        index.fill_(1)
        expected = dense_attention(q, k, v, mask=mask, kv_index=index)
        torch.testing.assert_close(attention(q, k, v, mask=mask, kv_index=index), expected)

    def test_a_mask_from_inference_mode_can_train(self) -> None:
        with torch.inference_mode():
            mask = Mask(key_padding=torch.tensor([[True, False, True, True]]))
            attention(torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8), mask=mask)
        q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in "qkv")
        attention(q, k, v, mask=mask).sum().backward()
        assert k.grad is not None
        assert (k.grad[:, 1] == 0).all()

    def test_the_number_of_plans_is_bounded(self) -> None:
        mask = Mask(key_lengths=torch.tensor([1]))
        for keys in range(1, 3 * plan.MAX_PLANS):
            attention(torch.randn(1, 1, 1, 8), torch.randn(1, keys, 1, 8), torch.randn(1, keys, 1, 8), mask=mask)
        assert len(mask._plans) <= plan.MAX_PLANS


def test_backends() -> None:
    q = torch.randn(1, 2, 1, 8)
    with runtime.backend("torch"):
        attention(q, q, q)
    assert any(declared.name == "attention" for declared in runtime.ops())


def test_the_public_function_is_the_one_exported() -> None:
    assert attention is op.attention

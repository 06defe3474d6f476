"""Which attention calls go to torch's SDPA or xformers, by made-up records, and that they compute the same there."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fast import cli, fuse
from mllm_fast.kernels import runtime
from mllm_fast.kernels.attention import Mask, MediaRanges, attention, dispatch, libraries, reference, triton_op
from mllm_fast.kernels.attention.dispatch import Record, ShapeClass, class_of
from tests.kernels.attention_dense import dense_attention, gradients

CALL = ShapeClass(
    *class_of(
        training=True, padded=False, itemsize=4, batch=2, queries=5, keys=7, extra_keys=0, heads=4, key_heads=4, head_dim=8
    )
)  # fmt: skip


def record(ratios: dict[str, float], architecture: str = "sm_90", **changes: Any) -> Record:
    return Record(architecture, dataclasses.replace(CALL, **changes), ratios, ("a.workload",), "a/file.json")


def on_a_gpu(name: str, device_type: str) -> str:
    return runtime.explain(name, "cuda")[0]


on_a_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Call it with records: they are then the installation's, calls on the CPU count as such on a sm_90 GPU."""
    found: list[Record] = []

    def add(*records: Record) -> None:
        found.extend(records)
        dispatch._table.cache_clear()

    monkeypatch.setattr(dispatch, "records", lambda: tuple(found))
    monkeypatch.setattr(dispatch, "architecture_of", lambda index: "sm_90")
    monkeypatch.setattr(runtime, "triton_unavailable_reason", lambda: None)
    monkeypatch.setattr(runtime, "chosen", on_a_gpu)
    dispatch._table.cache_clear()
    yield add
    dispatch._table.cache_clear()


def tensors(
    batch: int = 2, queries: int = 5, keys: int = 7, heads: int = 4, key_heads: int = 4, head_dim: int = 8,
    key_rows: int | None = None, dtype: torch.dtype = torch.float32, grad: bool = True,
) -> list[Tensor]:  # fmt: skip
    shapes = [(batch, queries, heads, head_dim)] + 2 * [(key_rows or batch, keys, key_heads, head_dim)]
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def library(leaves: list[Tensor], mask: Mask | None = None, **more: Any) -> str | None:
    q, k, v, *extra = leaves
    extra_k, extra_v = extra or (None, None)
    return dispatch.library_for((q, k, v, extra_k, extra_v), mask, more.get("kv_index"), more.get("dropout_p", 0.0))


class TestChoice:
    def test_the_faster_one_runs(self, measured: Callable[..., None]) -> None:
        measured(record({"sdpa": 0.8}), record({"sdpa": 1.3}, training=False), record({"sdpa": 0.99}, head_dim=128))
        assert library(tensors()) == "sdpa"
        with torch.no_grad():
            assert library(tensors()) is None
        assert library(tensors(grad=False)) is None
        assert library(tensors(head_dim=72)) is None  # nearly as fast is not faster

    def test_nothing_recorded(self, measured: Callable[..., None]) -> None:
        assert library(tensors()) is None
        measured(record({}))
        assert library(tensors()) is None

    def test_of_its_own_architecture_only(self, measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        measured(record({"sdpa": 0.5}, "sm_80"), record({"sdpa": 0.5}, "sm_89"))
        assert library(tensors()) is None
        monkeypatch.setattr(dispatch, "architecture_of", lambda index: "sm_89")
        assert library(tensors()) == "sdpa"

    @pytest.mark.parametrize(
        "sizes",
        [{"queries": 17}, {"keys": 513}, {"head_dim": 72}, {"batch": 9}, {"key_heads": 2}, {"dtype": torch.float16}],
        ids=str,
    )
    def test_of_its_own_class_only(self, measured: Callable[..., None], sizes: dict[str, Any]) -> None:
        measured(record({"sdpa": 0.5}))
        assert library(tensors()) == "sdpa"
        assert library(tensors(queries=16, keys=512, batch=8, head_dim=64)) == "sdpa"
        assert library(tensors(**sizes)) is None

    def test_what_only_our_kernels_do(self, measured: Callable[..., None]) -> None:
        measured(*(record({"sdpa": 0.5}, padded=padded, sources=n) for padded in (False, True) for n in (1, 2)))
        leaves = tensors()
        assert library(leaves, Mask()) == "sdpa"
        assert library(leaves, Mask(key_lengths=torch.tensor([1, 2]))) == "sdpa"
        assert library(leaves, Mask(causal=True)) is None
        rows = torch.zeros(2, 5, dtype=torch.int64)
        assert library(leaves, Mask(media=MediaRanges(rows, rows + 1, 7, 1))) is None
        assert library(leaves, dropout_p=0.1) is None
        assert library(leaves, kv_index=torch.tensor([0, 1])) is None
        assert library(tensors(head_dim=12)) is None
        assert library(tensors(keys=0)) is None
        # Beams share keys, and so cannot differ in what they see.
        beams = tensors(key_rows=1)
        assert library(beams) == "sdpa"
        assert library(beams, Mask(key_lengths=torch.tensor([1, 2]))) is None
        assert library([*beams, *tensors(key_rows=1)[1:]]) == "sdpa"
        assert library([*beams, *tensors()[1:]]) is None

    def test_gradients_stay_repeatable_where_that_is_asked_for(self, measured: Callable[..., None]) -> None:
        measured(record({"sdpa": 0.5}), record({"sdpa": 0.5}, training=False))
        torch.use_deterministic_algorithms(True)
        try:
            assert library(tensors()) is None
            assert library(tensors(grad=False)) == "sdpa"
        finally:
            torch.use_deterministic_algorithms(False)

    def test_xformers_only_where_it_is_and_can(
        self, measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        both = {"sdpa": 0.9, "xformers": 0.6}
        measured(record(both), record(both, bits=16), record(both, bits=16, padded=True))
        half = tensors(dtype=torch.float16)
        for installed, expected in ((False, "sdpa"), (True, "xformers")):
            monkeypatch.setattr(dispatch, "has_xformers", lambda found=installed: found)
            assert library(half) == expected
            assert library(half, Mask(key_lengths=torch.tensor([1, 2]))) == "sdpa"
            assert library(tensors()) == "sdpa"

    def test_backend_overrides_it(self, measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        measured(record({"sdpa": 0.5}))
        called: list[str] = []
        for module, name in ((triton_op, "run"), (reference.Attention, "apply")):
            monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
        monkeypatch.setitem(libraries.LIBRARIES, "sdpa", lambda *_: called.append("sdpa"))
        for name in ("auto", "triton", "torch"):
            with runtime.backend(name):
                attention(*tensors())
        assert called == ["sdpa", "run", "apply"]


def xformers_stub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """An xformers whose attention is SDPA; gives the shapes of k that it was called with."""
    shapes = []

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        shapes.append(tuple(k.shape))
        assert 0 not in q.stride()
        q, k, v = (x.flatten(2, -2).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        return out.unflatten(2, shapes[-1][2:-1]) if len(shapes[-1]) == 5 else out

    fmha = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.fmha = fmha  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return shapes


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"key_heads": 2},
    "beams": {"batch": 6, "key_rows": 2},
    "beams of one image": {"batch": 3, "key_rows": 1, "key_heads": 1},
    "lengths": {"lengths": [7, 2]},
    "padding": {"padding": True},
    "blind row": {"lengths": [0, 9], "padding": True},
    "two sources": {"extra": 2},
    "shared second source": {"extra": 1, "lengths": [0, 3]},
    "shared queries": {"shared": True},
}


class TestCallers:
    # xformers is given no masked call.
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            (n, kind)
            for n in libraries.LIBRARIES
            for kind in CALLS
            if n == "sdpa" or not {"lengths", "padding"} & {*CALLS[kind]}
        ],
    )
    def test_equals_the_definition(self, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = dict(CALLS[kind])
        extra, lengths, padding, shared = (sizes.pop(x, None) for x in ("extra", "lengths", "padding", "shared"))
        xformers_stub(monkeypatch)
        leaves = [x.detach().double().requires_grad_() for x in tensors(**sizes)]
        q, k, v = leaves
        if shared:
            leaves[0] = q = q.detach()[:1].requires_grad_()
            q = q.expand(2, -1, -1, -1)
        more: list[Any] = [None, None]
        if extra:
            more = [torch.randn(extra, 3, *k.shape[2:], dtype=torch.double, requires_grad=True) for _ in "kv"]
            leaves += more
        mask = Mask(
            key_lengths=torch.tensor(lengths) if lengths else None,
            key_padding=torch.rand(2, 7) < 0.6 if padding else None,
        )
        out = libraries.LIBRARIES[name](q, k, v, *more, mask, 0.3)
        expected = dense_attention(q, k, v, extra_k=more[0], extra_v=more[1], mask=mask, scale=0.3)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        grad = torch.randn_like(out)
        for mine, theirs in zip(gradients(out, leaves, grad), gradients(expected, leaves, grad), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)

    def test_hidden_keys_and_blind_queries_are_not_read(self) -> None:
        mask = Mask(key_lengths=torch.tensor([3, 0]))
        seen = torch.arange(7) < torch.tensor([[3], [0]])
        clean = tensors()
        dirty = [x.detach().clone().requires_grad_() for x in clean]
        with torch.no_grad():
            dirty[0][1] = torch.nan
            for x in dirty[1:]:
                x[~seen] = torch.nan
        outs = [libraries.sdpa(*leaves, None, None, mask, 0.3) for leaves in (clean, dirty)]
        assert torch.equal(*outs)
        assert (outs[0][1] == 0).all()
        grad = torch.randn_like(outs[0])
        found = [torch.autograd.grad(o, x, grad) for o, x in zip(outs, (clean, dirty), strict=True)]
        for mine, theirs in zip(*found, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.isfinite().all()
        assert all((x[1] == 0).all() for x in found[0])

    def test_grouped_heads_are_not_copied_for_xformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes = xformers_stub(monkeypatch)
        libraries.xformers(*tensors(key_heads=2), None, None, None, 0.3)
        assert shapes == [(2, 7, 2, 2, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", libraries.LIBRARIES)
@pytest.mark.parametrize("kind", CALLS)
def test_callers_on_a_gpu(name: str, kind: str) -> None:
    sizes = dict(CALLS[kind])
    extra, lengths, padding, shared = (sizes.pop(x, None) for x in ("extra", "lengths", "padding", "shared"))
    if name == "xformers":
        pytest.importorskip("xformers", reason="xformers is optional, and not installed here")
        if lengths or padding:
            pytest.skip("xformers is given no masked call")
    more = tensors(**sizes, queries=32, head_dim=64, keys=64, dtype=torch.bfloat16, grad=False)
    q, k, v = (x.cuda() for x in more)
    q = q[:1].expand(2, -1, -1, -1) if shared else q
    extras = [torch.randn(extra, 64, *k.shape[2:]).to(k) if extra else None for _ in "kv"]
    mask = Mask(
        key_lengths=torch.tensor(lengths).cuda() * 7 if lengths else None,
        key_padding=torch.rand(2, 64).cuda() < 0.6 if padding else None,
    )
    out = libraries.LIBRARIES[name](q, k, v, *extras, mask, 0.125)
    with runtime.backend("triton"):
        ours = attention(q, k, v, extra_k=extras[0], extra_v=extras[1], mask=mask, scale=0.125)
    torch.testing.assert_close(out, ours, rtol=2e-2, atol=2e-2)


def test_a_dispatched_call_trains_and_traces(measured: Callable[..., None]) -> None:
    measured(*(record({"sdpa": 0.5, "xformers": 0.1}, training=t) for t in (True, False)))
    leaves = tensors()
    out = attention(*leaves)
    expected = dense_attention(*leaves)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for mine, theirs in zip(gradients(out, leaves, grad), gradients(expected, leaves, grad), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda *x: attention(*x) + 1, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), out + 1)
    (graph,) = graphs
    assert "scaled_dot_product_attention" in graph
    assert "mllm_fast" not in graph


def test_autocast_reaches_the_library(measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    measured(record({"sdpa": 0.5}, bits=16))
    given = []
    monkeypatch.setitem(libraries.LIBRARIES, "sdpa", lambda q, *_: given.append(q.dtype) or q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(*tensors())
    assert given == [torch.bfloat16]


class TestFile:
    def test_what_is_shipped_can_be_read(self) -> None:
        for found in dispatch.records():
            assert found.architecture
            assert all(ratio > 0 for ratio in found.ratios.values())

    def test_round_trip_replaces_only_its_own_architecture(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "measured.json"
        monkeypatch.setattr(dispatch, "FILE", file)
        dispatch.records.cache_clear()
        try:
            assert dispatch.records() == ()
            old, other = record({"sdpa": 0.5}), record({"sdpa": 0.4}, "sm_80")
            new = record({"xformers": 0.6}, queries=0)
            dispatch.write([old, other], file)
            assert set(map(str, dispatch.records())) == set(map(str, (old, other)))
            dispatch.write([new], file)
            assert dispatch.records() == (other, new)
            file.write_text(json.dumps({"format": 99}))
            dispatch.records.cache_clear()
            with pytest.raises(ValueError, match="write it anew"):
                dispatch.records()
        finally:
            monkeypatch.undo()
            dispatch.records.cache_clear()
            dispatch._table.cache_clear()


class TestShown:
    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = types.SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=2**30, gcnArchName="")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=None: properties)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def details(self) -> list[tuple[str, str, str]]:
        (found,) = [status.details for status in cli.collect_info().ops if status.name == "attention"]
        return [tuple(detail) for detail in found]  # type: ignore[misc]

    def test_info_of_a_gpu_that_was_not_measured(self, measured: Callable[..., None]) -> None:
        measured(record({"sdpa": 0.5}, "sm_80"))
        calls, *others = self.details()
        assert calls == ("all calls", "triton", "not measured on this GPU (sm_90)")
        assert others == [("fp64; head_dim > 256, or > 128 in fp32", "torch", "the Triton kernels do not serve them")]

    def test_info_of_a_measured_gpu(
        self, measured: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured(record({"sdpa": 0.8, "xformers": 0.7}), record({"sdpa": 1.5}, training=False, queries=0))
        monkeypatch.setattr(dispatch, "has_xformers", lambda: False)
        first, second, rest, _ = self.details()
        assert first[1] == "sdpa"
        assert "xformers takes 0.70x our time (a.workload; a/file.json); xformers is not installed" in first[2]
        assert second[1] == "triton"
        assert "inference, queries > 128" in second[0]
        assert rest == ("all other calls", "triton", "such calls were not measured")
        monkeypatch.setenv("COLUMNS", "300")
        assert cli.main(["info"]) == 0
        out = capsys.readouterr().out
        assert "attention on the GPU" in out
        assert "sdpa takes 0.80x our time" in out

    @pytest.mark.parametrize("known", [False, True])
    def test_fuse_report(self, measured: Callable[..., None], known: bool) -> None:
        from mllm_fast import fusion

        if known:
            measured(record({"sdpa": 0.5}))
        said = "triton; sdpa for some shapes" if known else "triton; not measured on sm_90"
        assert fusion._runs("attention", torch.device("cuda", 0), torch.bfloat16) == said
        assert fusion._runs("attention", torch.device("cuda", 0), torch.float64) == "torch, for fp64"
        assert fusion._runs("attention", torch.device("cpu"), torch.bfloat16) == "torch"
        assert fuse is fusion.fuse

"""Which implementation runs: names, devices, threads, reasons."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator

import pytest
import torch

import mllm_fast
from mllm_fast.kernels import runtime


@pytest.fixture(autouse=True)
def two_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of two ops, one with Triton kernels, on a machine without a GPU and without the interpreter."""
    monkeypatch.setattr(runtime, "_ops", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    runtime.register_op("fused", "has kernels", has_triton=True)
    runtime.register_op("plain", "has none")
    yield
    assert runtime.current_backend() == "auto", "a test left a backend in force"


def _has_triton(monkeypatch: pytest.MonkeyPatch, *, gpu: bool, interpreter: bool = False) -> None:
    """Make it look as if triton is installed, with or without a GPU and the interpreter."""
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreter else "0")


def test_ops_are_listed_by_name() -> None:
    assert [op.name for op in runtime.ops()] == ["fused", "plain"]
    assert [op.has_triton for op in runtime.ops()] == [True, False]


def test_an_op_may_say_more_of_an_architecture() -> None:
    assert runtime.op("fused").details("sm_90") == ()
    assert runtime.op("fused").note("sm_90") == ""
    detail = runtime.Detail("all calls", "triton", "why not")
    runtime.register_op("fused", "has kernels", has_triton=True, details=lambda a: [detail], note=lambda a: f"on {a}")
    assert runtime.op("fused").details("sm_90") == [detail]
    assert runtime.op("fused").note("sm_80") == "on sm_80"


def test_choose_for_asks_only_where_triton_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _has_triton(monkeypatch, gpu=True)
    assert runtime.choose_for("fused", "cpu", lambda: pytest.fail("asked")) == "torch"
    assert runtime.choose_for("fused", "cuda", lambda: None) == "triton"
    assert runtime.choose_for("fused", "cuda", lambda: "too wide") == "torch"
    with runtime.backend("triton"), pytest.raises(runtime.BackendUnavailableError, match="too wide; call it under"):
        runtime.choose_for("fused", "cuda", lambda: "too wide")


@pytest.mark.parametrize("name", ["cuda", "", "Triton", "pytorch"])
def test_unknown_backend_names_the_known_ones(name: str) -> None:
    with pytest.raises(runtime.UnknownBackendError, match=r"'auto', 'triton', 'torch'"), runtime.backend(name):
        pytest.fail("the block ran")
    with pytest.raises(ValueError, match="unknown backend"), mllm_fast.backend(name):
        pytest.fail("the block ran")


def test_backend_nests_and_is_restored_after_an_error() -> None:
    with runtime.backend("torch"):
        with runtime.backend("auto"):
            assert runtime.current_backend() == "auto"
        assert runtime.current_backend() == "torch"
        with pytest.raises(ZeroDivisionError), runtime.backend("auto"):
            _ = 1 / 0
        assert runtime.current_backend() == "torch"


def test_triton_without_gpu_is_refused_on_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    _has_triton(monkeypatch, gpu=False)
    says = r"no GPU.*TRITON_INTERPRET=1.*backend\('torch'\)"
    with pytest.raises(runtime.BackendUnavailableError, match=says), runtime.backend("triton"):
        pytest.fail("the block ran")
    assert runtime.current_backend() == "auto"


def test_triton_that_is_not_installed_is_refused_on_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    _has_triton(monkeypatch, gpu=True)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(runtime.BackendUnavailableError, match="not installed"), runtime.backend("triton"):
        pytest.fail("the block ran")


def test_triton_for_an_op_without_kernels_is_refused_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _has_triton(monkeypatch, gpu=True)
    with runtime.backend("triton"), pytest.raises(runtime.BackendUnavailableError, match="plain has no Triton kernel"):
        runtime.choose("plain", torch.ones(1))


def test_triton_for_cpu_tensors_is_refused_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _has_triton(monkeypatch, gpu=True)
    with runtime.backend("triton"):
        assert runtime.explain("fused", "cuda") == ("triton", "forced by backend('triton')")
        with pytest.raises(runtime.BackendUnavailableError, match="fused cannot run: the tensors are on cpu"):
            runtime.choose("fused", torch.ones(1))


def test_interpreter_runs_kernels_on_cpu_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not runtime.interpreting()
    _has_triton(monkeypatch, gpu=False, interpreter=True)
    assert runtime.interpreting()
    assert runtime.triton_unavailable_reason() is None
    assert runtime.explain("fused", "cpu")[0] == "torch"
    assert "interpreter" in runtime.explain("fused", "cpu")[1]
    with runtime.backend("triton"):
        assert runtime.choose("fused", torch.ones(1)) == "triton"


@pytest.mark.parametrize(
    ("gpu", "forced", "op", "device", "implementation", "reason"),
    [
        (True, "auto", "fused", "cuda", "triton", "tensors on cuda"),
        (True, "auto", "plain", "cuda", "torch", "no Triton kernel for this op"),
        (True, "auto", "fused", "cpu", "torch", "the tensors are on cpu"),
        (True, "torch", "fused", "cuda", "torch", r"forced by backend\('torch'\)"),
        (False, "auto", "fused", "cpu", "torch", "no GPU was found"),
        (False, "torch", "plain", "cpu", "torch", r"forced by backend\('torch'\)"),
    ],
)
def test_explain(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, forced: str, op: str, device: str, implementation: str, reason: str
) -> None:
    _has_triton(monkeypatch, gpu=gpu)
    with runtime.backend(forced):
        chosen, why = runtime.explain(op, device)
    assert chosen == implementation
    assert re.search(reason, why)


def test_choose_looks_at_the_first_tensor_that_is_one() -> None:
    assert runtime.choose("fused", None, torch.ones(1)) == "torch"
    assert runtime.choose("fused") == "torch"


def test_backend_holds_in_its_own_thread_only() -> None:
    seen: dict[str, str] = {}
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with runtime.backend("torch"):
            seen["other"] = runtime.current_backend()
            inside.set()
            leave.wait(timeout=10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(timeout=10)
    seen["main"] = runtime.current_backend()
    leave.set()
    thread.join(timeout=10)
    assert seen == {"other": "torch", "main": "auto"}


def test_backend_holds_in_its_own_async_task_only() -> None:
    async def forced(other_entered: asyncio.Event, entered: asyncio.Event) -> str:
        with runtime.backend("torch"):
            entered.set()
            await other_entered.wait()
            return runtime.current_backend()

    async def free(other_entered: asyncio.Event, entered: asyncio.Event) -> str:
        await other_entered.wait()
        entered.set()
        return runtime.current_backend()

    async def both() -> list[str]:
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(forced(first, second), free(second, first))

    assert asyncio.run(both()) == ["torch", "auto"]


@pytest.mark.gpu
def test_choose_on_a_gpu() -> None:
    tensor = torch.ones(1, device="cuda")
    assert runtime.choose("fused", tensor) == "triton"
    assert runtime.choose("plain", tensor) == "torch"
    with runtime.backend("torch"):
        assert runtime.choose("fused", tensor) == "torch"

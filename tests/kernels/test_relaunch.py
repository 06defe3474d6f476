"""Calls that launch again what an equal call launched before: the same launches as Triton's own way, on a stand-in for a GPU.

Triton binds arguments, specialises and looks up its cache as on a GPU; only what it would compile and run is a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_fast import ops
from mllm_fast.kernels import relaunch, runtime
from mllm_fast.kernels.attention import dispatch
from mllm_fast.kernels.launch import ARCHITECTURES, _NoDevice
from mllm_fast.kernels.linear import configs
from mllm_fast.kernels.quantized_linear import op as quantized_op
from tests.kernels.relaunch_calls import CALLS, CHANGES, K, Maker, N
from tests.kernels.triton_device import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing that could be launched again")
pytest.importorskip("triton")


@dataclass
class Gpu:
    """What was launched: kernels, grids and arguments; and how often Triton itself launched."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)
    bound: int = 0
    relaunching: bool = True

    def seen(self, call: Callable[[], Any], *, relaunching: bool = True) -> tuple[Any, list[tuple[Any, ...]]]:
        """(result, launches), with a number in place of each address, in the order in which they come."""
        self.launches, self.relaunching = [], relaunching
        with torch.no_grad():
            out = call()
        numbers: dict[int, int] = {}
        shown = []
        for kernel, grid, arguments in self.launches:
            given = [
                numbers.setdefault(address, len(numbers)) if (address := _address(a)) is not None else (type(a), a)
                for a in arguments
            ]
            shown.append((kernel, grid, *given))
        return out, shown


def _address(argument: Any) -> int | None:
    """Of a tensor, or a number that can be nothing else."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument if type(argument) is int and argument > 1 << 32 else None


class Kernel:
    """Stands in for a compiled kernel."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def launch_metadata(self, *_: Any) -> None:
        self.gpu.bound += 1  # asked by Triton's own way alone

    def run(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
        assert (stream, function, metadata) == (0, self.function, self.packed_metadata)
        self.gpu.launches.append((self, (x, y, z), rest[3:]))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    import triton
    from triton.runtime.jit import JITFunction

    found = Gpu()

    def compiled(self: Any, key: Any, signature: Any, device: Any, *_: Any) -> Kernel:
        kernel = self.device_caches[device][0][key] = Kernel(found)
        return kernel

    class Device(_NoDevice):
        def get_current_device(self) -> Any:
            return id(found)  # the key of Triton's caches: each test has its own

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(runtime, "chosen", lambda *_: "triton")
    monkeypatch.setattr(quantized_op, "_chosen", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "architecture_of", lambda *_: "sm_90")
    monkeypatch.setattr(relaunch, "serves", lambda first: found.relaunching)
    monkeypatch.setattr(relaunch, "_calls", {})
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(Device(ARCHITECTURES["sm_90"]))
    yield found
    driver._active = before


@pytest.mark.parametrize("name", CALLS)
def test_the_third_call_launches_the_same_by_itself(gpu: Gpu, name: str) -> None:
    call = lambda: CALLS[name](Maker())  # noqa: E731
    out, expected = gpu.seen(call, relaunching=False)
    for step in range(4):
        before = gpu.bound
        again, launches = gpu.seen(call)
        assert launches == expected
        assert (again.shape, again.dtype, again.stride()) == (out.shape, out.dtype, out.stride())
        assert (gpu.bound > before) == (step < 2)


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_differ_are_told_apart(gpu: Gpu, name: str) -> None:
    calls = {change: lambda given=given: CALLS[name](Maker(**given)) for change, given in CHANGES.items()}
    expected = {change: gpu.seen(call, relaunching=False)[1] for change, call in calls.items()}
    for _ in range(4):
        for change, call in calls.items():
            assert gpu.seen(call)[1] == expected[change], change


def test_constants_are_told_apart(gpu: Gpu) -> None:
    def call(eps: float, kind: str, activation: str | None) -> Tensor:
        make = Maker()
        norm = ops.Norm(kind, make(K), make(K) if kind == "layer_norm" else None, eps)  # type: ignore[arg-type]
        return ops.norm_linear(make.rows(K), make(N, K), norm=norm, activation=activation)

    kinds = [
        (eps, kind, activation)
        for eps in (1e-5, 1e-6)
        for kind in ("layer_norm", "rms_norm")
        for activation in (None, "relu", "gelu")
    ]
    expected = {given: gpu.seen(lambda given=given: call(*given), relaunching=False)[1] for given in kinds}
    for _ in range(4):
        for given in kinds:
            assert gpu.seen(lambda given=given: call(*given))[1] == expected[given]


def test_the_precision_of_fp32_is_told_apart(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for _ in range(3):
        for precision in ("highest", "high"):
            monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
            _, launches = gpu.seen(lambda: CALLS["linear"](Maker(dtype=torch.float32)))
            assert seen.setdefault(precision, launches) == launches
    assert seen["highest"] != seen["high"]


def test_each_result_is_new_and_what_is_given_is_what_is_read(gpu: Gpu) -> None:
    make = Maker()
    weight, outs = make(N, K), []
    for _ in range(4):
        x = make.rows(K)
        with torch.no_grad():
            outs.append(ops.norm_linear(x, weight))
        pointers = [a if isinstance(a, int) else a.data_ptr() for a in gpu.launches[-1][2] if _address(a) is not None]
        assert pointers == [x.data_ptr(), weight.data_ptr(), outs[-1].data_ptr()]
    assert len({out.data_ptr() for out in outs}) == 4


UNKEPT: dict[str, Callable[[Maker], Tensor]] = {
    "a copy": lambda make: ops.norm_linear(make(2, K, 1).transpose(1, 2).expand(2, 3, K)[..., ::2], make(N, K // 2)),
    "a random seed": lambda make: ops.layer_norm(make.rows(K), dropout_p=0.5),
    "one tensor twice": lambda make: (lambda x: ops.gated_residual(x, x, make(K)))(make.rows(K)),
    "nothing to launch": lambda make: ops.norm_linear(make(0, K), make(N, K)),
    "a weight that is no plain tensor": lambda make: ops.norm_linear(
        make.rows(K), make(N, K).as_subclass(type("Sharded", (Tensor,), {}))
    ),
}


@pytest.mark.parametrize("name", UNKEPT)
def test_what_does_more_than_launch_is_worked_out_anew(gpu: Gpu, name: str) -> None:
    check_unkept(gpu, lambda: UNKEPT[name](Maker()))


def check_unkept(gpu: Gpu, call: Callable[[], Tensor]) -> None:
    for _ in range(6):
        before = gpu.bound
        _, launches = gpu.seen(call)
        assert gpu.bound - before == len(launches)
    assert not any(isinstance(kept, relaunch._Call) for kept in relaunch._calls.values())


def test_what_a_vendor_computes_is_worked_out_anew(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "plan", lambda *_: "vendor")
    check_unkept(gpu, lambda: CALLS["norm and activation"](Maker()))


def test_seeds(gpu: Gpu) -> None:
    """One that is given is part of the call; one that is drawn is drawn every time."""
    x, given = Maker().rows(K), []
    for seed in (3, 4, None, None):
        for _ in range(3):
            gpu.seen(lambda seed=seed: ops.layer_norm(x, dropout_p=0.5, seed=seed))
            given.append(gpu.launches[0][2][-6])  # before RMS, DROPOUT, D, BD and BM
    assert given[:6] == [3] * 3 + [4] * 3
    assert len(set(given)) == 8


def test_with_gradients_under_the_reference_and_in_traces_nothing_is_kept(gpu: Gpu) -> None:
    x, weight = Maker().rows(K), Maker()(N, K).requires_grad_()
    for _ in range(4):
        ops.norm_linear(x, weight).sum()
    with torch.no_grad():
        for _ in range(4):
            torch.compile(lambda x: ops.rms_norm(x) + 1, backend="eager", fullgraph=True)(x)
    assert not relaunch._calls


def test_who_watches_launches_sees_them(gpu: Gpu) -> None:
    from triton import knobs

    hook = lambda metadata: None  # noqa: E731
    for watched in (False, True, False):
        if watched:
            knobs.runtime.launch_enter_hook.add(hook)
        try:
            for _ in range(4):
                before = gpu.bound
                _, launches = gpu.seen(lambda: CALLS["post-norm"](Maker()))
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert gpu.bound - before == (len(launches) if watched else 0)


def test_a_part_of_a_call_is_no_call_of_its_own(gpu: Gpu) -> None:
    """A post-norm is a layer norm, which is kept by itself too: both launches are the outer call's."""
    for _ in range(3):
        gpu.seen(lambda: ops.layer_norm(Maker()(2, 1, N), Maker()(N), Maker()(N), residual=Maker()(2, 1, N)))
    for _ in range(4):
        _, launches = gpu.seen(lambda: CALLS["post-norm"](Maker()))
        assert len(launches) == 2


def test_there_is_an_end_to_what_is_kept(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaunch, "MAX_CALLS", 5)
    for rows in range(1, 20):
        for _ in range(3):
            gpu.seen(lambda rows=rows: ops.rms_norm(Maker()(rows, K)))
            assert len(relaunch._calls) <= 5


def test_only_calls_of_the_current_gpu_are_served() -> None:
    assert not relaunch.serves(torch.empty(2)) and not relaunch.serves([torch.empty(2)])

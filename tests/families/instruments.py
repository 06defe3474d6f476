"""How the drop-in tests compare two modules and count what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mllm_fast

Results = dict[str, Tensor]


def fused(model: nn.Module, **options: Any) -> Any:
    """A fused copy."""
    twin = copy.deepcopy(model)
    mllm_fast.fuse(twin, **options)
    return twin


def backward_results(output: Tensor, inputs: dict[str, Tensor], module: nn.Module) -> Results:
    """The output, and the gradients of a fixed random functional of it for the inputs and parameters that got one.

    A parameter without a gradient where upstream has one (DistributedDataParallel would hang) shows as a missing key.
    """
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    output.backward(cotangent.to(output.dtype))
    results = {"output": output.detach()}
    results |= {f"d {name}": t.grad for name, t in inputs.items() if t.grad is not None}
    results |= {f"d {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return results


def run_module(module: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, **kwargs: Any) -> Results:
    """Forward and backward of the module, moved to `dtype`, on fresh leaves of `inputs` (passed by position)."""
    module = module.to(dtype)
    module.zero_grad(set_to_none=True)
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    return backward_results(module(*leaves.values(), **kwargs), leaves, module)


def assert_same(ours: Results, theirs: Results, tolerance: float = 1e-10) -> None:
    """Every result equal up to `tolerance` of its largest entry (fp64: rounding order only).

    The gradient of a scalar is one sum over all outputs, much smaller than its terms: it may be off by more.
    """
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, reference in theirs.items():
        mine = ours[name]
        assert mine.shape == reference.shape, f"{name}: {tuple(mine.shape)} != {tuple(reference.shape)}"
        assert mine.dtype == reference.dtype, f"{name}: {mine.dtype} != {reference.dtype}"
        assert mine.isfinite().all(), f"{name} is not finite"
        error = (mine.double() - reference.double()).abs().max().item() if mine.numel() else 0.0
        scale = max(reference.abs().max().item(), 1.0) if mine.numel() else 1.0
        scale *= 10 if reference.numel() == 1 else 1
        assert error <= tolerance * scale, f"{name}: off by {error:.3e} at a scale of {scale:.3e}"


def assert_within_twice(
    ours: Iterable[Results],
    theirs: Iterable[Results],
    exact: Iterable[Results],
    *,
    eps: float | None = None,
    kinks: bool = False,
) -> None:
    """The tolerance of low precision: our error (RMS) is at most twice upstream's own; at the worst entry thrice.

    Several seeds are pooled, because the error of one scalar (a gate's gradient) can be small by luck; hence also a
    scalar may be off by one `eps` (of the type computed in; by default that of the result) of its own size. A result
    that is exactly 0 (the gradient of a bias that all keys share: softmax cancels it) holds nothing but noise: five
    times. Where a ReLU makes `kinks`, one entry that falls on the other side of 0 is no measure: RMS only.
    """
    ours, theirs, exact = list(ours), list(theirs), list(exact)
    for name in theirs[0]:
        unit = eps or torch.finfo(theirs[0][name].dtype).eps
        allowance = unit if theirs[0][name].numel() == 1 else unit / 16
        mine, upstream, scale = [], [], []
        for o, t, e in zip(ours, theirs, exact, strict=True):
            assert o.keys() == t.keys(), o.keys() ^ t.keys()
            assert o[name].dtype == t[name].dtype, f"{name}: {o[name].dtype} != {t[name].dtype}"
            assert o[name].isfinite().all(), f"{name} is not finite"
            reference = e[name].double()
            mine.append((o[name].double() - reference).flatten())
            upstream.append((t[name].double() - reference).flatten())
            scale.append(reference.flatten())
        err, err_upstream, size = torch.cat(mine), torch.cat(upstream), torch.cat(scale)
        rms = [x.square().mean().sqrt().item() for x in (err, err_upstream, size)]
        worst = [x.abs().max().item() for x in (err, err_upstream, size)]
        sizes = f"upstream's own {rms[1]:.3e} in RMS and {worst[1]:.3e} at worst, of results of size {rms[2]:.3e}"
        factor = 2 if rms[2] > rms[1] else 5
        assert rms[0] <= factor * rms[1] + allowance * rms[2], f"{name}: RMS error {rms[0]:.3e}; {sizes}"
        assert kinks or worst[0] <= 1.5 * factor * worst[1] + unit * worst[2], (
            f"{name}: worst error {worst[0]:.3e}; {sizes}"
        )


def check_precision(
    build: Callable[[int], nn.Module],
    fuse: Callable[[nn.Module], Any],
    run: Callable[[nn.Module, int, torch.dtype], Results],
    dtype: torch.dtype,
    *,
    seeds: Iterable[int] = range(6),
    kinks: bool = False,
) -> None:
    """Build a module for each seed and hold its fused twin to twice the error that upstream makes at `dtype`.

    The exact result is upstream's in a wider type (fp64 for fp32, else fp32), weights and inputs rounded to `dtype`.
    """
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    ours, theirs, exact = [], [], []
    for seed in seeds:
        upstream = build(seed).to(dtype)
        fused = copy.deepcopy(upstream)
        fuse(fused)
        exact.append(run(copy.deepcopy(upstream).to(wide), seed, wide))
        theirs.append(run(upstream, seed, dtype))
        ours.append(run(fused, seed, dtype))
    assert_within_twice(ours, theirs, exact, kinks=kinks)


@dataclass(frozen=True)
class Gemm:
    """One matrix product of `batch` pairs [m, k] x [k, n]."""

    batch: int
    m: int
    n: int
    k: int


@dataclass(repr=False)
class Recorder:
    """What `recording` saw."""

    gemms: list[Gemm] = field(default_factory=list)
    allocations: list[tuple[str, int]] = field(default_factory=list)
    calls: list[tuple[str, list[tuple[int, ...]]]] = field(default_factory=list)

    def work(self, k: int) -> int:
        """Output elements of all products that contract over length `k`: the projections of features of that width."""
        return sum(g.batch * g.m * g.n for g in self.gemms if g.k == k)

    def largest(self) -> tuple[str, int]:
        """The op that allocated the most elements, and how many."""
        return max(self.allocations, key=lambda a: a[1])

    def count(self, op: str, where: Callable[[list[tuple[int, ...]]], bool] = lambda shapes: True) -> int:
        """Calls of an aten op whose tensor arguments' shapes satisfy `where`."""
        return sum(name == op and where(shapes) for name, shapes in self.calls)


class recording(TorchDispatchMode):  # noqa: N801 (reads as a context manager)
    """Records every aten op below autograd, so it sees through modules, functions and reads of a weight alike."""

    def __init__(self) -> None:
        super().__init__()
        self.record = Recorder()

    def __enter__(self) -> Recorder:  # type: ignore[override]
        super().__enter__()
        return self.record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            with self:  # under inference_mode composite ops arrive whole
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.record.calls.append((name, [tuple(t.shape) for t in tensors]))
        known = {_storage(t) for t in tensors}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _storage(t) not in known:
                self.record.allocations.append((name, t.numel()))
        factors = {"mm": args[:2], "bmm": args[:2], "addmm": args[1:3], "baddbmm": args[1:3]}.get(name)
        if name == "_linear_pointwise":  # oneDNN's linear: x [..., K], weight [N, K]
            self.record.gemms.append(Gemm(1, args[0].numel() // args[1].shape[1], args[1].shape[0], args[1].shape[1]))
        if factors is not None:
            a, b = factors
            batch = a.shape[0] if a.ndim == 3 else 1
            self.record.gemms.append(Gemm(batch, a.shape[-2], b.shape[-1], a.shape[-1]))


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()

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

Results = dict[str, Tensor]


def backward_results(output: Tensor, inputs: dict[str, Tensor], module: nn.Module) -> Results:
    """The output, and the gradient of a fixed random functional of it for every input and parameter that asks for one.

    A parameter without a gradient is an error where upstream has one (DistributedDataParallel would hang): it is left out here, so that the
    key sets differ.
    """
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    output.backward(cotangent.to(output.dtype))
    results = {"output": output.detach()}
    results |= {f"d {name}": t.grad for name, t in inputs.items() if t.grad is not None}
    results |= {f"d {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return results


def run_module(module: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, **kwargs: Any) -> Results:
    """Forward and backward of a copy of nothing: the module itself, moved to `dtype`, on fresh leaves of `inputs` (by position)."""
    module = module.to(dtype)
    module.zero_grad(set_to_none=True)
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    return backward_results(module(*leaves.values(), **kwargs), leaves, module)


def assert_same(ours: Results, theirs: Results, tolerance: float = 1e-10) -> None:
    """Every result equal up to `tolerance` of its largest entry (fp64: rounding order only)."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, reference in theirs.items():
        mine = ours[name]
        assert mine.shape == reference.shape, f"{name}: {tuple(mine.shape)} != {tuple(reference.shape)}"
        assert mine.dtype == reference.dtype, f"{name}: {mine.dtype} != {reference.dtype}"
        assert mine.isfinite().all(), f"{name} is not finite"
        error = (mine.double() - reference.double()).abs().max().item() if mine.numel() else 0.0
        scale = max(reference.abs().max().item(), 1.0) if mine.numel() else 1.0
        assert error <= tolerance * scale, f"{name}: off by {error:.3e} at a scale of {scale:.3e}"


def assert_within_twice(ours: Iterable[Results], theirs: Iterable[Results], exact: Iterable[Results]) -> None:
    """The tolerance of low precision: for each result our error is at most twice upstream's own, in RMS and at the worst entry.

    Several draws are pooled, because the error of one scalar (a gate's gradient) can be small by luck.
    """
    ours, theirs, exact = list(ours), list(theirs), list(exact)
    for name in theirs[0]:
        eps = torch.finfo(theirs[0][name].dtype).eps
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
        assert rms[0] <= 2 * rms[1] + eps * rms[2] / 4, f"{name}: RMS error {rms[0]:.3e}, upstream's own {rms[1]:.3e}"
        assert worst[0] <= 2 * worst[1] + eps * worst[2], f"{name}: worst error {worst[0]:.3e}, upstream's own {worst[1]:.3e}"


def check_precision(
    build: Callable[[int], nn.Module],
    fuse: Callable[[nn.Module], Any],
    run: Callable[[nn.Module, int, torch.dtype], Results],
    dtype: torch.dtype,
    *,
    seeds: Iterable[int] = range(3),
) -> None:
    """Build a module for each seed and hold its fused twin to twice the error that upstream makes at `dtype`.

    The exact result is upstream's in the next wider type (fp64 for fp32, fp32 otherwise), from the weights and inputs rounded to `dtype`.
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
    assert_within_twice(ours, theirs, exact)


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
        if factors is not None:
            a, b = factors
            batch = a.shape[0] if a.ndim == 3 else 1
            self.record.gemms.append(Gemm(batch, a.shape[-2], b.shape[-1], a.shape[-1]))


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()

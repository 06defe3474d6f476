"""How the op tests compare an op with a peer: in fp64 up to rounding, in 16 bit by the peer's own error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Inputs = dict[str, Tensor]
Results = dict[str, Tensor]
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def leaves(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Fresh leaves of `inputs` in `dtype`, with the same strides; what is not floating point stays as it is."""
    return {name: t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for name, t in inputs.items()}


def run(op: Op, inputs: Inputs, dtype: torch.dtype) -> Results:
    """Outputs of op(**inputs), and the gradient of a fixed random functional of them for every floating-point input.

    Args:
        op: takes the inputs by name, returns a tensor or a tuple of them.
        inputs: rounded to `dtype` and made leaves.
        dtype: to run in.
    """
    arguments = leaves(inputs, dtype)
    outputs = op(**arguments)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(99)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, cotangents)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name, leaf in arguments.items():
        if leaf.is_floating_point():
            assert leaf.grad is not None, f"no gradient for {name}"
            results[f"d {name}"] = leaf.grad
    return results


def assert_close(ours: Results, theirs: Results, tolerance: float = 1e-12) -> None:
    """Every result equal up to `tolerance` of its largest entry."""
    assert ours.keys() == theirs.keys()
    for name, reference in theirs.items():
        mine = ours[name]
        assert mine.shape == reference.shape, f"{name}: {tuple(mine.shape)} != {tuple(reference.shape)}"
        assert mine.dtype == reference.dtype, f"{name}: {mine.dtype} != {reference.dtype}"
        if mine.numel() == 0:
            continue
        error, scale = (mine - reference).abs().max().item(), max(reference.abs().max().item(), 1.0)
        assert error <= tolerance * scale, f"{name}: off by {error:.3e} at a scale of {scale:.3e}"


def check_exact(ours: Op, theirs: Op, inputs: Inputs) -> None:
    """Outputs and all gradients equal in fp64, and our op leaves its inputs alone."""
    assert_close(run(ours, inputs, torch.float64), run(theirs, inputs, torch.float64))
    check_pure(ours, inputs)


def check_low_precision(
    ours: Op, theirs: Op, draw: Callable[[], Inputs], dtype: torch.dtype, *, draws: int = 4, units: float = 0.0
) -> None:
    """For outputs and all gradients, our error in `dtype` is at most twice the peer's, in RMS and at the worst entry.

    The exact result is the peer's in fp64 on the inputs as rounded to `dtype`. Several draws are pooled, because the
    error of one scalar (the gradient of a gate) can be small by luck; on top comes a rounding of the result itself.
    Where calls have so few elements that every error is luck, `units` of the dtype's eps (of the largest entry, or of 1)
    are allowed in any case.
    """
    pooled: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for _ in range(draws):
        inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in draw().items()}
        mine, upstream, exact = run(ours, inputs, dtype), run(theirs, inputs, dtype), run(theirs, inputs, torch.float64)
        assert mine.keys() == upstream.keys() == exact.keys()
        for name, reference in exact.items():
            assert mine[name].dtype == upstream[name].dtype, f"{name}: {mine[name].dtype} != {upstream[name].dtype}"
            assert mine[name].isfinite().all(), f"{name} is not finite"
            errors = (mine[name] - reference, upstream[name] - reference, reference)
            pooled.setdefault(name, []).append(tuple(e.double().flatten() for e in errors))  # type: ignore[arg-type]
    step = torch.finfo(dtype).eps / 2
    for name, parts in pooled.items():
        error, error_upstream, size = (torch.cat(part) for part in zip(*parts, strict=True))
        if not error.numel() or error.abs().max() <= 2 * units * step * max(size.abs().max().item(), 1.0):
            continue
        rms = [t.square().mean().sqrt().item() for t in (error, error_upstream, size)]
        worst = [t.abs().max().item() for t in (error, error_upstream, size)]
        assert rms[0] <= 2 * rms[1] + step * rms[2] / 2, f"{name}: RMS error {rms[0]:.3e}, the peer's own {rms[1]:.3e}"
        assert worst[0] <= 2 * worst[1] + step * worst[2], (
            f"{name}: error {worst[0]:.3e}, the peer's own {worst[1]:.3e}"
        )


def check_pure(op: Op, inputs: Inputs) -> None:
    """With and without gradients, the op writes into no input and gives the same bits twice."""
    for grad in (True, False):
        arguments = leaves(inputs, torch.float64)
        copies = {name: t.detach().clone() for name, t in arguments.items()}
        versions = {name: t._version for name, t in arguments.items()}
        with torch.set_grad_enabled(grad):
            first, second = op(**arguments), op(**arguments)
        for one, two in zip(_tuple(first), _tuple(second), strict=True):
            assert torch.equal(one, two)
            assert all(one.data_ptr() != t.data_ptr() for t in arguments.values() if one.numel())
        for name, t in arguments.items():
            assert t._version == versions[name], f"{name} was written to"
            assert torch.equal(t, copies[name]), f"{name} changed"


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


class CountOps(TorchDispatchMode):
    """Counts the aten ops of a block of code, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

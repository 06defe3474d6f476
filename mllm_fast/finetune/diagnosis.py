"""Where a loss or a gradient stopped being a number: the forward and backward pass of one batch again, watched."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.utils._pytree import tree_iter

from . import randomness
from .optimizers import whole
from .processes import LossModule, Processes, gradients_kept_here


class NonFiniteLossError(ArithmeticError):
    """The loss or a gradient was NaN or infinite. Nothing was updated with it.

    Attributes:
        step: updates that were done before; None under `transformers.Trainer`.
        module: path of the first module in which it went wrong; None: in none of them.
        rows: of the data set, in the batch; none under `transformers.Trainer`.
    """

    def __init__(self, message: str, step: int | None, module: str | None, rows: list[int]) -> None:
        super().__init__(message)
        self.step, self.module, self.rows = step, module, rows

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.step, self.module, self.rows)


@dataclass
class Pass:
    """One forward and backward pass, so that it can be run again.

    Attributes:
        rows: of the data set.
        batch: what the loss function was given, before it was copied to the device.
        random: the random states before it.
    """

    rows: list[int]
    batch: Mapping[str, Any] = field(repr=False)
    random: dict[str, Any] = field(repr=False)


def finite(tensor: Tensor) -> bool:
    """Whether every number in it is one (integers always are)."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _all_finite(values: Any) -> bool:
    return all(finite(leaf) for leaf in _tensors(values))


def _tensors(values: Any) -> Iterator[Tensor]:
    for leaf in tree_iter(values):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):  # outputs of transformers that torch's trees do not know
            yield from _tensors(list(leaf.values()))


class _Watch:
    """Notes the first module whose output, and the first whose gradient, is not finite.

    Hooks for every module of the process: a hook on a module itself would make a fused parent call it instead of reading its
    weights, and run another path than the one that failed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.forward: tuple[str, str, bool] | None = None
        self.backward: tuple[str, str] | None = None

    def saw_output(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self.names.get(id(module))
        # Modules inside finish before the ones around them, so the first is the innermost.
        if name is not None and self.forward is None and not _all_finite(output):
            self.forward = (name, type(module).__name__, _all_finite(args))

    def saw_gradient(self, module: nn.Module, inward: Any, outward: Any) -> None:
        name = self.names.get(id(module))
        if name is not None and self.backward is None and not _all_finite(inward) and _all_finite(outward):
            self.backward = (name, type(module).__name__)

    @contextlib.contextmanager
    def of_outputs(self) -> Iterator[None]:
        handle = register_module_forward_hook(self.saw_output)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def of_gradients(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        # Modules that the hooks cannot follow are passed over: nothing to warn of.
        warnings.filterwarnings("ignore", "(Full backward hook is firing|For backward hooks to be called)")
        handles = [register_module_full_backward_hook(self.saw_gradient)]
        handles += [p.register_hook(self._parameter_hook(name)) for name, p in parameters.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _parameter_hook(self, name: str) -> Callable[[Tensor], None]:
        def saw(gradient: Tensor) -> None:
            if self.backward is None and not finite(gradient):
                owner = name.rpartition(".")[0]
                self.backward = (owner, f"the gradient of {name}")

        return saw


def diagnose(
    module: nn.Module,
    passes: list[Pass],
    step: int | None,
    send: Callable[[Any], Any],
    processes: Processes,
    trained: Mapping[str, nn.Parameter],
) -> NonFiniteLossError:
    """Run the passes of a step again, with the random numbers they had, until one goes wrong, and say where.

    Parameters are still those that the step began with. All processes take part, as the passes may need all of them.

    Args:
        module: model and loss, wrapped as they are trained.
        passes: of the step, of this process.
        step: updates done before. None: they and the rows are not known, a backward pass is going on, and it was the loss
            that was not finite, so that the forward passes are all that is run again.
        send: puts a batch on the device.
        processes: those that train.
        trained: trained parameters by name.

    Returns:
        The error to raise, the same in every process.
    """
    inner = getattr(module, "module", module)
    assert isinstance(inner, LossModule)
    for done in passes:
        for run in (_forward,) if step is None else (_forward, _backward):
            # After every run, so that all processes run the same: losses may exchange features in forward.
            reports = [r for r in processes.gather(run(module, inner, done, send, processes, trained)) if r is not None]
            if reports:
                what, name, rows, _ = min(reports, key=lambda report: not report[3])
                if step is None:
                    return NonFiniteLossError(f"{what}. Nothing was updated with it", None, name, rows)
                message = f"step {step + 1}: {what}. Rows of the data set in this batch: {_listed(rows)}. "
                message += "Nothing was updated with it; the last checkpoint is good"
                return NonFiniteLossError(message, step, name, rows)
    if step is None:
        return NonFiniteLossError("the loss was not finite, and is when the batch runs again", None, None, [])
    rows = [row for done in passes for row in done.rows]
    message = (
        f"step {step + 1}: the loss or its gradient was not finite, and is when the step's batches run again one by "
    )
    message += f"one. Rows of the data set: {_listed(rows)}. Gradients that are finite apart may overflow when added up"
    return NonFiniteLossError(message, step, None, rows)


# What happened, the module, the rows, and whether the module is known to be the first.
Report = tuple[str, str | None, list[int], bool]


def _forward(
    module: nn.Module,
    inner: LossModule,
    done: Pass,
    send: Callable[[Any], Any],
    processes: Processes,
    trained: Mapping[str, nn.Parameter],
) -> Report | None:
    watch = _Watch(inner.model)
    randomness.put(done.random, processes.device)
    with torch.no_grad(), watch.of_outputs():
        loss, count, _ = module(send(done.batch))
    if finite(loss):
        return None
    value = "NaN" if math.isnan(loss.item()) else "infinite"
    if bad := [name for name, tensor in done.batch.items() if not _all_finite(tensor)]:
        what = f"the loss is {value}, because the batch is: {', '.join(bad)} hold(s) NaN or infinities"
        return what, None, done.rows, True
    if watch.forward is not None:
        name, kind, inputs = watch.forward
        given = "" if inputs else " (what it was given was not finite either)"
        what = (
            f"the loss is {value}. The first module whose output is not finite is {name or 'the model'} ({kind}){given}"
        )
        return what, name, done.rows, True
    if count is not None and not count.item():
        return f"the loss is {value}: nothing in the batch is supervised (its count is 0)", None, done.rows, True
    what = f"the loss is {value}, but every module's output is finite: it comes from the loss function"
    return what, None, done.rows, True


def _backward(
    module: nn.Module,
    inner: LossModule,
    done: Pass,
    send: Callable[[Any], Any],
    processes: Processes,
    trained: Mapping[str, nn.Parameter],
) -> Report | None:
    watch = _Watch(inner.model)
    _clear(trained)
    # FSDP leaves gradients in the parameters only once they were sent round.
    with gradients_kept_here(module, kept=not isinstance(module, FSDPModule)):
        try:
            with warnings.catch_warnings(), watch.of_gradients(trained):
                _gradients(module, done, send, processes)
        except RuntimeError:
            # Something is changed in place that the hooks look at: go without the modules' names.
            watch = _Watch(inner.model)
            _clear(trained)
            _gradients(module, done, send, processes)
    bad = [name for name, p in trained.items() if p.grad is not None and not finite(whole(p.grad))]
    _clear(trained)
    if not bad:
        return None
    listed = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    if watch.backward is None:
        what = f"the loss is finite, the gradients of {listed} are not"
        return what, bad[0].rpartition(".")[0], done.rows, False
    name, kind = watch.backward
    what = f"the loss is finite, its gradients are not ({listed}). In backward it first goes wrong in "
    return what + f"{name or 'the model'} ({kind})", name, done.rows, True


def _gradients(module: nn.Module, done: Pass, send: Callable[[Any], Any], processes: Processes) -> None:
    randomness.put(done.random, processes.device)
    loss, count, _ = module(send(done.batch))
    (loss if count is None else loss * count).backward()


def _clear(trained: Mapping[str, nn.Parameter]) -> None:
    for parameter in trained.values():
        parameter.grad = None


def _listed(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:32])) + (f" and {len(rows) - 32} more" if len(rows) > 32 else "")

"""Eager inference calls that launch again what an equal call launched before, without working out again how.

A call of an op checks its arguments, chooses a configuration and has Triton bind some forty of its own: tens of microseconds
on the host, several times what the kernel of a decode step runs. All of that follows from shapes, strides, dtypes,
alignments and constants. So what a call launched is kept under those, and a later one only puts its own pointers in.

Kept is only a call that did nothing but allocate, look at tensors in another way, and launch. A copy, a vendor's GEMM or a
random number in between, and it is worked out anew every time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import runtime

P = ParamSpec("P")
Constants = tuple[Hashable, ...]

# Types of arguments that hold tensors, and what they hold: constants and tensors.
PARTS: dict[type, Callable[[Any], tuple[Constants, tuple[Tensor | None, ...]]]] = {}
# Calls that are kept; when there are more, all are forgotten.
MAX_CALLS = 4096
# After so many attempts a call that cannot be kept is left alone.
_ATTEMPTS = 3

_PLAIN = (Tensor, nn.Parameter)
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Asks nothing of a tensor.
_FREE = {"promote_types"}
_calls: dict[Hashable, _Call | int] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
    """`kernel[grid](...)`: how the launchers of ops that relaunch launch. `keywords` are its last arguments, and options."""
    compiled = kernel[grid](*arguments, **keywords)
    if (recorder := _recorder.get()) is not None:
        names = kernel.arg_names[len(arguments) :]
        recorder.launches.append(_Launch(compiled, grid, (*arguments, *(keywords[name] for name in names))))


def relaunches(op: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator for an op whose first argument, by position, is a tensor, and whose result is one of its own."""

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not args or not serves(args[0]):
            return op(*args, **kwargs)
        if _recorder.get() is not None:  # a part of a call that is being noted
            return op(*args, **kwargs)
        described = _described(op, args, kwargs)
        if described is None:
            return op(*args, **kwargs)
        key, pointers = described
        known = _calls.get(key)
        if isinstance(known, _Call):
            again = known(pointers)
            return op(*args, **kwargs) if again is None else again
        if known is None or known == _ATTEMPTS:
            if len(_calls) >= MAX_CALLS:
                _calls.clear()
            _calls.setdefault(key, 0)  # the first time it may compile, and many a call comes once only
            return op(*args, **kwargs)
        out, kept = _recorded(op, args, kwargs)
        _calls[key] = known + 1 if kept is None else kept
        return out

    return call


def serves(first: Any) -> bool:
    """Whether a call may be kept: on the current NVIDIA GPU, where Triton's launcher takes addresses as numbers."""
    return (
        isinstance(first, Tensor)
        and first.is_cuda
        and torch.version.hip is None
        and first.get_device() == torch.cuda.current_device()
        and not torch.is_autocast_enabled("cuda")
        and runtime.current_backend() != "torch"
    )


def _described(op: Hashable, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Hashable, list[int]] | None:
    """All that a call's launches depend on, and the addresses of its tensors in turn; None: not known."""
    key: list[Hashable] = [op, runtime.current_backend(), torch.get_float32_matmul_precision(), *kwargs]
    pointers: list[int] = []
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind in _PLAIN:
            parts: tuple[Tensor | None, ...] = (value,)
        elif kind in PARTS:
            constants, parts = PARTS[kind](value)
            key.append(constants)
        elif value is None or kind in (str, float, int, bool):
            key.append((kind, value))
            continue
        else:
            return None
        for t in parts:
            if t is None:
                key.append(None)
            elif type(t) in _PLAIN:
                pointer = t.data_ptr()
                pointers.append(pointer)
                key.append((t.shape, t.stride(), t.dtype, t.get_device(), pointer & 15))
            else:
                return None
    return tuple(key), pointers


class _Launch(NamedTuple):
    """What was launched: a compiled kernel, and all its arguments in turn."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class _Call:
    """What a call allocated and launched, with places for the addresses of its tensors.

    Args:
        launches: in turn; tensors among their arguments are numbers of `addresses`.
        addresses: (which tensor, bytes after its beginning); the tensors are the call's own and then the allocated ones.
        allocated: shape, dtype and device of each; all are contiguous.
        result: which of them is returned.
    """

    def __init__(
        self,
        launches: Sequence[tuple[_Launch, Sequence[int | None]]],
        addresses: Sequence[tuple[int, int]],
        allocated: Sequence[tuple[torch.Size, torch.dtype, torch.device]],
        result: int,
    ) -> None:
        from triton import knobs
        from triton.runtime import driver

        self._knobs, self._driver = knobs.runtime, driver
        self._addresses, self._allocated, self._result = addresses, allocated, result
        self._launches, self._kernels = [], []
        for (kernel, grid, arguments), places in launches:
            # One look-up gives all arguments of a launch, out of its constants and the addresses.
            constants = tuple(arguments)
            numbers = [i if place is None else len(constants) + place for i, place in enumerate(places)]
            fixed = ((*grid, 1, 1)[:3], kernel.function, kernel.packed_metadata)
            self._launches.append((kernel.run, *fixed, _without_tensors(constants), operator.itemgetter(*numbers)))
            self._kernels.append(kernel)  # which owns what it runs

    def __call__(self, pointers: list[int]) -> Tensor | None:
        """The result for tensors at these addresses; None: somebody watches launches, which is for Triton to tell."""
        if _watched(self._knobs.launch_enter_hook) or _watched(self._knobs.launch_exit_hook):
            return None
        fresh = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self._allocated]
        pointers += [t.data_ptr() for t in fresh]
        addresses = tuple([pointers[i] + offset for i, offset in self._addresses])
        active = self._driver.active
        stream = active.get_current_stream(active.get_current_device())
        for run, grid, function, metadata, constants, arguments in self._launches:
            run(*grid, stream, function, metadata, None, None, None, *arguments(constants + addresses))
        return fresh[self._result]


def _watched(hook: Any) -> bool:
    """Whether a hook of Triton's, which may be a chain of them, does anything."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _without_tensors(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if isinstance(value, Tensor) else value for value in arguments)


class _Recorder(TorchDispatchMode):
    """Notes what a call allocates and launches, and whether it does anything else."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors, self.allocated = tensors, list[Tensor]()
        self.launches: list[_Launch] = []
        self.pure = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _ALLOCATIONS:
            self.allocated.append(out)
        if name in _ALLOCATIONS or name in _FREE:
            return out
        known = {_storage(t) for t in (*self.tensors, *self.allocated)}
        looks = all(isinstance(t, Tensor) and _storage(t) in known for t in tree_leaves(out))
        self.pure = self.pure and looks and not func._schema.is_mutable
        return out

    def call(self, result: Any) -> _Call | None:
        """What to keep, or None where another call with equal arguments might need something else."""
        contiguous = all(t.is_contiguous() for t in self.allocated)
        returned = [i for i, t in enumerate(self.allocated) if isinstance(result, Tensor) and _same(t, result)]
        if not (self.pure and self.launches and contiguous and len(returned) == 1):
            return None
        addresses: dict[tuple[int, int], int] = {}
        launches = []
        for one in self.launches:
            if not hasattr(one.kernel, "packed_metadata"):
                return None
            places: list[int | None] = []
            for value in one.arguments:
                found = self._address(value) if isinstance(value, Tensor) else None
                if found is None and isinstance(value, Tensor):
                    return None
                places.append(None if found is None else addresses.setdefault(found, len(addresses)))
            launches.append((one, places))
        allocated = [(t.shape, t.dtype, t.device) for t in self.allocated]
        allocated[returned[0]] = (result.shape, result.dtype, result.device)
        return _Call(launches, tuple(addresses), allocated, returned[0])

    def _address(self, t: Tensor) -> tuple[int, int] | None:
        """Which tensor it is, or of which it is a part, and how far in; None where there are several answers."""
        tensors = (*self.tensors, *self.allocated)
        same = [i for i, other in enumerate(tensors) if other is t]
        if not same:
            same = [i for i, other in enumerate(tensors) if _storage(other) == _storage(t)]
        return (same[0], t.data_ptr() - tensors[same[0]].data_ptr()) if len(same) == 1 else None


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _same(t: Tensor, other: Tensor) -> bool:
    """Whether they are the same numbers in the same places. (What allocates may hand out another object than it made.)"""
    shown = [(_storage(x), x.data_ptr(), x.dtype, x.numel(), x.is_contiguous()) for x in (t, other)]
    return shown[0] == shown[1]


_recorder: ContextVar[_Recorder | None] = ContextVar("mllm_fast_recorder", default=None)


def _recorded(op: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, _Call | None]:
    """The result, and what to keep of the call."""
    tensors: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        parts = PARTS[type(value)](value)[1] if type(value) in PARTS else (value,)
        tensors += [t for t in parts if isinstance(t, Tensor)]
    recorder = _Recorder(tensors)
    token = _recorder.set(recorder)
    try:
        with recorder:
            out = op(*args, **kwargs)
    finally:
        _recorder.reset(token)
    return out, recorder.call(out)

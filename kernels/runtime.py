"""Which implementation of an op runs: the Triton kernels or the PyTorch reference.

Every public op asks `choose` once per call. Nothing here touches a device or starts a compilation at import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch

BACKENDS = ("auto", "triton", "torch")

_backend: ContextVar[str] = ContextVar("mllm_fast_backend", default="auto")


class UnknownBackendError(ValueError):
    """A backend name that is none of `BACKENDS`."""


class BackendUnavailableError(RuntimeError):
    """Triton was asked for where it cannot run, or for an op that has no Triton kernel."""


class Detail(NamedTuple):
    """Some calls of an op, who runs them on a GPU, and why."""

    calls: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Op:
    """What the library knows about one op.

    Attributes:
        name, summary: for people.
        has_triton: Triton kernels exist for it.
        details: of an architecture ("sm_90"): who runs which calls there, where not all run alike.
        note: of an architecture: the same in a few words, or "".
    """

    name: str
    summary: str
    has_triton: bool
    details: Callable[[str], Sequence[Detail]] = lambda architecture: ()
    note: Callable[[str], str] = lambda architecture: ""


_ops: dict[str, Op] = {}


def register_op(
    name: str,
    summary: str,
    *,
    has_triton: bool = False,
    details: Callable[[str], Sequence[Detail]] = Op.details,
    note: Callable[[str], str] = Op.note,
) -> None:
    """Declare an op, so that `choose` can pick for it and `mllm-fast info` can list it; arguments as for `Op`."""
    _ops[name] = Op(name, summary, has_triton, details, note)


def op(name: str) -> Op:
    """The declared op of that name."""
    return _ops[name]


def ops() -> tuple[Op, ...]:
    """All declared ops, by name."""
    return tuple(_ops[name] for name in sorted(_ops))


def interpreting() -> bool:
    """Whether Triton runs its interpreter, which executes kernels on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_unavailable_reason() -> str | None:
    """Why Triton kernels cannot run on this machine, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    if not interpreting() and not torch.cuda.is_available():
        return "no GPU was found (set TRITON_INTERPRET=1 to run the kernels, slowly, on a CPU)"
    return None


def current_backend() -> str:
    """The backend in force here: "auto", "triton" or "torch"."""
    return _backend.get()


# torch.compile cannot trace a ContextVar: it takes the value in force while tracing, which a compiled function then keeps.
# This is what torch.compiler.assume_constant_result does, without its import of the whole compiler.
current_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force an implementation for the calls inside the `with` block, in this thread and async task only.

    Args:
        name: "auto" picks by device, "triton" forces the kernels, "torch" forces the PyTorch reference.

    Raises:
        UnknownBackendError: for any other name.
        BackendUnavailableError: for "triton" on a machine that cannot run it.
    """
    if name not in BACKENDS:
        raise UnknownBackendError(f"unknown backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    if name == "triton" and (reason := triton_unavailable_reason()) is not None:
        raise BackendUnavailableError(f"the Triton backend cannot run here: {reason}; use backend('torch') instead")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def explain(name: str, device_type: str) -> tuple[str, str]:
    """The implementation of op `name` for tensors on `device_type` under the backend in force, and why.

    Raises:
        BackendUnavailableError: Triton is forced and cannot serve this op on this device.
    """
    declared, forced = _ops[name], current_backend()
    if forced == "torch":
        return "torch", "forced by backend('torch')"
    if not declared.has_triton:
        if forced == "triton":
            raise BackendUnavailableError(f"{name} has no Triton kernel; call it under backend('auto') or 'torch'")
        return "torch", "no Triton kernel for this op"
    reason = triton_unavailable_reason()
    if reason is None and device_type != "cuda" and not interpreting():
        reason = f"the tensors are on {device_type}, and Triton kernels need a GPU"
    if forced == "triton":
        if reason is not None:
            raise BackendUnavailableError(f"the Triton kernels of {name} cannot run: {reason}")
        return "triton", "forced by backend('triton')"
    if reason is not None or device_type != "cuda":
        return "torch", reason or "the interpreter runs only where backend('triton') asks for it"
    return "triton", f"tensors on {device_type}"


def choose(name: str, *tensors: torch.Tensor | None) -> str:
    """ "triton" or "torch" for this call of op `name`, by the backend in force and the device of its first tensor."""
    for tensor in tensors:
        if tensor is not None:
            return chosen(name, tensor.device.type)
    return chosen(name, "cpu")


def choose_for(name: str, device_type: str, unsupported: Callable[[], str | None]) -> str:
    """ "triton" or "torch" for a call of op `name` that its kernels may be unable to serve. A tracer can follow it.

    Args:
        name: the op.
        device_type: of its tensors.
        unsupported: asked where Triton would run: why the kernels cannot serve this call, or None where they can.

    Raises:
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    return "triton" if chosen(name, device_type) == "triton" and may_serve(unsupported()) else "torch"


def chosen(name: str, device_type: str) -> str:
    """ "triton" or "torch" for op `name` on a device, as `choose`; a tracer can follow it."""
    # Asked at every call; `explain` takes tens of microseconds where triton was never imported.
    if device_type != "cuda" and current_backend() != "triton":
        return "torch"
    return explain(name, device_type)[0]


# As for current_backend: a compiled function keeps the choice in force while it was traced.
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def may_serve(reason: str | None) -> bool:
    """Whether the kernels serve a call, which is so where there is no `reason` why they cannot.

    Raises:
        BackendUnavailableError: there is one, and Triton is forced.
    """
    if reason is not None and current_backend() == "triton":
        raise BackendUnavailableError(f"{reason}; call it under backend('auto') or 'torch'")
    return reason is None

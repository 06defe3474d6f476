"""What a drop-in keeps beside its parameters: options, derived weights, and what one forward shares between layers.

Everything here lives in one attribute of a fused module (`_mllm_fast`), is never part of a state dict, and is rebuilt
rather than copied by `copy.deepcopy` and `pickle`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from .graphs import Graphs

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How a model was fused.

    Attributes:
        level: 0 uses the kernels only, 1 also computes once what upstream computes again and again (exact up to the
            order of rounding), 2 is for folds that change rounding in half precision (none yet).
        fixes: names of the upstream bugs that are mended instead of reproduced.
        prepack: keep a second copy of the weights in oneDNN's layout for CPU inference.
        cuda_graphs: capture the encoder side per shape of its inputs, and replay it.
    """

    level: int = 1
    fixes: frozenset[str] = frozenset()
    prepack: bool = False
    cuda_graphs: bool = False

    def __str__(self) -> str:
        fixes = ", ".join(sorted(self.fixes)) or "none"
        extras = [name for name, on in (("prepacked", self.prepack), ("CUDA graphs", self.cuda_graphs)) if on]
        return ", ".join([f"level {self.level}, fixes: {fixes}", *extras])


class TensorKey:
    """Tells whether a tensor still holds what it held when the key was made, without reading it.

    Two tensors have the same key when they are the same bytes of the same living storage, at the same version. A weak
    reference to the storage keeps its address from being used again, so a freed tensor never matches a new one. Writes
    through `tensor.data` go past PyTorch's version counter and are not seen. Inference-mode tensors carry no version
    counter: on a CPU such a tensor is compared with a copy, elsewhere it counts as unchanged while its storage lives.
    """

    __slots__ = ("_snapshot", "_storage", "_where")

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._where = _where(tensor)
        self._snapshot = tensor.clone() if tensor.is_inference() and tensor.device.type == "cpu" else None

    def matches(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the keyed tensor, unchanged."""
        if tensor.untyped_storage()._cdata != self._storage.cdata or _where(tensor) != self._where:
            return False
        return self._snapshot is None or torch.equal(tensor, self._snapshot)

    def overwritten(self, tensor: Tensor) -> bool:
        """Whether `tensor` shows that the keyed bytes were written to since, so that the key can never match again."""
        same_storage = tensor.untyped_storage()._cdata == self._storage.cdata
        return same_storage and _version(tensor) != self._where[-1]

    @property
    def alive(self) -> bool:
        """Whether somebody still holds the storage."""
        return not self._storage.expired()


def _where(tensor: Tensor) -> tuple[Hashable, ...]:
    return (
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        _version(tensor),
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class TensorKeys:
    """`TensorKey` of several tensors, some of which may be None, plus any hashable that must stay equal."""

    __slots__ = ("_extra", "_keys")

    def __init__(self, tensors: Sequence[Tensor | None], extra: Hashable = None) -> None:
        self._keys = tuple(None if t is None else TensorKey(t) for t in tensors)
        self._extra = extra

    def match(self, tensors: Sequence[Tensor | None], extra: Hashable = None) -> bool:
        """Whether these are the keyed tensors, unchanged, and `extra` is the keyed one."""
        if len(tensors) != len(self._keys) or extra != self._extra:
            return False
        return all(
            (t is None) if key is None else (t is not None and key.matches(t))
            for key, t in zip(self._keys, tensors, strict=True)
        )


def autocast_key(device_type: str) -> Hashable:
    """What autocast would do on this device: part of the key of anything that was computed under it."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def readable_on_host(tensor: Tensor) -> bool:
    """Whether looking at the tensor's values waits for no device and breaks no trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd, backward or forward mode, will ask for the graph of what is computed from these tensors."""
    if forward_ad._current_level >= 0:  # a dual tensor shares its storage and version with its primal
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Derived:
    """Weights computed from parameters (stacked, folded), kept until one of their sources changes.

    While a source needs a gradient they are computed inside the graph at every call instead, and so they are in a trace:
    a compiled function could not tell that a source was written to since.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[TensorKeys, Any]] = {}

    def get(self, name: Hashable, sources: Sequence[Tensor | None], build: Callable[[], T]) -> T:
        """`build()`, or what it gave the last time where `sources` are what they were then."""
        if torch.compiler.is_compiling():
            return build()
        if needs_graph(*sources):
            self._entries.pop(name, None)
            return build()
        entry = self._entries.get(name)
        if entry is not None and entry[0].match(sources):
            return entry[1]
        device_type = next(t.device.type for t in sources if t is not None)
        # A value built inside inference_mode could never be saved for a later backward pass, and one built under
        # autocast would hold rounded weights.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
            value = build()
        self._entries[name] = (TensorKeys(sources), value)
        return value

    def forget(self, *names: Hashable) -> None:
        """Drop what is kept under these names, where something is."""
        if self._entries:
            for name in names:
                self._entries.pop(name, None)

    def clear(self) -> None:
        """Forget everything that was computed."""
        self._entries.clear()


@dataclass(eq=False)
class FusedState:
    """The one private attribute of a fused module.

    Attributes:
        original_class: the class to give back in `unfuse`.
        options: how the model was fused.
        spec: the block's frozen description, made by its family.
        shared: what the modules of one fused model share during a forward or a generation (a `MediaContext`).
        derived: weights computed from this module's parameters.
        graphs: captured runs of this module; None where none are wanted.
        extra: what `unfuse` needs beyond the class.
    """

    original_class: type
    options: Options
    spec: Any = None
    shared: Any = None
    derived: Derived = field(default_factory=Derived)
    graphs: Graphs | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def fixes(self, name: str) -> bool:
        """Whether the model was fused with this fix."""
        return name in self.options.fixes

    @property
    def packs(self) -> Derived | None:
        """Where packed weights are kept; None where the model was fused without them."""
        return self.derived if self.options.prepack else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "derived": None, "graphs": self.graphs is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.derived = Derived()
        self.graphs = Graphs() if state["graphs"] else None


def plain_state(module: nn.Module, options: Options, context: Any) -> FusedState:
    """`fused_state` of a drop-in that needs no description of its module, `context` being the model's `MediaContext`."""
    return FusedState(type(module), options, None, context)

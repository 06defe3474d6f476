"""CUDA graphs: a module's launches recorded once for each shape of its inputs, and replayed as one.

The encoder side of a generation launches hundreds of small kernels, and at small batches it is the launching that takes the
time. A captured run reads its inputs from buffers of its own and its weights from where they lie, so it is right only
while the weights stay there and what was derived of them stays true: `Fingerprint` asks that before every replay.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import chain, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ..kernels import runtime

Run = Callable[[], Any]

# Shapes of one module that are kept, each with the memory of its intermediates; the longest unused makes room.
MAX_BUCKETS = 8
# Modules of libraries whose forward hooks only record outputs, and do so while a graph is captured; families add theirs.
PASSIVE_HOOKS: set[str] = set()
# Arguments that are not tensors are part of the shape, and must be constants.
_LEAVES = (Tensor, type(None), bool, int, float, str)
_PLAIN = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Capture(Protocol):
    """What records and replays launches: a GPU, or a test's stand-in for one."""

    def refusal(self, device: torch.device) -> str | None:
        """Why nothing can be captured on `device` now, or None."""
        ...

    def turn(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """For what may not overlap: filling the buffers of a graph, replaying it, and reading its outputs."""
        ...

    def capture(self, run: Run) -> tuple[Callable[[], None], Any]:
        """(replay, outputs): what a run launches, to be launched again, and where it then leaves its results."""
        ...


class CudaCapture:
    """Captures on the current CUDA device. All graphs of one model share a memory pool, and are replayed in turn."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._lock = threading.RLock()
        self._done: dict[torch.device, torch.cuda.Event] = {}

    def refusal(self, device: torch.device) -> str | None:
        """As in `Capture`."""
        if device.type != "cuda":
            return f"on {device.type} there are no CUDA graphs"
        if torch.cuda.is_current_stream_capturing():
            return "it is being captured by somebody else"
        return None

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """As in `Capture`: graphs that share a pool share memory, so streams wait for each other here, on the device."""
        with self._lock, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if (done := self._done.get(device)) is not None:
                stream.wait_event(done)
            yield
            done = self._done.setdefault(device, torch.cuda.Event())
            done.record(stream)

    def capture(self, run: Run) -> tuple[Callable[[], None], Any]:
        """As in `Capture`, after a warm-up on a stream of its own (workspaces, compilation of kernels)."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run()
        return graph.replay, outputs


class Fingerprint:
    """Tells whether modules and their weights are what they were, without reading a weight.

    Noticed are weights that were written to, moved, or replaced, and children that were replaced. Writes through
    `tensor.data` into the same memory go past PyTorch's version counter: weights that a graph reads itself are then up to
    date, those it has stacked or folded are not.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        modules = [module for part in parts for module in part.modules()]
        # All of this is asked before every replay, of hundreds of modules: most tables are empty, and loops run in C.
        tables = [t for m in modules for t in (m._parameters, m._buffers, m._modules)]
        self._tables, self._empty = [t for t in tables if t], [t for t in tables if not t]
        self._members = self._read_members()
        self._attributes = [m.__dict__ for m in modules]
        self._hooks = [getattr(m, name) for m in modules for name in _HOOKS]
        self.tensors = [x for x in self._members if isinstance(x, Tensor)]
        # Whether all weights are ordinary tensors, not packed or sharded ones, which depend on more than they show.
        self.plain = all(type(t) in _PLAIN for t in self.tensors)
        self._versioned = [t for t in self.tensors if not t.is_inference()]
        # While a storage lives, nothing else comes to lie where it lies.
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in self.tensors] if self.plain else []
        self._cdata = [storage.cdata for storage in self._storages]
        self._state = self._read_state() if self.plain else None

    def _read_members(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._tables))]

    def _read_state(self) -> tuple[list[int], list[int]]:
        return [t._version for t in self._versioned], [*map(Tensor.data_ptr, self.tensors)]

    def same_modules(self) -> bool:
        """Whether children, parameters and buffers are the same objects."""
        if any(self._empty):
            return False
        members = self._read_members()
        return len(members) == len(self._members) and all(map(operator.is_, members, self._members))

    def same_weights(self) -> bool:
        """Whether the weights lie where they lay, and nobody wrote to them."""
        return not any(map(torch.UntypedStorage._expired, self._cdata)) and self._read_state() == self._state

    def watched(self) -> bool:
        """Whether any module does more than its class says: a replay would leave that out."""
        if any(self._hooks):
            hooks = chain.from_iterable(table.values() for table in self._hooks)
            if not all(getattr(hook, "__module__", None) in PASSIVE_HOOKS for hook in hooks):
                return True
        return any(map(operator.contains, self._attributes, repeat("forward")))

    def training(self) -> bool:
        """Whether any module is in training mode."""
        return any(map(operator.itemgetter("training"), self._attributes))


class _Graph:
    """One captured run."""

    def __init__(self, capture: Capture, run: Callable[[list[Any]], Any], leaves: Sequence[Any]) -> None:
        self._buffers = [_buffer(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._fill(leaves)
        self._replay, outputs = capture.capture(lambda: run(self._buffers))
        self._outputs, self._structure = pytree.tree_flatten(outputs)

    def _fill(self, leaves: Sequence[Any]) -> None:
        for buffer, leaf in zip(self._buffers, leaves, strict=True):
            if isinstance(leaf, Tensor):
                _once(buffer).copy_(_once(leaf))

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """The outputs for these inputs."""
        self._fill(leaves)
        self._replay()
        # Copies: the next replay writes over what this one left.
        return [x.clone() if isinstance(x, Tensor) else x for x in self._outputs]

    def outputs(self, leaves: list[Any]) -> Any:
        """`leaves` in the structure of the captured run's outputs."""
        return pytree.tree_unflatten(leaves, self._structure)


class Graphs:
    """The captured runs of one module, one for each bucket: shapes, dtypes and device of its inputs, and its settings.

    A bucket is captured the second time it is met: what is met once is not worth it, and the first run compiles kernels.
    Outputs are copies that belong to the caller. Runs with gradients, in training mode, under autocast, with hooks, on
    other devices and in traces are not captured: they take the ordinary path, and `skipped` says why the last one did.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._failed: dict[Hashable, str] = {}
        self._fingerprint: Fingerprint | None = None
        self.skipped: str | None = None

    @property
    def captured(self) -> int:
        """How many buckets are captured."""
        return len(self._graphs)

    def clear(self) -> None:
        """Forget everything that was captured."""
        self.__init__()  # type: ignore[misc]

    def call(
        self, capture: Capture, parts: Sequence[nn.Module], run: Callable[..., Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        """`run(*args, **kwargs)`, replayed where that gives the same.

        Args:
            capture: of the model.
            parts: the modules that `run` runs.
            run: reads nothing but its arguments and the parts, and returns tensors in tuples, lists, dicts or outputs of
                transformers.
            args, kwargs: tensors on the parts' device and constants.
        """
        kwargs = {} if kwargs is None else kwargs
        if torch.compiler.is_compiling() or _inside.get():
            return run(*args, **kwargs)
        leaves, structure = _flat(args, kwargs)
        self.skipped = self._refusal(capture, parts, leaves)
        if self.skipped is not None:
            return run(*args, **kwargs)
        bucket = (structure, *map(_kind, leaves), runtime.current_backend(), torch.get_float32_matmul_precision())
        with _alone():
            if bucket not in self._graphs and (bucket in self._failed or bucket not in self._seen):
                self.skipped = self._failed.get(bucket, "this shape is met for the first time")
                self._seen.add(bucket)
                return run(*args, **kwargs)
            device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
            with capture.turn(device):
                graph = self._graphs.get(bucket) or self._captured(capture, bucket, run, leaves, structure)
                if graph is not None:
                    self._graphs.move_to_end(bucket)
                    return graph.outputs(graph.run(leaves))
            self.skipped = self._failed[bucket]
            return run(*args, **kwargs)

    def _captured(
        self, capture: Capture, bucket: Hashable, run: Callable[..., Any], leaves: Sequence[Any], structure: Any
    ) -> _Graph | None:
        def captured_run(buffers: list[Any]) -> Any:
            args, kwargs = _nested(buffers, structure)
            return run(*args, **kwargs)

        try:
            # Buffers that were made in inference mode could not be filled outside of it.
            with torch.inference_mode(False), torch.no_grad():
                graph = _Graph(capture, captured_run, leaves)
        except RuntimeError as error:  # something in it waits for the device, or allocates past torch
            self._failed[bucket] = f"its capture failed: {str(error).splitlines()[0]}"
            return None
        self._graphs[bucket] = graph
        if len(self._graphs) > MAX_BUCKETS:
            self._graphs.popitem(last=False)
        return graph

    def _refusal(self, capture: Capture, parts: Sequence[nn.Module], leaves: Sequence[Any]) -> str | None:
        """Why this call cannot be captured or replayed, or None; forgets graphs that are no longer true."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(type(t) not in _PLAIN for t in tensors):
            return "its inputs are no ordinary tensors"
        device = tensors[0].device
        if (reason := capture.refusal(device)) is not None:
            return reason
        fingerprint = self._fingerprint
        if fingerprint is None or not fingerprint.same_modules():
            self.clear()
            self._fingerprint = fingerprint = Fingerprint(parts)
        if not fingerprint.plain:
            return "its weights are packed or sharded"
        if not fingerprint.same_weights():
            self.clear()
            self._fingerprint = fingerprint = Fingerprint(parts)
        if any(t.device != device for t in tensors) or any(t.device != device for t in fingerprint.tensors[:1]):
            return "its inputs and weights lie on several devices"
        if any(not isinstance(leaf, _LEAVES) for leaf in leaves):
            return "an argument is neither a tensor nor a constant"
        if torch.is_grad_enabled() and any(t.requires_grad for t in chain(tensors, fingerprint.tensors)):
            return "gradients are wanted"
        if fingerprint.training():
            return "it is in training mode"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        return "a hook watches it" if fingerprint.watched() else None


# Inside of a run that is captured or replayed as a whole, its parts run as they are.
_inside: ContextVar[bool] = ContextVar("mllm_fast_graphs_inside", default=False)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def replayed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for the forward of a drop-in: replayed where the model was fused with CUDA graphs."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self._mllm_fast
        if state.graphs is None:
            return forward(self, *args, **kwargs)
        return state.graphs.call(state.shared.capture, (self,), functools.partial(forward, self), args, kwargs)

    call.replays = True  # type: ignore[attr-defined]
    return call


def _flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Hashable]:
    """The leaves of a call, and its structure; the reverse of `_nested`.

    Nearly always nothing is nested: (how many are positional, names of the others) is then found, hashed and compared in a
    fraction of a tree's time.
    """
    leaves = [*args, *kwargs.values()]
    if all(isinstance(leaf, _LEAVES) for leaf in leaves):
        return leaves, (len(args), *kwargs)
    return pytree.tree_flatten((args, kwargs))


def _nested(leaves: list[Any], structure: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    if isinstance(structure, pytree.TreeSpec):
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return args, kwargs
    number, *names = structure
    return leaves[:number], dict(zip(names, leaves[number:], strict=True))


def _kind(leaf: Any) -> Hashable:
    """What of a leaf a graph is captured for: of a tensor its shape, dtype, device, and which dimensions are expanded."""
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    return leaf.shape, leaf.dtype, leaf.device, tuple(stride == 0 for stride in leaf.stride())


def _once(t: Tensor) -> Tensor:
    """The tensor without the repetitions of its expanded dimensions."""
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if stride == 0 and size > 1:
            t = t.narrow(dim, 0, 1)
    return t


def _buffer(t: Tensor) -> Tensor:
    """A buffer for tensors like `t`, expanded where `t` is: what sees one row computes one row."""
    return torch.empty_like(_once(t)).expand(t.shape)

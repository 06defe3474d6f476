"""Put the drop-ins into a model that exists: `fuse`, `unfuse`, and the report of what was done.

`fuse` gives each recognised module a subclass of its own class whose forward runs our block. Parameters, buffers,
names, hooks, devices and wrappers stay what they are, because the modules stay what they are.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .families import FIXES, REGISTRY, CannotFuseError, Entry, class_path, dropin_class, find, state_of
from .kernels import runtime
from .kernels.launch import device_architecture
from .modules.children import hooked, readable_linear
from .modules.graphs import Graphs
from .modules.media_context import MediaContext
from .modules.state import FusedState, Options
from .tables import alike, as_text

LEVELS = (0, 1, 2)
ROOT = "(the model itself)"


class NothingToFuseError(ValueError):
    """`fuse` met no module that it knows."""


@dataclass(frozen=True)
class FusedRow:
    """One module that runs a drop-in: where it is, its class before and after, and the implementation of each op.

    A module that is registered in several places has all its paths, separated by ", "; the model itself has "".
    """

    path: str
    was: str
    now: str
    kernels: str


@dataclass(frozen=True)
class LeftAloneRow:
    """One module that was recognised and not swapped, or that is called instead of read, and why."""

    path: str
    was: str
    reason: str


@dataclass(frozen=True)
class GraphRow:
    """One module whose runs are captured as CUDA graphs, and how that stands: how many shapes are, or why none is."""

    path: str
    status: str


@dataclass
class FuseReport:
    """What `fuse` did. `print(report)` shows it as a table.

    Attributes:
        fused: the modules that now run a drop-in.
        left_alone: those that do not, each with the reason.
        graphs: with `cuda_graphs`, the modules that are captured and replayed.
        options: level and fixes in force.
    """

    options: Options
    fused: list[FusedRow] = field(default_factory=list)
    left_alone: list[LeftAloneRow] = field(default_factory=list)
    graphs: list[GraphRow] = field(default_factory=list)

    def __str__(self) -> str:
        from rich.table import Column, Table

        sections = (
            (f"fused {len(self.fused)} modules ({self.options})", ("path", "was", "now", "kernels"), self.fused),
            ("left alone", ("path", "class", "reason"), self.left_alone),
            ("CUDA graphs", ("path", "status"), self.graphs),
        )
        tables: list[Table] = []
        for title, columns, rows in sections:
            if not rows and tables:
                continue
            table = Table(*(Column(name, overflow="fold") for name in columns), title=title)
            # A large model has hundreds of layers that differ in their number only.
            for path, said, number in alike((row.path, tuple(vars(row).values())[1:]) for row in rows):
                table.add_row(f"{path} ({number})" if number > 1 else path or ROOT, *said)
            tables.append(table)
        return as_text(*tables)


def fuse(
    model: nn.Module,
    *,
    level: int = 1,
    fixes: str | Iterable[str] = (),
    prepack: bool = False,
    cuda_graphs: bool = False,
    training: bool = False,
) -> FuseReport:
    """Let every module that mllm_fast knows run its drop-in, in place.

    Args:
        model: a model of a supported family, or a bare block or resampler of one, on any device and in any dtype, with
            PEFT, bitsandbytes, accelerate or hooks around its parts: a wrapped child is called and fused around.
        level: 0 uses the fused ops only; 1 also computes once what upstream repeats (exact up to rounding order); 2 is
            for folds that change rounding in half precision, of which there is none yet: it does what 1 does.
        fixes: names of upstream bugs to mend, one name, several, or "all"; by default they are reproduced. See
            `mllm_fast.families.FIXES`.
        prepack: for CPU inference, keep a second copy of the blocks' weights in oneDNN's blocked layout. A decode step
            then reads them at the memory's full speed; the blocks' weights take twice their memory. Training and GPUs
            do not use it.
        cuda_graphs: for GPU inference, capture the encoder side (vision encoder, resampler or Q-Former, projector) as a
            CUDA graph the second time a shape of its inputs is met, and replay it from then on. Up to
            `mllm_fast.modules.graphs.MAX_BUCKETS` shapes a module are kept, each with the memory of its intermediates.
        training: also swap what is for training alone: decoder layers through which something is trained keep the least
            for backward. Without a gradient they do what they did.

    Returns:
        A report of what was swapped and what was left alone. A model that is fused already is left as it is.

    Raises:
        NothingToFuseError: the model holds no module of a known class that could be fused.
        ValueError: an unknown level or fix, or a model that is fused with other options.
    """
    options = Options(_check_level(level), _check_fixes(fixes), prepack, cuda_graphs)
    _check_same_options(model, options)
    report = FuseReport(options)
    context = _existing_context(model) or MediaContext()
    for module, paths in _modules(model):
        if (state := state_of(module)) is not None:
            report.left_alone.append(LeftAloneRow(paths, _name(state.original_class), "already fused"))
            report.graphs += _graphs(module, paths)
            continue
        if isinstance(own := module.__dict__.get("_mllm_fast"), FusedState):
            reason = f"a module of mllm_fast itself, which runs its kernels without ({own.options})"
            report.left_alone.append(LeftAloneRow(paths, _name(type(module)), reason))
            continue
        entry = find(module)
        if entry is None or (entry.graphs == "only" and not cuda_graphs) or (entry.training and not training):
            continue
        was = _name(type(module))
        if level < entry.min_level:
            report.left_alone.append(LeftAloneRow(paths, was, f"swapped from level {entry.min_level} on"))
            continue
        try:
            _swap(module, entry, options, context)
        except CannotFuseError as reason:
            report.left_alone.append(LeftAloneRow(paths, was, str(reason)))
            continue
        report.fused.append(FusedRow(paths, was, type(module).__qualname__, _kernels(module, entry)))
        report.left_alone += _called_children(module, paths, entry)
        report.graphs += _graphs(module, paths)
    if not report.fused and not any(row.reason.startswith(("already", "a module")) for row in report.left_alone):
        reasons = "".join(
            f"\n  {row.path or ROOT}: {row.was} was left alone: {row.reason}" for row in report.left_alone
        )
        known = "".join(f"\n  {name}" for name in sorted(REGISTRY))
        raise NothingToFuseError(f"{_name(type(model))} holds nothing to fuse.{reasons}\nKnown classes:{known}")
    return report


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every module gets its own class back. Modules that were never fused are left as they are."""
    for module in model.modules():
        state = state_of(module)
        if state is None:
            continue
        module.__class__ = state.original_class
        if "old_forward" in state.extra:
            module.__dict__["_old_forward"] = state.extra["old_forward"]
        del module.__dict__["_mllm_fast"]


def _swap(module: nn.Module, entry: Entry, options: Options, context: MediaContext) -> None:
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise CannotFuseError("its forward was replaced on the instance")
    dropin: Any = entry.load()
    fused_class = dropin_class(module, dropin, entry)
    state: FusedState = dropin.fused_state(module, options, context)
    state.graphs = Graphs() if options.cuda_graphs and entry.graphs != "no" else None
    module.__dict__["_mllm_fast"] = state
    module.__class__ = fused_class
    if "_old_forward" in module.__dict__:
        # accelerate put a forward on the instance that moves data and then calls the one it found before.
        state.extra["old_forward"] = module.__dict__["_old_forward"]
        module.__dict__["_old_forward"] = types.MethodType(fused_class.forward, module)


def _modules(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every distinct module with its paths; one that is registered in several places has them all."""
    paths: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), (module, []))[1].append(path)
    return [(module, ", ".join(found)) for module, found in paths.values()]


def _existing_context(model: nn.Module) -> MediaContext | None:
    states = (state_of(module) for module in model.modules())
    return next((state.shared for state in states if state is not None and state.shared is not None), None)


def _check_same_options(model: nn.Module, options: Options) -> None:
    for path, module in model.named_modules():
        state = state_of(module)
        # One without a context (a quantised linear) stands for itself and does the same whatever the options.
        if state is not None and state.shared is not None and state.options != options:
            raise ValueError(
                f"{path or ROOT} is fused already, with {state.options}; got {options}. Call unfuse(model) first, or fuse "
                "with the same options"
            )


def _graphs(module: nn.Module, path: str) -> list[GraphRow]:
    """How the module's CUDA graphs stand, where it may have some."""
    state = state_of(module)
    if state is None or state.graphs is None:
        return []
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    refusal, graphs = state.shared.capture.refusal(device), state.graphs
    if refusal is not None:
        return [GraphRow(path, f"not captured: {refusal}")]
    if not graphs.captured:
        return [GraphRow(path, "to be captured the second time a shape is met")]
    latest = f"; the last call ran without: {graphs.skipped}" if graphs.skipped else ""
    return [GraphRow(path, f"{graphs.captured} shapes captured{latest}")]


def _kernels(module: nn.Module, entry: Entry) -> str:
    if not entry.ops:
        return "hands its fused parts what they share"
    parameter = next(module.parameters(), None)
    device, dtype = (torch.device("cpu"), None) if parameter is None else (parameter.device, parameter.dtype)
    return ", ".join(f"{op} [{_runs(op, device, dtype)}]" for op in entry.ops)


def _runs(op: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """The implementation of an op for parameters like these, and what there is to say about it."""
    implementation = runtime.explain(op, device.type)[0]
    if implementation != "triton" or device.type != "cuda":
        return implementation
    if dtype == torch.float64:
        return "torch, for fp64"
    note = runtime.op(op).note(device_architecture(device))
    return f"{implementation}; {note}" if note else implementation


def _called_children(module: nn.Module, path: str, entry: Entry) -> list[LeftAloneRow]:
    if not entry.ops or entry.training:  # which reads wrapped children, too
        return []
    rows: list[LeftAloneRow] = []
    wrapped: list[str] = []
    for name, child in module.named_modules():
        # An adapter's base layer is the layer that the adapter stands for.
        if any(name.startswith(f"{outer}.") for outer in wrapped) or name in ("", "base_layer"):
            continue
        linear = isinstance(child, nn.Linear) or hasattr(child, "base_layer")
        if (linear and not readable_linear(child)) or hooked(child):
            wrapped.append(name)
            why = "hooked" if hooked(child) else "wrapped or packed"
            rows.append(
                LeftAloneRow(f"{path}.{name}".lstrip("."), _name(type(child)), f"{why}: called, and fused around")
            )
    return rows


def _check_level(level: int) -> int:
    if level not in LEVELS:
        raise ValueError(f"unknown fuse level {level!r}; choose one of {', '.join(map(str, LEVELS))}")
    return level


def _check_fixes(fixes: str | Iterable[str]) -> frozenset[str]:
    if fixes == "all":
        return frozenset(FIXES)
    names = frozenset({fixes} if isinstance(fixes, str) else fixes)
    if unknown := names - FIXES.keys():
        listed = "".join(f"\n  {name}: {what}" for name, what in FIXES.items())
        raise ValueError(f"unknown fix {', '.join(sorted(map(repr, unknown)))}; choose 'all' or among:{listed}")
    return names


def _name(cls: type) -> str:
    return class_path(cls)

"""What `prepare_finetuning` made of a model: what is trained, what it costs, and what to save of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..models.original_checkpoint import CheckpointMismatchError, differences
from ..quantization import quantization_report
from ..quantization.selection import quantized_layers

Optimizer = Literal["adamw", "adamw8bit"]

# bitsandbytes' 8-bit states: two bytes a parameter, two fp32 scales a block; small tensors keep fp32 states.
_BLOCK, _SMALL = 256, 4096


@dataclass(frozen=True)
class PartRow:
    """One part of the model in a plan's table.

    Attributes:
        part: its name.
        parameters: how many it has; a quantised weight counts as the weight that it was.
        trained: whether they are trained.
        dtypes: of its parameters, the most bytes first.
        weights, gradients, optimizer: bytes.
        activations: bytes kept between forward and backward, as estimated; None: not asked for, or not known.
    """

    part: str
    parameters: int
    trained: bool
    dtypes: tuple[str, ...]
    weights: int
    gradients: int
    optimizer: int
    activations: int | None = None


@dataclass
class FinetuningPlan:
    """A model that is ready to be trained. `print(plan)` shows what that costs as a table.

    Attributes:
        model: the model that was prepared, in place.
        train: the parts, as they were asked for.
        rows: the model by parts; every parameter is counted in one of them.
        names: of the trained parameters, as in `model.named_parameters()`.
        compute_dtype: what the frozen language model computes in.
        optimizer: what the bytes of the optimiser are for.
    """

    model: nn.Module
    train: str
    rows: list[PartRow]
    names: tuple[str, ...] = field(repr=False)
    compute_dtype: torch.dtype
    optimizer: Optimizer = "adamw"

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, as the model has them now (sharding replaces them)."""
        wanted = set(self.names)
        return {name: p for name, p in self.model.named_parameters() if name in wanted}

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager[object]:
        """What forward passes run in: autocast to the language model's dtype where trained parameters are wider.

        Args:
            device_type: "cuda", "cpu", ...
        """
        wider = any(p.dtype.itemsize > self.compute_dtype.itemsize for p in self.trained.values())
        return torch.autocast(device_type, self.compute_dtype) if wider else contextlib.nullcontext()

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The trained parameters by name, detached, not copied."""
        return {name: p.detach() for name, p in self.trained.items()}

    @torch.no_grad()
    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Load what `trained_state_dict` gave, all of it or nothing.

        Raises:
            CheckpointMismatchError: tensors are missing, unexpected or of another shape; all are listed.
        """
        own = self.trained
        problems = differences(own, state)
        if problems:
            raise CheckpointMismatchError(
                f"these weights are not those of train={self.train!r} on this {type(self.model).__name__}:\n  "
                + "\n  ".join(problems)
            )
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def __str__(self) -> str:
        from rich.console import Console
        from rich.filesize import decimal
        from rich.table import Table

        console = Console(file=io.StringIO(), width=140, markup=False)
        trained = sum(row.parameters for row in self.rows if row.trained)
        total = sum(row.parameters for row in self.rows)
        estimated = any(row.activations is not None for row in self.rows)
        columns = ("weights", "gradients", "optimizer", *(["activations"] if estimated else []))
        table = Table(
            title=f"{type(self.model).__name__}, train={self.train!r}: {trained:,} of {total:,} parameters are trained"
        )
        for name in ("part", "trained", "dtype"):
            table.add_column(name, overflow="fold")
        for name in ("parameters", *(self._heading(name) for name in columns)):
            table.add_column(name, justify="right")
        for row in self.rows:
            sizes = [getattr(row, name) for name in columns]
            cells = ["?" if size is None else decimal(size) for size in sizes]
            table.add_row(
                row.part, "yes" if row.trained else "no", ", ".join(row.dtypes), f"{row.parameters:,}", *cells
            )
        sums = [sum(getattr(row, name) or 0 for row in self.rows) for name in columns]
        table.add_section()
        table.add_row("all", "", "", f"{total:,}", *map(decimal, sums))
        console.print(table)
        unknown = [row.part for row in self.rows if estimated and row.activations is None]
        left_out = "activations" if not estimated else f"those of {', '.join(unknown)}, which are not known"
        console.print(f"together {decimal(sum(sums))}" + (f", without {left_out}" if unknown or not estimated else ""))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def _heading(self, column: str) -> str:
        return f"optimiser ({self.optimizer})" if column == "optimizer" else column


def optimizer_bytes(parameters: Iterable[Tensor], optimizer: Optimizer) -> int:
    """Bytes of the two states of AdamW, in fp32 or by bitsandbytes in 8 bits."""
    total = 0
    for p in parameters:
        if optimizer == "adamw" or p.numel() < _SMALL:
            total += 8 * p.numel()
        else:
            total += 2 * p.numel() + 2 * 4 * -(-p.numel() // _BLOCK)
    return total


def part_rows(
    model: nn.Module,
    parts: Mapping[str, Iterable[nn.Module | nn.Parameter]],
    optimizer: Optimizer,
    activations: Mapping[str, int | None] | None = None,
) -> list[PartRow]:
    """The model's parameters by part; one that several parts share is counted in the first of them.

    Args:
        parts: modules and parameters by name; what is in none of them is "the rest".
        activations: estimated bytes by part; None where that is not known.
    """
    of: dict[int, str] = {}
    for part, members in parts.items():
        for member in members:
            for p in [member] if isinstance(member, nn.Parameter) else member.parameters():
                of.setdefault(id(p), part)
    quantized = {row.path: row for row in quantization_report(model).quantized}
    sizes = {
        id(layer.weight): (quantized[path].shape[0] * quantized[path].shape[1], quantized[path])
        for path, layer in quantized_layers(model).items()
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        groups.setdefault((of.get(id(p), "the rest"), p.requires_grad), []).append(p)
    rows = []
    order = [*parts, "the rest"]
    for (part, trained), members in sorted(groups.items(), key=lambda item: (not item[0][1], order.index(item[0][0]))):
        count, weights, dtypes = 0, 0, dict[str, int]()
        for p in members:
            numel, row = sizes.get(id(p), (p.numel(), None))
            size, dtype = (
                (p.numel() * p.element_size(), str(p.dtype).removeprefix("torch."))
                if row is None
                else (row.bytes_after, row.kind)
            )
            count, weights = count + numel, weights + size
            dtypes[dtype] = dtypes.get(dtype, 0) + size
        gradients = sum(p.numel() * p.element_size() for p in members) if trained else 0
        rows.append(
            PartRow(
                part,
                count,
                trained,
                tuple(sorted(dtypes, key=lambda name: -dtypes[name])),
                weights,
                gradients,
                optimizer_bytes(members, optimizer) if trained else 0,
                None if activations is None else activations.get(part, 0),
            )
        )
    return rows

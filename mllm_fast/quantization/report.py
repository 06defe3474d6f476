"""What was quantised of a model, and what it weighs: a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..tables import as_text, grouped, size
from .selection import Selection, quantized_layers


@dataclass(frozen=True)
class QuantizedRow:
    """One quantised layer: its paths (", " between them), kind ("nf4", "fp4", "int8"), shape [out, in] and bytes."""

    path: str
    kind: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int


@dataclass
class QuantizationReport:
    """What is quantised in a model. `print(report)` shows it as tables, layers of one kind in one row.

    Attributes:
        quantized: the quantised layers.
        left_alone: (path, reason) of the linear layers, or modules with such layers, that are not.
        bytes_before, bytes_after: of all parameters and buffers of the model, before (by the dtype that the weights had)
            and now, with the scales.
    """

    quantized: list[QuantizedRow] = field(default_factory=list)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        from rich.table import Table

        before, after = (sum(getattr(row, name) for row in self.quantized) for name in ("bytes_before", "bytes_after"))
        table = Table(
            title=f"quantised {len(self.quantized)} linear layers: {size(before)} -> {size(after)}; "
            f"the whole model: {size(self.bytes_before)} -> {size(self.bytes_after)}"
        )
        table.add_column("layers", overflow="fold")
        table.add_column("kind")
        for name in ("number", "out x in", "before", "after"):
            table.add_column(name, justify="right")
        for pattern, rows in grouped([(row.path, row) for row in self.quantized]).items():
            first = rows[0]
            shape = "various" if len({row.shape for row in rows}) > 1 else f"{first.shape[0]} x {first.shape[1]}"
            sizes = (size(sum(row.bytes_before for row in rows)), size(sum(row.bytes_after for row in rows)))
            table.add_row(pattern, ", ".join(sorted({row.kind for row in rows})), str(len(rows)), shape, *sizes)
        tables = [table]
        if self.left_alone:
            table = Table(title="left alone")
            table.add_column("path", overflow="fold")
            table.add_column("reason", overflow="fold")
            for pattern, reasons in grouped(self.left_alone).items():
                table.add_row(pattern, "; ".join(dict.fromkeys(reasons)))
            tables.append(table)
        return as_text(*tables)


def quantization_report(model: nn.Module, selection: Selection | None = None) -> QuantizationReport:
    """What is quantised in `model`, however it came to be.

    Args:
        model: its quantised layers are bitsandbytes', or drop-ins for them.
        selection: what was to be quantised, for the reasons why the rest was not.
    """
    report = QuantizationReport(bytes_after=_bytes(_tensors(model)))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    for path, layer in quantized_layers(model).items():
        state = getattr(layer.weight, "quant_state", None)
        was = dtype if state is None else state.dtype
        kind = "int8" if state is None else state.quant_type
        shape = (layer.out_features, layer.in_features)
        before = shape[0] * shape[1] * was.itemsize
        after = _bytes([layer.weight, *_statistics(layer)])
        report.quantized.append(QuantizedRow(path, kind, shape, before, after))
    report.bytes_before = report.bytes_after + sum(row.bytes_before - row.bytes_after for row in report.quantized)
    if selection is not None:
        report.left_alone = [*selection.left, *((path, "outside the language model") for path in selection.outside)]
    return report


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for layer in quantized_layers(model).values():
        yield from _statistics(layer)


def _statistics(layer: Any) -> list[Tensor]:
    """The tensors beside the packed weight that a quantised layer cannot do without."""
    weight: Any = layer.weight
    if (state := getattr(weight, "quant_state", None)) is None:
        owner: Any = layer.state
        scales = owner.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        return [] if scales is None else [scales]
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

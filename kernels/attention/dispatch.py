"""Who runs an attention call on a GPU: our kernels, or a library that was measured to be faster for calls of its class.

`measured.json` holds what was measured: `python -m bench --record FILE` writes it from a benchmark's results, for the
architecture that they come from. A library takes a class of calls where its time is at most `FASTER` times ours; on an
architecture or for a class without a record, our kernels run. What only they can do, they always do: masks that depend
on the row, kv_index, dropout (whose pattern is a function of the seed), and gradients where torch's deterministic
algorithms are asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..launch import device_architecture
from ..runtime import Detail
from .masks import Mask

Library = Literal["sdpa", "xformers"]
LIBRARIES: tuple[Library, ...] = ("sdpa", "xformers")
FASTER = 0.98
FILE = Path(__file__).with_name("measured.json")
FORMAT = 1

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# Exact fp32 products on tensor cores keep a row of q in registers twice: wider rows spill.
MAX_HEAD_DIM_FP32 = 128

# The edges of the classes; from the last one on, a size counts as 0.
QUERIES = (16, 128)
KEYS = (512,)
HEAD_DIMS = (64, 128, 256)
ROWS = (32, 256)


def unsupported(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why our kernels cannot serve calls of this kind, or None where they can."""
    if dtype not in DTYPES:
        return f"the Triton kernels of attention take fp32, bf16 and fp16, not {dtype}"
    most = MAX_HEAD_DIM_FP32 if dtype == torch.float32 else MAX_HEAD_DIM
    if head_dim > most:
        return f"the Triton kernels of attention take head dimensions up to {most} in {dtype}, not {head_dim}"
    return None


@dataclass(frozen=True)
class ShapeClass:
    """Calls that are taken to have one winner: each size is that of the nearest edge above it, or 0 beyond the last.

    Attributes:
        training: gradients are wanted; forward and backward are measured together.
        padded: some keys are hidden, the same ones from all queries of a batch row.
        sources: 1 or 2 key sources.
        grouped: query heads share key heads.
        bits: of an element, 16 or 32.
        queries, keys: lengths; those of both sources.
        head_dim: of an attention head.
        rows: batch rows times query heads.
    """

    training: bool
    padded: bool
    sources: int
    grouped: bool
    bits: int
    queries: int
    keys: int
    head_dim: int
    rows: int

    def __str__(self) -> str:
        def size(value: int, edges: tuple[int, ...], what: str) -> str:
            return f"{what} <= {value}" if value else f"{what} > {edges[-1]}"

        parts = [
            f"{self.bits} bit",
            "training" if self.training else "inference",
            size(self.queries, QUERIES, "queries"),
            size(self.keys, KEYS, "keys"),
            size(self.head_dim, HEAD_DIMS, "head_dim"),
            size(self.rows, ROWS, "batch x heads"),
        ]
        parts += ["grouped heads"] * self.grouped + ["two key sources"] * (self.sources == 2) + ["padded"] * self.padded
        return ", ".join(parts)


def class_of(
    *,
    training: bool,
    padded: bool,
    itemsize: int,
    batch: int,
    queries: int,
    keys: int,
    extra_keys: int,
    heads: int,
    key_heads: int,
    head_dim: int,
) -> tuple[bool, bool, int, bool, int, int, int, int, int]:
    """The class of a call with these sizes, as what `ShapeClass` is made from."""
    return (
        training,
        padded,
        1 if extra_keys == 0 else 2,
        heads != key_heads,
        8 * itemsize,
        _edge(queries, QUERIES),
        _edge(keys + extra_keys, KEYS),
        _edge(head_dim, HEAD_DIMS),
        _edge(batch * heads, ROWS),
    )


def _edge(size: int, edges: tuple[int, ...]) -> int:
    for edge in edges:
        if size <= edge:
            return edge
    return 0


@dataclass(frozen=True)
class Record:
    """What was measured for one class of calls on one architecture.

    Attributes:
        architecture: as `device_architecture` writes it ("sm_90").
        shape: the class.
        ratios: library -> its time as a multiple of ours.
        workloads: the benchmarks that were measured; with several, the ratios are geometric means.
        source: the result file, GPU and versions.
    """

    architecture: str
    shape: ShapeClass
    ratios: Mapping[str, float]
    workloads: tuple[str, ...]
    source: str

    def winner(self, libraries: Iterable[str] = LIBRARIES) -> Library | None:
        """The fastest of these libraries, or None where our kernels are at least nearly as fast."""
        known = [name for name in LIBRARIES if name in libraries and name in self.ratios]
        best = min(known, key=lambda name: self.ratios[name], default=None)
        return best if best is not None and self.ratios[best] <= FASTER else None

    def as_json(self) -> dict[str, Any]:
        """What `measured.json` holds of it."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Record:
        """The reverse of `as_json`."""
        shape = ShapeClass(**{field.name: data["shape"][field.name] for field in fields(ShapeClass)})
        return Record(data["architecture"], shape, dict(data["ratios"]), tuple(data["workloads"]), data["source"])


@functools.cache
def records() -> tuple[Record, ...]:
    """All records of this installation."""
    if not FILE.exists():
        return ()
    data = json.loads(FILE.read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise ValueError(
            f"{FILE} has format {data.get('format')}, expected {FORMAT}; write it anew: python -m bench --record"
        )
    return tuple(Record.from_json(record) for record in data["records"])


def write(new: Iterable[Record], file: Path = FILE) -> tuple[Record, ...]:
    """Replace the records of the architectures that `new` has by `new`; returns what the file then holds."""
    new = tuple(new)
    replaced = {record.architecture for record in new}
    records.cache_clear()
    kept = [record for record in records() if record.architecture not in replaced] if file == FILE else []
    both = sorted((*kept, *new), key=lambda record: (record.architecture, str(record.shape)))
    data = {"format": FORMAT, "records": [record.as_json() for record in both]}
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    records.cache_clear()
    _table.cache_clear()
    return tuple(both)


@functools.cache
def _table(architecture: str) -> dict[ShapeClass, Record]:
    return {record.shape: record for record in records() if record.architecture == architecture}


@functools.cache
def architecture_of(index: int | None) -> str:
    """The architecture of a GPU of this machine."""
    return device_architecture(index)


def _measured(index: int | None) -> bool:
    """Whether anything was measured on such a GPU."""
    return bool(_table(architecture_of(index)))


# A tracer takes it as a constant; records do not change while a program runs.
_measured._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _winner(index: int | None, libraries: tuple[Library, ...], *shape: Any) -> Library | None:
    record = _table(architecture_of(index)).get(ShapeClass(*shape))
    return None if record is None else record.winner(libraries)


_winner._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def has_xformers() -> bool:
    """Whether xformers is installed."""
    return importlib.util.find_spec("xformers") is not None


def library_for(
    given: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    mask: Mask | None,
    kv_index: Tensor | None,
    dropout_p: float,
) -> Library | None:
    """Which library runs this call on a GPU, or None for our kernels; `given` are q, k, v, extra_k and extra_v, checked."""
    q, k, _, extra_k, _ = given
    if not _measured(q.device.index) or kv_index is not None or dropout_p > 0.0:
        return None
    padded = False
    if mask is not None:
        if mask.causal or mask.media is not None:
            return None
        padded = mask.key_lengths is not None or mask.key_padding is not None
    batch, queries, heads, head_dim = q.shape
    key_rows, keys, key_heads, _ = k.shape
    extra_rows, extra_keys = (0, 0) if extra_k is None else extra_k.shape[:2]
    # Batch rows that share keys become queries of one row; then they cannot differ in what they see besides.
    if batch != key_rows and (padded or extra_rows not in (0, 1, key_rows)):
        return None
    if head_dim % 8 or min(batch, queries, keys) == 0:
        return None
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if training and torch.are_deterministic_algorithms_enabled():
        return None
    shape = class_of(
        training=training,
        padded=padded,
        itemsize=q.element_size(),
        batch=batch,
        queries=queries,
        keys=keys,
        extra_keys=extra_keys,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
    )
    return _winner(q.device.index, _libraries(q.dtype, padded), *shape)


def _libraries(dtype: torch.dtype, padded: bool) -> tuple[Library, ...]:
    # xformers' kernels are for 16 bits, take a mask only in full size, and are opaque to a tracer.
    if dtype == torch.float32 or padded or torch.compiler.is_compiling() or not has_xformers():
        return ("sdpa",)
    return LIBRARIES


def details(architecture: str) -> list[Detail]:
    """Who runs which calls on a GPU of that architecture."""
    found = []
    for record in _table(architecture).values():
        winner = record.winner()
        times = ", ".join(f"{name} takes {ratio:.2f}x our time" for name, ratio in record.ratios.items())
        reason = f"{times or 'no library serves it'} ({', '.join(record.workloads)}; {record.source})"
        if winner == "xformers" and not has_xformers():
            reason += "; xformers is not installed"
            winner = record.winner(("sdpa",))
        found.append(Detail(str(record.shape), winner or "triton", reason))
    rest = "such calls were not measured" if found else f"not measured on this GPU ({architecture})"
    found.append(Detail("all other calls" if found else "all calls", "triton", rest))
    most = f"head_dim > {MAX_HEAD_DIM}, or > {MAX_HEAD_DIM_FP32} in fp32"
    found.append(Detail(f"fp64; {most}", "torch", "the Triton kernels do not serve them"))
    return found


def note(architecture: str) -> str:
    """The same in a few words."""
    table = _table(architecture)
    if not table:
        return f"not measured on {architecture}"
    winners = sorted({record.winner() or "" for record in table.values()} - {""})
    return f"{' and '.join(winners)} for some shapes" if winners else ""

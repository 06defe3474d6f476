"""Every configuration in which the linear kernels may be launched, for the audit: the launchers on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..launch import Architecture, Variant, recording
from . import configs, triton_backward, triton_launch
from .call import Extras, Group, Numbers, flatten, kept, unflatten

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call of a linear op: sizes from the models that make it, forward and backward.

    Attributes:
        label: for people.
        rows: of each group, as many as there are groups with weights of their own.
        features, width: N and K.
        norm, rnorm: of x and of the residual: "", "layer_norm" or "rms_norm".
        activation: or "".
        gate: 0, 1 or N elements, with a residual.
        residual, bias, masked, dropout: whether the call has them.
        head: size of the heads that are normalised, or 0.
        mixed: x and residual are fp32 beside 16-bit weights, as under autocast.
        plan: instead of the chosen one.
        training: the backward too.
    """

    label: str
    rows: tuple[int, ...]
    features: int
    width: int
    norm: str = ""
    rnorm: str = ""
    activation: str = ""
    gate: int = 0
    residual: bool = False
    bias: bool = True
    masked: bool = False
    dropout: float = 0.0
    head: int = 0
    mixed: bool = False
    plan: str | None = "fused"
    training: bool = False


LN, RMS = "layer_norm", "rms_norm"
# Each tile of the configurations once, by rows and features, with what takes most registers: norm and GLU; and without.
TILES = tuple(
    case
    for rows, features in (
        (1, 2048), (1, 8192), (12, 2048), (12, 8192), (32, 768), (32, 2304), (32, 9216),
        (64, 2048), (128, 2048), (256, 768), (512, 3072), (2048, 3072),
    )
    for case in (
        Case(f"{rows} x {features}, norm", (rows,), features, 2048, LN, activation="gelu"),
        Case(f"{rows} x {features}, GLU", (rows,), features, 4096, RMS, activation="swiglu", bias=False),
        Case(f"{rows} x {features}, residual", (rows,), features, 3072, residual=True, rnorm=LN, dropout=0.1),
    )
)  # fmt: skip
# And what the calls of the models have.
FEATURES = (
    Case("Flamingo 3B, query", (1,), 512, 2048, LN, bias=False),
    Case("Flamingo 3B, attention out", (1,), 2048, 512, gate=1, residual=True, masked=True, bias=False),
    Case("Flamingo 9B, up", (1,), 16384, 4096, LN, activation="gelu", bias=False),
    Case("Flamingo 9B, down", (1,), 4096, 16384, gate=1, residual=True, bias=False),
    Case("Flamingo 3B, up, training", (256,), 8192, 2048, LN, activation="gelu", bias=False, training=True),
    Case(
        "Flamingo 3B, out, training", (256,), 2048, 512, gate=1, residual=True, masked=True, bias=False, training=True
    ),
    Case("idefics, query", (1,), 4096, 4096, RMS, head=128, bias=False),
    Case("idefics, query, prefill", (352,), 4096, 4096, RMS, head=128, bias=False, training=True),
    Case("idefics, heads of 96", (64,), 1536, 1280, LN, head=96, bias=False),
    Case("heads of 80", (3,), 1280, 1280, head=80),
    Case("heads of 64", (300,), 1024, 1024, head=64),
    Case("heads of 256", (20,), 2048, 2048, RMS, head=256),
    Case("idefics, GLU", (1,), 11008, 4096, RMS, activation="swiglu", bias=False),
    Case("idefics, GLU, training", (352,), 11008, 4096, RMS, activation="swiglu", bias=False, training=True),
    Case("idefics, down", (352,), 4096, 11008, gate=4096, residual=True, training=True),
    Case("Q-Former, qkv", (32,), 2304, 768, LN),
    Case("Q-Former, out", (32,), 768, 768, rnorm=LN, residual=True),
    Case("Q-Former, up", (32,), 3072, 768, LN, activation="gelu"),
    Case("Q-Former, down", (32,), 768, 3072, rnorm=LN, residual=True),
    Case("Q-Former, groups, up", (32, 16), 3072, 768, LN, activation="gelu"),
    Case("Q-Former, groups, down", (32, 16), 768, 3072, rnorm=LN, residual=True),
    Case("Q-Former, groups, up, training", (1024, 512), 3072, 768, LN, activation="gelu", training=True),
    Case(
        "Q-Former, groups, down, training", (1024, 512), 768, 3072, rnorm=LN, residual=True, dropout=0.1, training=True
    ),
    Case("Q-Former, image K/V", (257,), 9216, 1408),
    Case("resampler, image K/V", (256,), 6144, 1024, LN),
    Case("autocast, norm", (256,), 3072, 768, LN, activation="quick_gelu", mixed=True),
    Case("autocast, one row", (1,), 8192, 2048, LN, activation="gelu", mixed=True),
    Case("autocast, residual", (64,), 768, 3072, residual=True, dropout=0.1, mixed=True, training=True),
    Case("vendor, activation", (2048,), 8192, 2048, LN, activation="gelu_tanh", plan="vendor"),
    Case("vendor, GLU", (2048,), 11008, 4096, RMS, activation="geglu", plan="vendor", bias=False, training=True),
    Case("vendor, residual", (2048,), 2048, 8192, rnorm=LN, residual=True, gate=2048, masked=True, plan="vendor"),
    Case("vendor, heads", (2048,), 4096, 4096, RMS, head=128, plan="vendor"),
    Case("norm apart", (2048,), 3072, 768, LN, activation="squared_relu", plan="norm apart"),
    Case("odd sizes", (37,), 1000, 1000, LN, activation="silu", residual=False),
)
# fp16 compiles as bf16 does, to other instructions of the same cost; fp32 has tiles of its own.
FULL = tuple(case for case in TILES if case.rows[0] in (1, 12, 32, 128, 512))
FULL += tuple(
    case for case in FEATURES if 0 < case.head <= configs.MAX_HEAD_FP32 or case.label == "Q-Former, groups, up"
)
GROUPS = ((BF16, TILES + FEATURES), (FP16, FEATURES[:2]), (FP32, FULL))


def variants(architecture: Architecture) -> Iterator[Variant]:
    """All launches of all cases."""
    # fp32 is compiled for torch's default precision of matrix products, which needs the most registers.
    for dtype, cases in GROUPS:
        for case in cases:
            with recording(architecture) as launches:
                _call(case, dtype)
            name = str(dtype).removeprefix("torch.")
            for launch in launches:
                if launch.kernel.fn.__module__.startswith(__package__ or ""):
                    yield _labelled(launch, f"{name}, {case.label}")


def _labelled(launch: Variant, label: str) -> Variant:
    c = launch.constexprs
    if "BK" not in c:
        return replace(launch, label=label)
    slices = f"x{c['SLICES']}" if c["SLICES"] > 1 else ""
    label = f"{label}, {c['BM']}x{c['BN']}x{c['BK']}{slices}"
    return replace(launch, label=label, elements=c["BM"] * c["BN"] * c["BK"] * c["SLICES"])


def _call(case: Case, dtype: torch.dtype) -> None:
    wide = FP32 if case.mixed else dtype

    def empty(needed: object, *shape: int, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device="meta") if needed else None

    def group(rows: int) -> Group:
        parts = (
            empty(True, 1, rows, case.width, dtype=wide), empty(True, case.features, case.width),
            empty(case.bias, case.features), empty(case.norm, case.width), empty(case.norm == LN, case.width),
            empty(case.residual, 1, rows, case.features, dtype=wide),
            empty(case.rnorm, case.features), empty(case.rnorm == LN, case.features),
        )  # fmt: skip
        return Group(*parts)  # type: ignore[arg-type]

    groups = tuple(map(group, case.rows))
    rows = case.rows[0]
    extras = Extras(
        empty(case.activation in ("swiglu", "geglu"), case.features, case.width),
        None,
        empty(case.head, case.head),
        empty(case.gate, case.gate),
        empty(case.masked, 1, rows, dtype=torch.bool),
    )
    eps = (1e-5,) * len(groups)
    numbers = Numbers(case.norm, eps, case.rnorm, eps, case.activation, 1e-5, case.dropout, 1 << 40)
    out, saved = triton_launch.forward(
        groups, extras, numbers, saving=case.training, saving_branch=case.training, plan=case.plan
    )
    if case.training:
        flat = flatten(groups, extras)
        needs = [t is not None and t.is_floating_point() for t in flat]
        call = kept(groups, extras, numbers, needs)
        inners = [group.x.shape[-2] for group in groups]
        triton_backward.backward(torch.empty_like(out), inners, *unflatten(call), numbers, saved, needs)

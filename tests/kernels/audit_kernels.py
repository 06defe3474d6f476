"""Small kernels, good and bad, that the tests of the audit compile. Nothing here needs a GPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
import triton
import triton.language as tl

from mllm_fast.kernels import audit
from mllm_fast.kernels.launch import Architecture, Variant, recording


@triton.jit
def product_kernel(
    A, B, C, rows, columns, depth, SCALE, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    b_c = tl.zeros((BM, BN), tl.float32)
    for k in range(0, depth, BK):
        b_a = tl.load(A + o_m[:, None] * depth + (k + o_k)[None, :])
        b_b = tl.load(B + o_n[:, None] * depth + (k + o_k)[None, :])
        b_c = tl.dot(b_a, tl.trans(b_b), b_c, input_precision=PRECISION)
    if SCALE is not None:
        b_c *= tl.load(SCALE)
    tl.store(C + o_m[:, None] * columns + o_n[None, :], b_c)


@triton.jit
def double_kernel(X, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + o, 2 * tl.load(X + o, o < n), o < n)


@triton.jit
def broken_kernel(X, BLOCK: tl.constexpr):
    tl.store(X + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


@triton.jit
def crashing_kernel(X, STOP: tl.constexpr):
    tl.store(X, STOP())


@tl.core.builtin
def stop(_semantic=None):
    """As a compiler that aborts."""
    os._exit(1)


def launch_product(a: torch.Tensor, b: torch.Tensor, *, tile: tuple[int, int, int], precision: str, **options: int):
    """a [M, K] b [N, K]^T as a launcher of an op would call it."""
    c = torch.empty(a.shape[0], b.shape[0], device=a.device)
    BM, BN, BK = tile
    grid = (triton.cdiv(a.shape[0], BM), triton.cdiv(b.shape[0], BN))
    product_kernel[grid](a, b, c, *c.shape, a.shape[1], None, BM, BN, BK, PRECISION=precision, **options)


def product_variants(architecture: Architecture) -> Iterator[Variant]:
    half, full = torch.float16, torch.float32
    for label, dtype, precision, tile, options in (
        ("good", half, "ieee", (128, 128, 64), {"num_warps": 8, "num_stages": 3}),
        ("few rows", half, "ieee", (16, 64, 64), {"num_warps": 4, "num_stages": 2}),
        ("good again", half, "ieee", (128, 128, 64), {"num_warps": 8, "num_stages": 3}),
        ("tf32", full, "tf32", (64, 64, 32), {"num_warps": 4, "num_stages": 2}),
        ("exact", full, "ieee", (32, 32, 32), {"num_warps": 4, "num_stages": 2}),
        ("exact, meant so", full, "ieee", (32, 64, 32), {"num_warps": 4, "num_stages": 2}),
        ("much shared", half, "ieee", (128, 128, 64), {"num_warps": 8, "num_stages": 9}),
        ("few registers", half, "ieee", (64, 128, 32), {"num_warps": 1, "num_stages": 2}),
    ):
        with recording(architecture) as launches:
            a, b = (torch.empty(512, 256, dtype=dtype, device="meta") for _ in "ab")
            launch_product(a, b, tile=tile, precision=precision, **options)
        (launch,) = launches
        reason = "the result must not depend on tensor cores" if "meant" in label else ""
        yield replace(launch, label=label, elements=tile[0] * tile[1] * tile[2], scalar_dots=reason)


def other_variants(architecture: Architecture) -> Iterator[Variant]:
    yield Variant(double_kernel, {"X": "*fp32", "n": "i32"}, {"BLOCK": 1024}, {"num_warps": 4}, label="by hand")
    yield Variant(double_kernel, {"X": "*fp32"}, {"BLOCK": 1024}, {"num_warps": 4}, label="lacks n")
    yield Variant(broken_kernel, {"X": "*i32"}, {"BLOCK": 64}, {"num_warps": 4})
    yield Variant(crashing_kernel, {"X": "*i32"}, {"STOP": stop}, {"num_warps": 4})


def described_launches() -> list[dict[str, object]]:
    """What `recording` sees of launches with strided, unaligned and missing arguments."""
    with recording(audit.ARCHITECTURES["sm_90"]) as launches:
        x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
        launch_product(x, x, tile=(16, 16, 16), precision="tf32", num_warps=2)
        double_kernel[(1,)](x, 1, BLOCK=64)
        double_kernel[(1,)](x, 1 << 40, BLOCK=64)
    return [
        {
            "kernel": launch.kernel.fn.__name__,
            "signature": dict(launch.signature),
            "constexprs": dict(launch.constexprs),
            "warps": launch.options["num_warps"],
            "aligned": sorted(name for name, given in (launch.attributes or {}).items() if given),
        }
        for launch in launches
    ]


if __name__ == "__main__":
    todo = audit.jobs({"product": product_variants, "other": other_variants}, sys.argv[1:])
    rows = [asdict(row) for row in audit.run(todo)]
    print(json.dumps({"rows": rows, "launches": described_launches()}))  # noqa: T201

"""Launch configurations of the quantised kernels: a function of architecture, sizes and dtype, never autotuned.

They were chosen from compile-time resources: nothing spills, everything fits into shared memory, and the instructions per
element of W, which bound these kernels before memory does on large GPUs, are few. On sm_90 and sm_80 nothing spills with
Triton 3.6 and 3.7, elsewhere with 3.7. None has been timed yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..target import PROCESSORS, Arch

# Rows of x up to which the forward kernel decodes W on the fly: every further tile of rows decodes it again, until
# dequantising once, into a workspace, and the vendor's GEMM cost less.
MAX_ROWS = 1024
# Elements of W in that workspace, which torch's allocator hands out again for the next layer.
WORKSPACE = 1 << 26
MAX_SPLITS = 8
# Steps that a program should have at least: its pipeline fills in the first few.
LEAST_STEPS = 8


@dataclass(frozen=True)
class Config:
    """One launch: tiles of BM rows of x, and BN rows and BK columns of W; and what Triton is told.

    Attributes:
        scale_weight: W is multiplied with its scales; else what the kernel has fewer of (the forward's products, or the
            rows of dY).
        flipped: gradient only: W is the left operand.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    scale_weight: bool = False
    flipped: bool = False

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch that are not the kernel's own."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.lru_cache(maxsize=4096)
def product_config(arch: Arch, rows: int, bits: int, block: int, itemsize: int, term: bool) -> Config:
    """For `product_tiles`.

    Args:
        arch: what it runs on.
        rows: of x.
        bits: of W, 4 or 8.
        block: elements of W that share a scale, for 4 bits.
        itemsize: bytes of an element of x.
        term: whether a low-rank term is added, which takes registers.
    """
    BK = (64 if block % 64 == 0 else 32) if bits == 4 else 128
    if itemsize == 4:
        return Config(16 if rows <= 16 else 32, 64, min(BK, 64), 4, 2)
    few = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if arch == "gfx942":
        return Config(few, 64, BK, 4, 2) if rows <= 64 else Config(128, 64, min(BK, 64), 4, 2, scale_weight=True)
    if bits == 8:
        return Config(few, 64, BK, 4, 4) if rows <= 64 else Config(128, 128, 64, 8, 3)
    if rows <= 32:
        return Config(few, 128, BK, 4, 4)
    if rows <= 64:
        return Config(64, 128 if arch == "sm_90" else 64, BK, 4, 3)
    # With four warps two programs fit a multiprocessor, and one decodes while the other multiplies.
    return Config(128, 128, BK, 4 if arch == "sm_90" and not term else 8, 3, scale_weight=True)


@functools.lru_cache(maxsize=4096)
def gradient_config(arch: Arch, rows: int, bits: int, block: int, half: bool, itemsize: int, dropped: bool) -> Config:
    """For `gradient_tiles`.

    Args:
        arch, rows, bits, block, itemsize: as for `product_config`.
        half: fp16, where dY times the scales might underflow.
        dropped: whether a low-rank term with dropout is added, whose random numbers take registers.
    """
    flipped = rows <= 32 and arch != "gfx942"
    # On gfx942, which has no bf16 arithmetic, scaling dY takes 51 instructions an element, and scaling W takes 17.
    fold = flipped and bits == 4 and not half and block % 64 == 0
    BK = 64
    if itemsize == 4:
        return Config(16 if rows <= 16 else 32, 32, BK, 4, 2, not fold, flipped)
    few = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if rows <= 64:
        BN = 128 if few == 16 and arch != "gfx942" else 64
        return Config(few, BN, BK, 4, 3 if arch != "gfx942" else 2, not fold, flipped)
    if arch == "sm_90":
        BN, BK, stages = (128, 64, 2) if dropped else (64, 128, 3)
        return Config(128, BN, BK, 8, stages, scale_weight=True)
    return Config(64, 64, 64, 4, 3 if arch == "sm_80" else 2, scale_weight=True)


def splits_for(arch: Arch, tiles: int, steps: int) -> int:
    """Into how many parts a sum is split so that few tiles fill the device; a power of two.

    Args:
        arch: what it runs on.
        tiles: how many programs there are without splits.
        steps: how many iterations such a program has.
    """
    wanted = -(-2 * PROCESSORS[arch] // max(tiles, 1))
    most = min(MAX_SPLITS, wanted, steps // LEAST_STEPS)
    return 1 << (most.bit_length() - 1) if most > 1 else 1

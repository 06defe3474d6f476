"""Launch configurations of the linear kernels: a function of architecture, sizes and dtype, never autotuned.

Chosen from compile-time resources (nothing spills and everything fits into shared memory on each architecture, which the
audit checks by compiling them all) and from a roofline; not measured yet, as are the shares of it that `_TILES` and `plan`
assume. On sm_90 nothing spills with Triton 3.6 and 3.7, elsewhere with 3.7.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ..sizes import cdiv, next_power_of_2
from ..target import PROCESSORS, Arch


class Problem(NamedTuple):
    """What a configuration depends on.

    Attributes:
        rows: M of x [M, K], of each group of rows with a weight of its own.
        features, width: N and K of W [N, K].
        itemsize, itemsize_x: bytes of an element of W, and of x, which is wider where a norm rounds it on the way.
        normed: x is normalised first.
        bent: something follows the product that the vendor's GEMM cannot do.
        glu: two weights, two sums.
        head: the size of heads that are normalised, or 0.
    """

    rows: tuple[int, ...]
    features: int
    width: int
    itemsize: int = 2
    itemsize_x: int = 2
    normed: bool = False
    bent: bool = False
    glu: bool = False
    head: int = 0


@dataclass(frozen=True)
class Config:
    """One launch: tiles of BM rows, BN features, SLICES * BK of K; K in SPLITS parts; and what Triton is told.

    `registers` (NVIDIA): how many the assembler may give a thread. Left alone, it spills a few bytes for the sake of one
    more resident block.
    """

    BM: int
    BN: int
    BK: int
    SLICES: int = 1
    num_warps: int = 4
    num_stages: int = 2
    SPLITS: int = 1
    registers: int | None = None

    @property
    def step(self) -> int:
        """How much of K an iteration takes."""
        return self.BK * self.SLICES

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch that are not the kernel's own."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


# Tiles, and the share of the device's arithmetic that a full device gets out of them: larger ones read less. With
# SLICES > 1 the warps of a block share out K, so that few rows and few features keep them busy, and W is streamed: there
# the share tells how well.
_TILES = (
    (1.0, Config(128, 128, 64, num_warps=8)),
    (0.85, Config(128, 64, 64, num_warps=8)),
    (0.7, Config(64, 64, 64)),
    (0.5, Config(64, 32, 64)),
    (0.35, Config(32, 32, 64, SLICES=4)),
    (0.25, Config(32, 16, 64, SLICES=4)),
    (0.23, Config(16, 32, 64, SLICES=4)),
    (0.18, Config(16, 16, 128, SLICES=4)),
    (0.15, Config(8, 32, 64, SLICES=4)),
    (0.12, Config(8, 16, 128, SLICES=4)),
)
_TILES_FP32 = (
    (0.7, Config(64, 64, 32)),
    (0.5, Config(64, 32, 32)),
    (0.3, Config(32, 32, 32, SLICES=4)),
    (0.2, Config(16, 32, 32, SLICES=4)),
    (0.18, Config(16, 16, 64, SLICES=4)),
    (0.12, Config(8, 16, 64, SLICES=4)),
)
# Sums that a thread can keep in registers beside what its tile of x and, in fp32, the parts of a product need.
MAX_SUMS = 64
# Wider heads, whose sums do not fit either, are normalised by an op of their own.
MAX_HEAD, MAX_HEAD_FP32 = 256, 128
MAX_STAGES = 4
# Bytes of shared memory for the tiles under way. sm_80 stands for sm_86 and sm_89 too, which have 99 KB. On sm_90 small
# blocks leave room for a second one.
_SHARED: dict[Arch, int] = {"sm_80": 88 << 10, "sm_90": 176 << 10, "gfx942": 60 << 10}
_SHARED_SMALL: dict[Arch, int] = _SHARED | {"sm_90": 112 << 10}
# A part of K is worth a program of its own and a second pass if it has so many bytes of W.
SPLIT_BYTES = 1 << 18
MAX_SPLITS = 8
# A program that has a whole head streams so much of W that one in so many processors draws near the memory's speed alone,
# and the second pass would be a launch of its own: a query projection of 32 heads stays one launch.
HEAD_SHARE = 5


@functools.lru_cache(maxsize=4096)
def config_for(arch: Arch, problem: Problem) -> Config:
    """The configuration of `linear_tiles` and `grouped_tiles`: of all tiles that by which the device gets most done."""
    p = problem
    # AMD's smallest matrix instruction has 16 rows and 16 columns.
    least = 16 if arch == "gfx942" else 8
    most = max(least, *(next_power_of_2(rows) for rows in p.rows))
    best, chosen, programs = -1.0, None, 0
    for share, config in _tiles(p):
        lanes = 64 if arch == "gfx942" else 32
        sums = config.BM * config.BN * config.SLICES * (2 if p.glu else 1) // (lanes * config.num_warps)
        if not least <= config.BM <= most or sums > MAX_SUMS // (p.itemsize // 2):
            continue
        tiles = sum(cdiv(rows, config.BM) for rows in p.rows)
        number = tiles * column_tiles(p.features, config.BN, p.head)
        waves = number / PROCESSORS[arch]
        busy = waves / max(1, math.ceil(waves))
        filled = sum(p.rows) / (tiles * config.BM)
        if share * busy * filled > best:
            best, chosen, programs = share * busy * filled, config, number
    assert chosen is not None
    return _fit(arch, p, replace(chosen, SPLITS=_splits(arch, p, chosen, programs)))


def column_tiles(features: int, BN: int, head: int) -> int:
    """How many tiles of BN columns there are; heads that do not fill a tile have one each."""
    return cdiv(features, head if head and BN % head else BN)


def _tiles(p: Problem) -> tuple[tuple[float, Config], ...]:
    if not p.head:
        return _TILES if p.itemsize == 2 else _TILES_FP32
    # Whole heads, of which one may be wider than the tile of features that the rows would ask for.
    BN = max(next_power_of_2(p.head), 64 if 64 % p.head == 0 else 16)
    BK = (32 if BN >= 128 else 64) * 2 // p.itemsize
    warps = 4 if BN <= 64 else 8
    return (
        (1.0, Config(64, BN, BK, num_warps=warps)),
        (0.4, Config(16, BN, BK, SLICES=4, num_warps=warps)),
        (0.3, Config(8, BN, BK, SLICES=4, num_warps=warps)),
    )


def _splits(arch: Arch, p: Problem, config: Config, programs: int) -> int:
    """Into how many parts K is split so that few programs fill the device; a power of two."""
    if len(p.rows) > 1 or config.SLICES == 1 or (p.head and programs * HEAD_SHARE >= PROCESSORS[arch]):
        return 1
    size = config.BN * p.width * p.itemsize * (2 if p.glu else 1)
    most = min(MAX_SPLITS, PROCESSORS[arch] // programs, size // SPLIT_BYTES)
    return 1 << (most.bit_length() - 1) if most > 1 else 1


def _fit(arch: Arch, p: Problem, config: Config) -> Config:
    """With tiles of K that divide K, where there are such, and as many stages as fit."""
    while config.BK > 16 and p.width % config.step:
        config = replace(config, BK=config.BK // 2)
    if p.width % config.step:
        # Masked in K, perhaps unaligned, and so loaded through registers: small tiles.
        BK = next_power_of_2(cdiv(p.width, config.SLICES))
        most = 16 if arch == "sm_90" and config.SLICES > 1 and config.BM * config.BN >= 16 * 32 else 32
        config = replace(config, BK=max(16, min(most, BK)))
    elif arch == "sm_90" and p.itemsize == 4 and p.glu and config.BM == config.BN == 16:
        # Two products, each of three parts, of a longer step take all registers.
        config = replace(config, BK=min(32, config.BK))
    stage = config.step * (config.BM * p.itemsize_x + config.BN * p.itemsize * (2 if p.glu else 1))
    small = config.BM * config.BN < 128 * 64
    stages = (_SHARED_SMALL if small else _SHARED)[arch] // stage
    if arch == "gfx942":
        return replace(config, num_stages=max(1, min(stages, 2)))
    # But for wgmma, Triton keeps a tile less than there are stages.
    stages += config.BM < 64 or arch == "sm_80"
    return replace(
        config, num_stages=max(1, min(stages, MAX_STAGES)), registers=255 if config.num_warps == 4 or p.head else None
    )


@functools.lru_cache(maxsize=4096)
def merge_config(features: int, head: int) -> Config:
    """Of `linear_merge`."""
    BN = min(512, next_power_of_2(features)) if not head else next_power_of_2(head)
    return Config(max(1, 4096 // BN) if BN < 512 else 4, BN, 1)


Plan = Literal["fused", "norm apart", "vendor"]
# The roofline that `plan` weighs with: dense 16-bit arithmetic and memory of H100, A100 and MI300X, in 1/s, and what a launch
# takes. The shares of it are assumptions: of the vendor's GEMM, of `linear_tiles`, and of it with the norm in its loop,
# which every tile of features repeats.
_PEAK: dict[Arch, float] = {"sm_80": 312e12, "sm_90": 989e12, "gfx942": 1307e12}
_BANDWIDTH: dict[Arch, float] = {"sm_80": 2.0e12, "sm_90": 3.35e12, "gfx942": 5.3e12}
_LAUNCH = 2e-6
_VENDOR, _TILED, _NORM_TILED = 0.75, 0.55, 0.4
# Up to so many rows reading W is what takes the time, and the fused kernel reads it once.
PLAN_ROWS = 128
# More launches have to promise so much.
_GAIN = 1.25


@functools.lru_cache(maxsize=4096)
def plan(arch: Arch, problem: Problem) -> Plan:
    """How to compute one group of rows: all in one launch, with the norm in a launch of its own, or by the vendor's GEMM
    between a norm and an epilogue.
    """
    p = problem
    rows = sum(p.rows)
    if len(p.rows) > 1 or rows <= PLAN_ROWS:
        return "fused"
    operations = 2.0 * rows * p.features * p.width * (2 if p.glu else 1) / (_PEAK[arch] * 2 / p.itemsize)
    norm_pass = (_LAUNCH + 2 * rows * p.width * p.itemsize_x / _BANDWIDTH[arch]) if p.normed else 0.0
    edge_pass = (_LAUNCH + (3 if p.glu else 2) * rows * p.features * p.itemsize / _BANDWIDTH[arch]) if p.bent else 0.0
    times: dict[Plan, float] = {
        "fused": operations / (_NORM_TILED if p.normed else _TILED),
        "norm apart": norm_pass + operations / _TILED,
        "vendor": norm_pass + edge_pass + operations / _VENDOR + (_LAUNCH if p.glu else 0.0),
    }
    times["fused"] /= _GAIN
    return min(times, key=times.__getitem__)


@functools.lru_cache(maxsize=4096)
def edge_config(features: int) -> Config:
    """Of `edge_backward`."""
    BN = min(128, next_power_of_2(features))
    return Config(2048 // BN, BN, 1)


def summing_programs(arch: Arch, columns: int) -> int:
    """How many programs share the rows of `edge_backward` where columns are summed: few, for each leaves a row of sums."""
    return max(1, 4 * PROCESSORS[arch] // columns)

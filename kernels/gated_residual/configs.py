"""Launch configurations of the gated residual: a function of architecture and sizes, never autotuned.

Chosen from compile-time resources: 8 elements a thread, which are 16 bytes of a 16-bit row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..sizes import cdiv, next_power_of_2
from ..target import PROCESSORS, Arch

# Blocks of each multiprocessor that add up gradients of the gate.
BLOCKS = 4


@dataclass(frozen=True)
class Config:
    """One launch: tiles of BM rows and BD columns."""

    BM: int
    BD: int
    num_warps: int


@functools.lru_cache(maxsize=4096)
def config_for(arch: Arch, width: int) -> Config:
    """For both kernels: up to 1024 columns, and short rows together."""
    BD = min(1024, next_power_of_2(width))
    lanes = 64 if arch == "gfx942" else 32
    return Config(1024 // BD, BD, 1024 // (lanes * 8))


def programs_for(arch: Arch, rows: int, columns: int, config: Config) -> int:
    """How many programs share out the rows of each of `columns` column tiles where each adds up its own."""
    return max(1, min(cdiv(rows, config.BM), BLOCKS * PROCESSORS[arch] // columns))

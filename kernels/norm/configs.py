"""Launch configurations of the norm kernels: a function of architecture and row length, never autotuned.

Chosen from compile-time resources: enough lanes that a thread moves 16 bytes of a 16-bit row at a time, and so few
elements a thread that nothing spills.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..sizes import cdiv, next_power_of_2
from ..target import PROCESSORS, Arch

# Longer rows go to the reference: a row has to fit into the registers of one program.
MAX_WIDTH = 8192
# Blocks of each multiprocessor that add up weight gradients: more hide more latency, and leave more to add up.
BLOCKS = 4


@dataclass(frozen=True)
class Config:
    """One launch: BM rows of BD columns a program."""

    BM: int
    BD: int
    num_warps: int


@functools.lru_cache(maxsize=4096)
def forward_config(arch: Arch, width: int) -> Config:
    """For `norm_rows` with rows of `width` elements."""
    return _config(arch, width)


@functools.lru_cache(maxsize=4096)
def backward_config(arch: Arch, width: int) -> Config:
    """For `norm_rows_backward`, which keeps five numbers an element."""
    return _config(arch, width)


def sums_apart(config: Config, dropout: bool) -> bool:
    """Whether a launch of its own adds up weight gradients: registers hold no long row's sums next to random numbers."""
    return dropout and config.BD > 4096


def programs_for(arch: Arch, rows: int, config: Config) -> int:
    """How many programs share out the rows where each adds up its own."""
    return min(cdiv(rows, config.BM), BLOCKS * PROCESSORS[arch])


def _config(arch: Arch, width: int) -> Config:
    """Short rows share a program until that has 1024 elements; 8 a thread, which are 16 bytes of a 16-bit row."""
    lanes = 64 if arch == "gfx942" else 32
    BD = next_power_of_2(width)
    BM = max(1, 1024 // BD)
    return Config(BM, BD, max(1, min(16, BM * BD // (lanes * 8))))

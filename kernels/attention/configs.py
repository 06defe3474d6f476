"""Launch configurations of the attention kernels: a function of architecture, shape bucket and dtype, never autotuned.

The choices are such that nothing spills and everything fits into shared memory on each architecture, for the calls that
`variants` lists (the audit compiles them). On sm_90 this holds for Triton 3.6 and 3.7, elsewhere for 3.7. Tiles follow the
number of rows that share keys, because an idle row costs as much as a busy one; below 16 rows tl.dot has no smaller tile.

`burden` is how many of these a call has, for each keeps registers busy: dropout, key lengths, key padding, a causal limit,
rows that are the mean of all values, a second key source.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ..sizes import next_power_of_2
from ..target import PROCESSORS, Arch
from ..tile import split_width

MAX_SPLITS = 32
# A split with fewer blocks of keys than this is not worth its second pass.
BLOCKS_PER_SPLIT = 4
# Nor are two: the second pass is a launch of its own.
LEAST_SPLITS = 4
# The same for dK and dV, which are split by tiles of rows.
TILES_PER_PART = 4
# How many images a row is taken to see when splits are chosen; the truth is on the device.
IMAGES_SEEN = 4


@dataclass(frozen=True)
class Config:
    """One launch: BM rows and BN keys a tile, and what Triton is told.

    `registers` (NVIDIA): how many the assembler may give a thread. Left alone, it spills a few bytes for the sake of one
    more resident block.
    """

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch that are not the kernel's own."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


@dataclass(frozen=True)
class Media:
    """What a configuration depends on of a media mask: keys of an image, and 64-bit words a row."""

    tokens: int
    words: int


@functools.cache
def _pipelines_products() -> bool:
    """Whether Triton keeps products under way across iterations without many more registers: since 3.7."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


def blocks_of(width: int, itemsize: int) -> tuple[int, int]:
    """`split_width`; but in fp32 a second block has 32 columns at least: with 16, products take twice the instructions."""
    first, second = split_width(width)
    return first, 32 if second == 16 and itemsize == 4 else second


def _fit(config: Config, arch: Arch, itemsize: int, media: Media | None) -> Config:
    """With media, a block of keys lies within one image: no wider than that."""
    if arch == "sm_80" or (arch == "sm_90" and itemsize == 4 and config.num_warps == 4):
        config = replace(config, registers=255)
    if media is None:
        return config
    return replace(config, BN=min(config.BN, max(16, next_power_of_2(media.tokens))))


@functools.lru_cache(maxsize=4096)
def forward_config(
    arch: Arch, rows: int, tiles_of_128: int, width: int, itemsize: int, media: Media | None, burden: int = 0
) -> Config:
    """For `attention_rows` forward.

    Args:
        arch: what it runs on.
        rows: packed rows of one cluster.
        tiles_of_128: how many programs there would be with 128 rows each.
        width: the head dimension.
        itemsize: bytes of an element.
        media: of the media mask, if there is one.
        burden: what the call has besides.
    """
    first, second = blocks_of(width, itemsize)
    wide = first + second
    if itemsize == 4:
        config = _fp32_config(arch, wide)
        if arch != "gfx942" and 64 < wide <= 128:
            # What is loaded ahead waits in shared memory instead of registers; dQ would spill with it.
            config = replace(config, num_stages=2)
        return _fit(config, arch, itemsize, media)
    if arch == "gfx942":
        stages = 1 if wide > 128 else 2
    elif arch == "sm_90":
        stages = 3 if wide <= 128 else 2
    else:
        stages = 3 if wide <= 64 else 2
    registers = None
    if rows <= 32:
        BM, BN, warps = 16 if rows <= 16 else 32, 32 if wide > 128 or (second and rows > 16) else 64, 4
        if arch == "sm_90" and rows <= 16:
            # Else the assembler spills for a third block in a multiprocessor.
            if media is not None and media.words > 1:
                stages = 2
            registers = 255 if wide > 128 else None
    elif wide > 128:
        BM, BN, warps = 32 if arch == "sm_80" and burden >= 2 else 64, 32, 8
    elif rows > 64 and tiles_of_128 >= PROCESSORS[arch] and media is None and (wide <= 64 or arch == "sm_90"):
        BM, BN, warps = 128, 64, 8
    else:
        # With media, a tile of more rows sees more images, of which each row sees few.
        many = media is not None and media.words > 1
        crowded = wide > 96 or many or (media is not None and (wide > 64 or burden >= 4))
        BM, BN, warps = 64, 32 if crowded or arch == "sm_80" or (wide > 64 and arch != "sm_90") else 64, 4
        if arch == "sm_90":
            warps = 8 if many and wide > 96 else 4
        elif arch == "sm_80" and many:
            BM, BN, stages = 32, 64 if wide <= 64 else 32, 2
        elif arch == "sm_80":
            warps = 8 if wide > 64 else 4
    return _fit(Config(BM, BN, warps, stages, registers), arch, itemsize, media)


@functools.lru_cache(maxsize=4096)
def query_gradient_config(
    arch: Arch, rows: int, width: int, itemsize: int, media: Media | None, burden: int = 0
) -> Config:
    """For `attention_rows` backward (dQ); arguments as for `forward_config`."""
    wide = sum(blocks_of(width, itemsize))
    if itemsize == 4:
        return _fit(_fp32_config(arch, wide), arch, itemsize, media)
    stages = 1 if arch == "gfx942" else 2
    if rows <= 32 or wide > 128:
        BM, BN, warps = 16 if rows <= 16 else 32, 64 if wide <= 64 else 32, 4 if wide <= 128 or arch == "gfx942" else 8
    elif media is not None and media.words > 1:
        BM, BN, warps = 64 if arch == "sm_90" else 32, 32, 4 if wide <= 64 else 8
        if arch == "sm_90" and burden and media.tokens > 16:
            BM, stages = (64, 1) if burden == 1 else (32, 2)
    elif arch == "sm_80" and wide <= 64:
        # 64 rows take so many registers that a mask, padding and dropout together spill.
        BM, BN, warps = 32, 64 if burden < 4 else 32, 4
    else:
        BM, BN, warps = 64, 64 if arch == "sm_90" and burden < 4 else 32, 4 if wide <= 64 else 8
    return _fit(Config(BM, BN, warps, stages), arch, itemsize, media)


@functools.lru_cache(maxsize=4096)
def key_gradient_config(
    arch: Arch, rows: int, width: int, itemsize: int, media: Media | None, burden: int = 0
) -> Config:
    """For `attention_keys` (dK and dV); `rows` are those of one batch row and key head."""
    wide = sum(blocks_of(width, itemsize))
    if itemsize == 4:
        BN = 32 if wide <= 64 and media is None and not (burden and arch == "sm_90") else 16
        return _fit(Config(16, BN, 4 if wide <= 64 else 8, 1), arch, itemsize, media)
    # Two accumulators of [BN, D] stay in registers: with tiles of more rows, it spills.
    if arch == "sm_90" and rows > 16 and wide <= 128 and (wide <= 64 or media is None):
        # Eight warps share out 128 keys; with 64, each product would be computed twice.
        config = Config(16, 128, 8, 2 if wide <= 96 else 1)
        if wide <= 64:
            # Loading ahead saves a third of the instructions, where registers are left for it and tiles follow. With few
            # rows and no media, a third resident block is worth more.
            ahead = _pipelines_products() and burden <= 1 and (rows > 64 or media is not None)
            laden = burden >= 3 and media is not None and media.tokens > 16
            config = Config(16 if laden else 32, 64, 4, 2 if ahead else 1)
        config = _fit(config, arch, itemsize, media)
        # With fewer keys the assembler spills for one more resident block.
        return config if config.BN >= 64 else replace(config, registers=255)
    if arch == "sm_90" and 128 < wide < 256:
        return _fit(Config(16, 16, 4, 2), arch, itemsize, media)
    stages = 1 if arch == "gfx942" else 2
    few = rows <= 16 or wide > 128 or (wide > 64 and (arch == "sm_80" or media is not None))
    narrow = wide <= (80 if arch == "sm_80" else 64)
    BN = 32 if wide > 128 or (arch == "sm_80" and narrow) else 64
    return _fit(Config(16 if few else 32, BN, 4 if narrow else 8, stages), arch, itemsize, media)


def _fp32_config(arch: Arch, wide: int) -> Config:
    """Of `attention_rows` in fp32: exact products on tensor cores take three times the registers."""
    if wide <= 64:
        return Config(16, 32, 4, 1 if arch == "gfx942" else 2)
    return Config(16, 16, 4, 1)


def splits_for(arch: Arch, programs: int, keys: int, images: int, BN: int) -> int:
    """Into how many parts the keys are split so that few programs fill the device; a power of two.

    Args:
        arch: what it runs on.
        programs: how many programs there are without splits.
        keys: keys of the first source.
        images: images of the first source with a media mask, else 0.
        BN: keys of one block.
    """
    if images > IMAGES_SEEN:
        keys = keys // images * IMAGES_SEEN
    most = min(MAX_SPLITS, 2 * PROCESSORS[arch] // max(programs, 1), keys // (BN * BLOCKS_PER_SPLIT))
    return 1 << (most.bit_length() - 1) if most >= LEAST_SPLITS else 1


def parts_for(arch: Arch, programs: int, fold: int, tiles: int, images: int) -> tuple[int, int]:
    """Into how many parts (the batch rows that share keys, the row tiles of each) dK and dV are split.

    Args:
        arch: what it runs on.
        programs: how many programs there are without parts.
        fold: batch rows that read one key row.
        tiles: row tiles of a batch row.
        images: images of the source with a media mask, else 0; a tile then visits few of them.
    """
    tiles_each = max(1, tiles * IMAGES_SEEN // images) if images > IMAGES_SEEN else tiles
    parts = min(MAX_SPLITS, 2 * PROCESSORS[arch] // max(programs, 1), fold * tiles_each // TILES_PER_PART)
    if parts < 2:
        return 1, 1
    row_parts = min(parts, fold)
    return row_parts, min(parts // row_parts, tiles)

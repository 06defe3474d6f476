"""What the kernels are compiled as: the limits of the GPUs, and the record of what a launcher would launch.

An op folder with Triton kernels has a `variants.py`, whose function `variants` tells the audit (`audit.py`) of them by
calling the op's own launchers on meta tensors, once for each configuration that they may choose:

    def variants(architecture: Architecture) -> Iterator[Variant]:
        for dtype in (torch.bfloat16, torch.float32):
            with recording(architecture) as launches:
                forward(torch.empty(64, 64, dtype=dtype, device="meta"))
            for launch in launches:
                yield replace(launch, label=str(dtype), elements=launch.constexprs["BM"] * launch.constexprs["BN"])

So the audit compiles what runs, argument types and alignment included. Nothing here compiles anything.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from . import runtime, target

# What a launch may pass to the compiler, besides the kernel's arguments.
_OPTIONS = (
    "num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "waves_per_eu", "matrix_instr_nonkdim", "kpack",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A GPU as far as a kernel's resources go. Sizes are in bytes; a unit is an SM (NVIDIA) or a compute unit (AMD).

    Sources: CUDA C++ programming guide, "Compute capabilities"; AMD Instinct MI300 instruction set and CDNA 3 guides.

    Attributes:
        name: as users write it: "sm_90", "gfx942".
        warp_size: lanes of a warp (AMD: wavefront).
        shared_per_block: the most that one block may have.
        shared_per_unit: what the blocks of a unit share, and `shared_reserved` of it that each block takes on top.
        registers_per_unit: of 32 bits each; a quarter of them serves a quarter of the warps.
        register_granule: registers are given to a warp in multiples of this.
        warps_per_unit, blocks_per_unit: the most at a time.
    """

    name: str
    backend: Literal["cuda", "hip"]
    warp_size: int
    shared_per_block: int
    shared_per_unit: int
    shared_reserved: int
    registers_per_unit: int
    register_granule: int
    warps_per_unit: int
    blocks_per_unit: int

    def triton_target(self) -> Any:
        """The target as `triton.compile` takes it."""
        from triton.backends.compiler import GPUTarget

        arch = self.name if self.backend == "hip" else int(self.name.removeprefix("sm_"))
        return GPUTarget(self.backend, arch, self.warp_size)

    def occupancy(self, num_warps: int, registers: int, shared: int) -> float:
        """Resident warps as a share of the most, for blocks of `num_warps` with `registers` a thread; an estimate."""
        per_warp = max(1, _round_up(registers * self.warp_size, self.register_granule))
        by_registers = 4 * (self.registers_per_unit // 4 // per_warp) // num_warps
        per_block = _round_up(shared + self.shared_reserved, 128)
        by_shared = self.shared_per_unit // per_block if per_block else self.blocks_per_unit
        blocks = min(self.blocks_per_unit, self.warps_per_unit // num_warps, by_registers, by_shared)
        return blocks * num_warps / self.warps_per_unit


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def _nvidia(name: str, block_kib: int, unit_kib: int, warps: int, blocks: int) -> Architecture:
    return Architecture(name, "cuda", 32, block_kib * 1024, unit_kib * 1024, 1024, 65536, 256, warps, blocks)


ARCHITECTURES = {
    a.name: a
    for a in (
        _nvidia("sm_80", 163, 164, 64, 32),
        _nvidia("sm_86", 99, 100, 48, 16),
        _nvidia("sm_89", 99, 100, 48, 24),
        _nvidia("sm_90", 227, 228, 64, 32),
        Architecture("gfx942", "hip", 64, 65536, 65536, 0, 131072, 512, 32, 16),
    )
}


def device_architecture(device: torch.device | int | None = None) -> str:
    """The architecture of a GPU of this machine (the current one by default), as in "sm_90" or "gfx942".

    Raises:
        RuntimeError: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU was found, so there is no native architecture; name one, such as sm_90")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.cuda:
        return f"sm_{properties.major}{properties.minor}"
    return str(properties.gcnArchName).split(":")[0]


@dataclass(frozen=True, eq=False)
class Variant:
    """One compilation of a kernel: what Triton makes of a call with such arguments.

    Attributes:
        kernel: the function that `triton.jit` returned.
        signature: argument -> type as Triton writes it ("*bf16", "i32", "fp32"), for all that are not constants.
        constexprs: argument -> value: the `tl.constexpr` arguments, and those that a call specialises on (an integer
            equal to 1, a pointer that is None).
        options: num_warps, num_stages and what else the launch passed to the compiler.
        attributes: argument -> what the compiler may assume of it, as Triton writes it (None: pointers are multiples of
            16, and nothing else).
        label: tells the variants of a kernel apart, to people.
        elements: what one iteration of one program's inner loop works on (scores, weights), for the instructions per
            element; None: not reported.
        scalar_dots: why dots of this variant may run without tensor cores; empty: they may not.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]
    attributes: Mapping[str, Any] | None = None
    label: str = ""
    elements: int | None = None
    scalar_dots: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for variants that compile to the same code."""
        parts = (self.signature, self.constexprs, self.options, self.attributes or {})
        described = (repr(sorted(part.items())) for part in parts)
        return (self.kernel.fn.__module__, self.kernel.fn.__qualname__, self.attributes is None, *described)


class _NoDevice:
    """Stands in for Triton's driver: a device of the wanted architecture, on which nothing can run."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        return self.architecture.triton_target()

    def get_current_device(self) -> str:
        return f"recording {self.architecture.name}"  # the key of Triton's caches: no real device's are touched

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def recording(architecture: Architecture) -> Iterator[list[Variant]]:
    """Collect the launches of the `with` block instead of compiling and running them. Not for several threads at once.

    Args:
        architecture: what the launches are meant for: meta tensors count as lying on such a GPU.

    Raises:
        RuntimeError: the kernels were imported under TRITON_INTERPRET=1, which leaves nothing to compile.
    """
    import triton

    if runtime.interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 leaves no kernels to compile; unset it and start again")
    found: list[Variant] = []

    def record(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:  # noqa: A002 (Triton's name)
        names = fn.jit_function.arg_names
        signature = {name: type_ for name, type_ in compile["signature"].items() if type_ != "constexpr"}
        constants = {names[path[0]]: value for path, value in compile["constants"].items()}
        attributes = {names[path[0]]: given for path, given in compile["configs"][0].items()}
        options = json.loads(compile["specialization_data"])["options"]
        chosen = {name: options[name] for name in _OPTIONS if options.get(name) is not None}
        found.append(Variant(fn.jit_function, signature, constants, chosen, attributes))
        return True  # "somebody else compiled this": Triton then neither compiles nor launches

    driver, knobs = triton.runtime.driver, triton.knobs.runtime
    before, hook = driver._active, knobs.jit_cache_hook
    driver.set_active(_NoDevice(architecture))
    knobs.jit_cache_hook = record
    try:
        with target.meta_tensors_on(architecture.name):
            yield found
    finally:
        knobs.jit_cache_hook = hook
        driver._active = before

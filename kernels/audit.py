"""Compile every kernel in every configuration, without a GPU, and look at what came out.

`variants.py` of each op folder lists the launches (`launch.py` says how). A variant fails the audit when it does not
compile, spills registers, has a dot without a tensor-core instruction, or wants more shared memory than a block may have.
The numbers are read from the machine code: for NVIDIA with the cuobjdump and nvdisasm that come with Triton, for AMD from
the assembly. Compilations go through Triton's own cache (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import multiprocessing
import pkgutil
import queue
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .launch import ARCHITECTURES, Architecture, Variant

Variants = Callable[[Architecture], Iterable[Variant]]

PROCESSES = 2
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Row:
    """What one variant compiled to. The numbers are None where it did not compile.

    Attributes:
        op, kernel, label, architecture: which variant.
        registers: of 32 bits, a thread.
        spilled_bytes: stored to memory for want of registers, a thread.
        shared_bytes: shared memory of a block.
        occupancy: resident warps as a share of the most that a multiprocessor can hold; an estimate from its limits.
        dots: in the program; `scalar_dots` of them run without tensor cores.
        tensor_core: kind of instruction -> how many, in the code: wgmma, mma, mfma.
        instructions_per_element: of one thread's share of the heaviest innermost loop, as compiled. A loop that the
            compiler unrolled counts with all its copies. None: no loop, or the variant names no elements.
        seconds: that compiling and reading took.
        failures: what is wrong with it, a sentence each; empty: it passed.
    """

    op: str
    kernel: str
    label: str
    architecture: str
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None
    occupancy: float | None = None
    dots: int | None = None
    scalar_dots: int | None = None
    tensor_core: Mapping[str, int] | None = None
    instructions_per_element: float | None = None
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One variant to compile: the `index`-th of what `variants`, a function of a module, lists; `load` it, too."""

    op: str
    variants: Variants
    architecture: str
    index: int
    name: str
    load: bool = False

    def failed(self, reason: str) -> Row:
        """The row of a variant that gave no code."""
        kernel, _, label = self.name.partition(" ")
        return Row(self.op, kernel, label, self.architecture, failures=(reason,))


class UnknownOpError(ValueError):
    """An op or an architecture that the audit knows nothing of."""


def find_variants() -> dict[str, Variants]:
    """The `variants` function of each op folder that has one."""
    found = {}
    for folder in pkgutil.iter_modules([str(Path(__file__).parent)]):
        name = f"{__package__}.{folder.name}"
        if folder.ispkg and "variants" in {
            m.name for m in pkgutil.iter_modules(importlib.import_module(name).__path__)
        }:
            found[folder.name] = importlib.import_module(f"{name}.variants").variants
    return found


def jobs(
    variants: Mapping[str, Variants], architectures: Collection[str], ops: Collection[str] = (), load: bool = False
) -> list[Job]:
    """What there is to compile, variants that compile to the same code once.

    Args:
        variants: op -> its list of variants, as from `find_variants`.
        architectures: names of `ARCHITECTURES`.
        ops: only these; default: all.
        load: also load each onto the current GPU, which must be of the one architecture.

    Raises:
        UnknownOpError: an op or an architecture that there is not.
    """
    for kind, wanted, known in (("op", ops, variants), ("architecture", architectures, ARCHITECTURES)):
        if unknown := sorted(set(wanted) - set(known)):
            names = ", ".join(known) or "none has Triton kernels"
            raise UnknownOpError(f"unknown {kind} {', '.join(unknown)}; choose of: {names}")
    found = []
    for architecture in architectures:
        for op, function in variants.items():
            if ops and op not in ops:
                continue
            keys = set()
            for index, variant in enumerate(_listed(function, architecture)):
                if variant.key not in keys:
                    keys.add(variant.key)
                    name = f"{variant.kernel.fn.__name__} {variant.label}".strip()
                    found.append(Job(op, function, architecture, index, name, load))
    return found


def run(todo: Collection[Job], processes: int = PROCESSES) -> Iterator[Row]:
    """Compile in other processes; the rows come as they are ready. A crash of the compiler fails its variant alone."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    rows: queue.SimpleQueue[Row] = queue.SimpleQueue()
    for job in todo:
        waiting.put(job)
    threads = [
        threading.Thread(target=_lane, args=(waiting, rows), daemon=True) for _ in range(min(processes, len(todo)))
    ]
    for thread in threads:
        thread.start()
    for _ in todo:
        yield rows.get()
    for thread in threads:
        thread.join()


def _lane(waiting: queue.SimpleQueue[Job], rows: queue.SimpleQueue[Row]) -> None:
    """Give the jobs to one process at a time, so that it is known which of them ended it."""
    new_process = functools.partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))
    process = new_process()
    while True:
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            process.shutdown()
            return
        try:
            rows.put(process.submit(compile_job, job).result())
        except BrokenProcessPool:
            rows.put(job.failed("does not compile: the compiler crashed"))
            process = new_process()
        except Exception as error:  # whatever it is, the others still count
            rows.put(job.failed(f"could not be read: {_one_line(error)}"))


def compile_job(job: Job) -> Row:
    """Compile one variant in this process."""
    variant = _listed(job.variants, job.architecture)[job.index]
    return inspect_variant(job.op, variant, ARCHITECTURES[job.architecture], job.load)


@functools.cache
def _listed(variants: Variants, architecture: str) -> tuple[Variant, ...]:
    return tuple(variants(ARCHITECTURES[architecture]))


def _one_line(error: Exception) -> str:
    # The assembler's own complaint, where it made one, is buried in a command line and a whole program.
    said = re.search(r"ptxas fatal\s*: (.*)", str(error))
    return f"{type(error).__name__}: {' '.join((said[1] if said else str(error)).split())}"[:400]


def inspect_variant(op: str, variant: Variant, architecture: Architecture, load: bool = False) -> Row:
    """Compile a variant and read registers, spills, shared memory and instructions from the result.

    Args:
        op, variant, architecture: what to compile.
        load: put it on the current GPU too, which must be of the architecture: what does not fit fails there.
    """
    started = time.monotonic()
    row = Row(op, variant.kernel.fn.__name__, variant.label, architecture.name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Triton prints the whole program that does not compile
            compiled = compile_variant(variant, architecture)
        if load:
            _ = compiled.run  # loads it
    except Exception as error:
        failure = f"does not {'compile or load' if load else 'compile'}: {_one_line(error)}"
        return replace(row, seconds=time.monotonic() - started, failures=(failure,))
    code = _read_nvidia(compiled.asm) if architecture.backend == "cuda" else _read_amd(compiled.asm["amdgcn"])
    dots, scalar = count_dots(compiled.asm["ttgir"])
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    per_element = None
    if variant.elements and code.loop:
        per_element = code.loop * warps * architecture.warp_size / variant.elements
    failures = []
    if code.spilled:
        failures.append(f"spills {code.spilled} bytes a thread: use smaller tiles, more warps or fewer stages")
    if not variant.scalar_dots and scalar:
        failures.append(
            f"{scalar} of {dots} dots run without tensor cores: no such instruction fits their types and tiles"
        )
    elif not variant.scalar_dots and dots and not code.tensor_core:
        failures.append(f"{dots} dots, but no tensor-core instruction in the code")
    if shared > architecture.shared_per_block:
        failures.append(
            f"wants {shared} bytes of shared memory, and a block of {architecture.name} has at most "
            f"{architecture.shared_per_block}: use smaller tiles or fewer stages"
        )
    return replace(
        row,
        registers=code.registers,
        spilled_bytes=code.spilled,
        shared_bytes=shared,
        occupancy=architecture.occupancy(warps, code.registers, shared),
        dots=dots,
        scalar_dots=scalar,
        tensor_core=code.tensor_core,
        instructions_per_element=per_element,
        seconds=time.monotonic() - started,
        failures=tuple(failures),
    )


def compile_variant(variant: Variant, architecture: Architecture) -> Any:
    """The compiled kernel, as `triton.compile` returns it.

    Raises:
        ValueError: an argument has neither a type nor a value.
    """
    import triton
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    if lacking := [name for name in names if name not in variant.signature and name not in variant.constexprs]:
        raise ValueError(f"the variant gives neither a type nor a value for {', '.join(lacking)}")
    attributes = variant.attributes
    if attributes is None:
        attributes = {n: [["tt.divisibility", 16]] for n, type_ in variant.signature.items() if type_.startswith("*")}
    source = ASTSource(
        variant.kernel,
        {name: "constexpr" if name in variant.constexprs else variant.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constexprs.items()},
        attrs={(names.index(name),): list(given) for name, given in attributes.items()},
    )
    return triton.compile(source, target=architecture.triton_target(), options=dict(variant.options))


def count_dots(ttgir: str) -> tuple[int, int]:
    """(dots, those that run without tensor cores) of a program in Triton's GPU dialect.

    A dot runs on tensor cores where its result has the layout of such an instruction.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(\w+)<", ttgir, re.MULTILINE))
    dots = scalar = 0
    for line in ttgir.splitlines():
        if not (match := re.search(r"= (tt\.dot|tt\.dot_scaled|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b(?!_)", line)):
            continue
        dots += 1
        result = re.search(r"-> tensor<[^<>]*, (#\w+)>", line)
        if match[1].startswith("tt.") and (result is None or not layouts.get(result[1], "").endswith(("mma", "mfma"))):
            scalar += 1
    return dots, scalar


@dataclass(frozen=True)
class Code:
    """What was read from machine code: `loop` is the number of instructions in the heaviest innermost loop."""

    registers: int
    spilled: int
    tensor_core: dict[str, int]
    loop: int


_NVIDIA_TENSOR = {"wgmma": ("HGMMA", "IGMMA", "QGMMA", "BGMMA"), "mma": ("HMMA", "IMMA", "QMMA", "DMMA", "OMMA")}
_AMD_TENSOR = {"mfma": ("v_mfma", "v_smfmac")}


def _read_nvidia(asm: Mapping[str, Any]) -> Code:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _tool(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    registers = re.search(r"REG:(\d+) ", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]}")
    lines: list[str] = []
    for line in sass.splitlines():
        text = re.sub(r"/\*.*?\*/", "", line).strip()
        if label := re.match(r"(\.L_\w+):", text):
            lines.append(label[1] + ":")
        elif instruction := re.match(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text):
            target = re.search(r"`\((\.L_\w+)\)", instruction[2]) if instruction[1].startswith("BRA") else None
            lines.append(instruction[1] + (f" {target[1]}" if target else ""))
    spilled = sum(map(_local_bytes, lines))
    return Code(int(registers[1]), spilled, *_instructions(lines, _NVIDIA_TENSOR, ("NOP",)))


def _local_bytes(instruction: str) -> int:
    """What an instruction stores to a thread's local memory, where spilled registers go; nothing else does here."""
    if not instruction.startswith("STL"):
        return 0
    return next((size for suffix, size in _LOCAL_SIZES.items() if instruction.endswith(suffix)), 4)


_LOCAL_SIZES = {".128": 16, ".64": 8, "16": 2, "8": 1}


def _tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:300]}")
    return done.stdout + done.stderr


def _read_amd(assembly: str) -> Code:
    def field(name: str) -> int:
        match = re.search(rf"{name}:?\s+(\d+)", assembly)
        if match is None:
            raise RuntimeError(f"the assembly does not tell {name.strip('; .')}")
        return int(match[1])

    # Vector registers spill to memory; scalar ones to lanes of vector registers, which costs no memory.
    spilled = 4 * field(r"\.vgpr_spill_count")
    if not spilled:
        spilled = field("; ScratchSize")
    lines: list[str] = []
    for line in assembly.splitlines():
        text = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", text):
            lines.append(label[1] + ":")
        elif instruction := re.match(r"([sv]_\w+|ds_\w+|buffer_\w+|global_\w+|flat_\w+|scratch_\w+)\b(.*)", text):
            branch = instruction[1].startswith(("s_cbranch", "s_branch"))
            lines.append(instruction[1] + (f" {instruction[2].strip()}" if branch else ""))
    return Code(field("; TotalNumVgprs"), spilled, *_instructions(lines, _AMD_TENSOR, ("s_nop", "s_waitcnt")))


def _instructions(
    lines: list[str], tensor: Mapping[str, tuple[str, ...]], ignored: tuple[str, ...]
) -> tuple[dict[str, int], int]:
    """(tensor-core instructions by kind, instructions of the heaviest innermost loop).

    Args:
        lines: labels (ending in a colon) and instructions, branches with the label they go to.
        tensor: kind -> what its instructions start with.
        ignored: instructions that compute nothing.

    The heaviest loop is that with the most tensor-core instructions, or the longest if none has any.
    """

    def kind(line: str) -> str | None:
        return next((name for name, starts in tensor.items() if line.startswith(starts)), None)

    counts = {name: sum(kind(line) == name for line in lines) for name in tensor}
    labels = {line[:-1]: place for place, line in enumerate(lines) if line.endswith(":")}
    # A branch to itself is the trap after the end of the code.
    loops = [
        (start, end)
        for end, line in enumerate(lines)
        if " " in line and (start := labels.get(line.split()[-1], end)) < end - 1
    ]
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    weights = []
    for start, end in innermost:
        body = [line for line in lines[start : end + 1] if not line.endswith(":") and not line.startswith(ignored)]
        weights.append((sum(kind(line) is not None for line in body), len(body)))
    return {name: count for name, count in counts.items() if count}, max(weights, default=(0, 0))[1]

"""What `mllm-fast info` tells: devices, versions, and which implementation of each op runs here, and why."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    from .kernels.runtime import Op

LIBRARIES = ("torch", "triton", "transformers", "bitsandbytes", "xformers", "peft")


@dataclass(frozen=True)
class Device:
    """One device that kernels could run on. `memory_gib` is the whole memory of a GPU and None for a CPU."""

    name: str
    kind: str
    detail: str
    memory_gib: float | None = None


@dataclass(frozen=True)
class OpStatus:
    """Which implementation of an op runs on this machine, and the reason.

    `details` are (which calls, implementation, reason), where not all calls of the op run alike on the GPU.
    """

    name: str
    summary: str
    implementation: str
    reason: str
    details: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Info:
    """What `mllm-fast info` prints. `versions` maps a library to its version, None where it is not installed.

    `unsupported` maps a library whose version is outside what this package was made for to the versions that are not.
    """

    devices: tuple[Device, ...]
    versions: dict[str, str | None]
    triton: str
    ops: tuple[OpStatus, ...]
    system: str = ""
    unsupported: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Info:
        """What `mllm-fast info --json` printed, here or elsewhere; `print_info` shows it."""
        given = json.loads(text)
        ops = (OpStatus(**op | {"details": tuple(map(tuple, op["details"]))}) for op in given.pop("ops"))
        devices = tuple(Device(**device) for device in given.pop("devices"))
        return cls(devices=devices, ops=tuple(ops), **given)


def collect_info() -> Info:
    """Look at this machine: devices, installed versions, and for each op what would run it under `backend("auto")`."""
    import torch

    from . import ops  # noqa: F401  # importing an op declares it to the runtime
    from .kernels import runtime

    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    devices = [Device("cpu", "cpu", cpu)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        target = f"sm_{properties.major}{properties.minor}" if torch.version.cuda else properties.gcnArchName
        memory = round(properties.total_memory / 2**30, 1)
        devices.append(Device(f"cuda:{index}", "cuda", f"{properties.name}, {target}", memory))
    statuses = tuple(_status(op, devices[-1].kind) for op in runtime.ops())
    libraries = {name: library_version(name) for name in LIBRARIES}
    versions = {"python": platform.python_version(), "mllm-fast": __version__, **libraries}
    unavailable = runtime.triton_unavailable_reason()
    triton = "can run" if unavailable is None else f"cannot run: {unavailable}"
    return Info(tuple(devices), versions, triton, statuses, platform.platform(), unsupported(libraries))


def _status(op: Op, device_type: str) -> OpStatus:
    from .kernels import launch, runtime

    implementation, reason = runtime.explain(op.name, device_type)
    details = op.details(launch.device_architecture()) if implementation == "triton" and device_type == "cuda" else ()
    return OpStatus(op.name, op.summary, implementation, reason, tuple(details))


def library_version(distribution: str) -> str | None:
    """The version of an installed library, None where there is none. Torch's names the CUDA that it was built for."""
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    if distribution != "torch":
        return found
    import torch

    return str(torch.__version__)


def unsupported(versions: Mapping[str, str | None]) -> dict[str, str]:
    """The libraries among `versions` that this package was not made for, with the versions that it was made for."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("mllm-fast") or ()
    except metadata.PackageNotFoundError:  # a checkout that nobody installed
        return {}
    found = {}
    for requirement in map(Requirement, lines):
        version = versions.get(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            found[requirement.name] = ",".join(sorted(map(str, requirement.specifier), reverse=True))
    return found


def print_info(info: Info) -> None:
    """As tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    devices = Table("device", "what", "memory", title="Devices", title_justify="left")
    for device in info.devices:
        memory = "" if device.memory_gib is None else f"{device.memory_gib} GiB"
        devices.add_row(device.name, device.detail, memory)
    versions = Table("library", "version", title="Versions", title_justify="left")
    for library, version in info.versions.items():
        made_for = f" (made for {info.unsupported[library]})" if library in info.unsupported else ""
        versions.add_row(library, f"{version or 'not installed'}{made_for}")
    ops = Table("op", "runs", "because", "what it computes", title="Ops", title_justify="left")
    for op in info.ops:
        ops.add_row(op.name, op.implementation, op.reason, escape(op.summary))
    console.print(devices, versions, ops, sep="\n")
    for op in info.ops:
        if op.details:
            table = Table("calls", "runs", "because", title=f"{op.name} on the GPU", title_justify="left")
            for calls, implementation, why in op.details:
                table.add_row(escape(calls), implementation, escape(why))
            console.print(table)
    console.print(f"Triton kernels {info.triton}", markup=False, highlight=False)
    console.print(info.system, markup=False, highlight=False)

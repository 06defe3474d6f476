"""Run the tests that compare with upstream at the ends of the supported ranges of versions: `make compat`.

    python -m tests.compat.environments                    # all of them
    python -m tests.compat.environments transformers-5.17  # some
    python -m tests.compat.environments newest             # what the newest upstream changed; for a nightly job
    python -m tests.compat.environments --list

Each environment is made once, in `.compat/NAME`. One that changes a pure-Python library lies over the environment that
runs this command and holds only what differs; one that changes torch or Python is whole, and downloads as much as a fresh
installation. (Where pip finds builds of torch for CPUs of another version, it takes them; the ordinary ones bring CUDA.)

`newest` need not be supported: it is made anew each time, lists the signatures that changed, and runs only when it is named.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".compat"
PEERS = ("open-flamingo", "flamingo-pytorch", "einops-exts")  # their own requirements are stale
# What compares with upstream, and the kernels where torch or triton change.
PARITY = (
    "tests/families", "tests/models", "tests/quantization", "tests/test_verification.py", "tests/cli/test_systems.py",
    "tests/compat",
)  # fmt: skip
KERNELS = ("tests/kernels",)
# They go with the version of transformers, so pip chooses them.
FOLLOWS_TRANSFORMERS = ("tokenizers", "huggingface-hub", "hf-xet")
NEWEST = "newest"


@dataclass(frozen=True)
class Environment:
    """Versions to test with. `pins` take the place of those in constraints.txt.

    Attributes:
        name: of its folder.
        pins: distribution to version; NEWEST: the newest that there is.
        tests: what runs there; nothing: signatures are compared, no more.
        python: "3.12", where it is not the Python of this command.
        overlay: whether it lies over the environment that runs this command.
    """

    name: str
    pins: dict[str, str]
    tests: tuple[str, ...] = PARITY
    python: str | None = None
    overlay: bool = field(default=True)


ENVIRONMENTS = (
    Environment("transformers-5.17", {"transformers": "5.17.0"}),
    Environment("transformers-5.20", {"transformers": "5.20.2"}),
    Environment("triton-3.6", {"triton": "3.6.0"}, KERNELS),
    Environment("python-3.12", {}, (*PARITY, *KERNELS), "3.12", overlay=False),
    Environment(
        # torch 2.11 wants setuptools below 82.
        "oldest", {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "setuptools": "81.0.0"},
        (*PARITY, *KERNELS), overlay=False,
    ),
    Environment(NEWEST, {"transformers": NEWEST, "peft": NEWEST, "bitsandbytes": NEWEST}, ()),
)  # fmt: skip


class CannotBuildError(Exception):
    """An environment that could not be made, and why."""


def constraints(pins: dict[str, str]) -> str:
    """constraints.txt with these versions instead."""
    replaced = set(pins) | (set(FOLLOWS_TRANSFORMERS) if "transformers" in pins else set())
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in replaced]
    return "\n".join([*kept, *(requirement(*pin) for pin in pins.items() if pin[1] != NEWEST)]) + "\n"


def requirement(name: str, version: str) -> str:
    """A pin as pip takes it."""
    return name if version == NEWEST else f"{name}=={version}"


def build(environment: Environment) -> Path:
    """Make the environment if it is not there, and return its Python.

    Raises:
        CannotBuildError: the Python or a distribution is not to be had.
    """
    folder = FOLDER / environment.name
    python, done = folder / "bin" / "python", folder / "done"
    wanted = constraints(environment.pins)
    newest = NEWEST in environment.pins.values()
    if done.is_file() and done.read_text(encoding="utf-8") == wanted and not newest:
        return python
    base = sys.executable if environment.python is None else shutil.which(f"python{environment.python}")
    if base is None or subprocess.run([base, "--version"], capture_output=True).returncode:
        raise CannotBuildError(f"there is no python{environment.python} here")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pinned = folder / "constraints.txt"
    pinned.write_text(wanted, encoding="utf-8")
    venv = [base, "-m", "venv", *(["--without-pip"] if environment.overlay else []), str(folder)]
    _run(venv)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pinned)]
    if environment.overlay:
        # Found after the overlay's own: Python adds what .pth files name to the end of its path.
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (own / "over.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        # Without --upgrade pip is content with what lies below the overlay.
        upgrade = ["--upgrade"] if newest else []
        _run([*pip, *upgrade, *(requirement(*pin) for pin in environment.pins.items())])
    else:
        _run([*pip, "setuptools", "wheel"])
        _run([*pip, "--no-build-isolation", "-e", ".[demo,test,bench]"])
        _run([*pip, "--no-deps", *PEERS])
    done.write_text(wanted, encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuildError(reason(done.stderr.strip() or done.stdout.strip()))


def reason(said: str) -> str:
    """What pip or venv failed for, in one line: the versions that do not go together, or the last error."""
    lines = said.splitlines() or ["no message"]
    conflict = "The conflict is caused by:"
    if conflict in lines:
        parts = itertools.takewhile(str.strip, lines[lines.index(conflict) + 1 :])
        return "; ".join(part.strip() for part in parts)
    return ([line for line in lines if "error" in line.lower()] or lines)[-1]


def test(environment: Environment, python: Path, arguments: list[str]) -> str:
    """Run its tests; "" where they passed, or what failed."""
    if environment.tests:
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *environment.tests, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            return f"pytest ended with status {done.returncode}"
    changed = subprocess.run([str(python), "-m", "tests.compat.signatures"], cwd=ROOT).returncode
    # Elsewhere they are only shown: versions that are supported may differ.
    return "signatures changed" if changed and not environment.tests else ""


def main() -> int:
    """Status 0: all passed; 1: tests failed, or the newest changed; 2: an environment is unknown or could not be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"environments (default: all but {NEWEST})")
    parser.add_argument("--list", action="store_true", help="list them")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="what follows goes to pytest")
    args = parser.parse_args()
    known = {environment.name: environment for environment in ENVIRONMENTS}
    if unknown := set(args.names) - known.keys():
        parser.error(f"unknown environment {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if args.list:
        for each in ENVIRONMENTS:
            pins = ", ".join(f"{name} {version}" for name, version in each.pins.items()) or "the tested versions"
            print(f"{each.name}: {pins}" + (f" on Python {each.python}" if each.python else ""))  # noqa: T201
        return 0
    outcomes: dict[str, str] = {}
    missing = False
    for environment in (known[name] for name in args.names or (name for name in known if name != NEWEST)):
        print(f"== {environment.name}", flush=True)  # noqa: T201
        try:
            outcomes[environment.name] = test(environment, build(environment), args.pytest) or "passed"
        except CannotBuildError as error:
            outcomes[environment.name] = f"not run: {error}"
            missing = True
    print(*(f"{name}: {outcome}" for name, outcome in outcomes.items()), sep="\n")  # noqa: T201
    failed = any(outcome.startswith(("pytest", "signatures")) for outcome in outcomes.values())
    return 1 if failed else 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""The package as users get it: what is packed, how it installs, and that it stands in no other project's way."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import mllm_fast
from tests import fresh_environment

ROOT = Path(__file__).resolve().parents[1]
# Everything a build reads; the rest of a checkout (tests, .venv, caches) must not be needed.
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "mllm_fast", "kernels")
# What the source distribution also holds.
READ = ("MANIFEST.in", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "docs", "examples")


def _can_build() -> bool:
    try:
        return int(version("setuptools").split(".")[0]) >= 77 and importlib.util.find_spec("pip") is not None
    except PackageNotFoundError:
        return False


needs_build = pytest.mark.skipif(not _can_build(), reason="building needs pip and setuptools >= 77 in this environment")


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, links kept as links, so that building leaves nothing in this tree."""
    target = tmp_path / "checkout"
    target.mkdir()
    for name in (*SOURCES, *READ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, target / name)
    return target


def _expected(checkout: Path) -> set[str]:
    """Every module of the checkout, by its place in an installed package."""
    own = {path.relative_to(checkout).as_posix() for path in (checkout / "mllm_fast").rglob("*.py")}
    kernels = {f"mllm_fast/{path.relative_to(checkout).as_posix()}" for path in (checkout / "kernels").rglob("*.py")}
    assert "mllm_fast/kernels/runtime.py" in kernels
    assert any(name.startswith("mllm_fast/kernels/attention/") for name in kernels)
    return own | kernels | {"mllm_fast/py.typed", "mllm_fast/kernels/attention/measured.json"}


def _wheel_names(folder: Path) -> set[str]:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def _pip_wheel(source: Path, out: Path) -> set[str]:
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source)
    _run(*command, cwd=out.parent)
    return _wheel_names(out)


def test_kernels_is_a_relative_link_to_a_folder_that_is_no_regular_package() -> None:
    link = ROOT / "mllm_fast" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@needs_build
def test_wheel_holds_every_module_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    assert _pip_wheel(checkout, tmp_path / "wheel") == _expected(checkout)


@needs_build
def test_wheel_built_from_the_sdist_holds_the_same(checkout: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    _run(sys.executable, "-c", build, tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()], "links break on unpacking"
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    written = [path for name in READ for path in (checkout / name, *(checkout / name).rglob("*")) if path.is_file()]
    assert names >= {path.relative_to(checkout).as_posix() for path in written} | {"LICENSE", "README.md"}
    assert not [name for name in names if name.startswith(("tests/", "bench/", ".")) or "__pycache__" in name]
    assert _pip_wheel(sdist, tmp_path / "wheel") == _expected(checkout)


@needs_build
def test_editable_install_needs_neither_network_nor_dependencies(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    flags = ("--no-deps", "--no-build-isolation", "--target", site)
    _run(sys.executable, "-m", "pip", "install", *flags, "-e", checkout, cwd=tmp_path)
    # -S leaves out the .pth files of this environment, which may hold an editable install of its own; `addsitedir`
    # reads those of the new one. Libraries come last, so that they shadow nothing.
    libraries = [path for path in sys.path if "site-packages" in path]
    probe = (
        f"import json, site, sys; sys.path += [sys.argv[1], *{libraries!r}]; site.addsitedir(sys.argv[1]);"
        "import mllm_fast, mllm_fast.kernels.runtime as runtime;"
        "print(json.dumps([mllm_fast.__file__, runtime.__file__]))"
    )
    output = _run(sys.executable, "-S", "-c", probe, site, cwd=tmp_path)
    package, runtime = json.loads(output)
    assert Path(package) == checkout / "mllm_fast" / "__init__.py"
    assert Path(runtime).resolve() == checkout / "kernels" / "runtime.py"
    assert (site / "bin" / "mllm-fast").exists()


@needs_build
def test_the_wheel_works_in_a_fresh_environment(checkout: Path, tmp_path: Path) -> None:
    _pip_wheel(checkout, tmp_path / "wheel")
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    said = fresh_environment.check(wheel, tmp_path / "fresh")
    assert "the installed package works" in said
    assert f"mllm-fast {mllm_fast.__version__}" in said
    assert "norm_linear" in said


def test_version_and_changelog_agree() -> None:
    """The version is semantic, and the changelog tells of it."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", mllm_fast.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in changelog
    assert mllm_fast.__version__ in changelog


def test_other_projects_import_from_the_repository_root() -> None:
    """A folder `kernels` in the working directory must not pass for the project of that name that these look for."""
    libraries = [name for name in ("transformers", "bitsandbytes", "peft") if importlib.util.find_spec(name)]
    code = (
        f"import {', '.join(libraries)}, transformers.integrations.hub_kernels\n"
        "from transformers.utils import is_kernels_available\n"
        "import mllm_fast.kernels.runtime\n"
        "print(is_kernels_available())"
    )
    assert _run(sys.executable, "-c", code, cwd=ROOT).split()[-1] == str(_installed("kernels"))


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def test_importing_the_package_is_light() -> None:
    """No torch, so no device and no compilation, until a name is used; and every public name resolves."""
    code = (
        "import sys, mllm_fast\n"
        "assert not {'torch', 'triton', 'transformers'} & set(sys.modules), 'importing loads a library'\n"
        "import torch\n"
        "for name in mllm_fast.__all__: getattr(mllm_fast, name)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'open_flamingo' not in sys.modules and 'flamingo_pytorch' not in sys.modules\n"
    )
    _run(sys.executable, "-c", code, cwd=ROOT)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(mllm_fast, "no_such_name")
    assert set(mllm_fast.__all__) <= set(dir(mllm_fast))

"""Installs a wheel or an sdist into a new virtual environment and uses it there: `python tests/fresh_environment.py dist/*`.

The environment gets nothing but that. It finds torch and the other requirements in the environment that this is run
with, so that no gigabytes are downloaded; an editable install of this project there does not come along.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SMOKE = """
import importlib.metadata, pathlib, sys
import mllm_fast, mllm_fast.kernels.runtime as runtime

home = pathlib.Path(mllm_fast.__file__).parent
assert home.is_relative_to(sys.prefix), f"{home} is not the installed package"
assert pathlib.Path(runtime.__file__).is_relative_to(home), "the kernels are not in the package"
assert not (home / "kernels").is_symlink()
assert (home / "py.typed").exists()
distribution = importlib.metadata.distribution("mllm-fast")
assert distribution.version == mllm_fast.__version__
assert distribution.metadata["License-Expression"] == "Apache-2.0"
assert any(file.name == "LICENSE" for file in distribution.files)

import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mllm_fast import ops

for name in mllm_fast.__all__:
    getattr(mllm_fast, name)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
model = Blip2QFormerModel._from_config(Blip2QFormerConfig(**sizes, encoder_hidden_size=24)).eval()
queries, image = torch.randn(2, 4, 32), torch.randn(2, 5, 24)
with torch.no_grad():
    before = model(queries, encoder_hidden_states=image).last_hidden_state
    report = mllm_fast.fuse(model)
    after = model(queries, encoder_hidden_states=image).last_hidden_state
assert report.fused
torch.testing.assert_close(after, before)
x = torch.randn(3, 8)
torch.testing.assert_close(ops.rms_norm(x), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
print("the installed package works:", mllm_fast.__version__)
"""


def check(distribution: Path, folder: Path) -> str:
    """Make an environment in `folder`, install wheel or sdist, run a smoke test and the command; returns what they print."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    # A .pth file adds a folder without reading the .pth files in it: no editable install comes along.
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "requirements_of_the_host.pth").write_text("".join(f"{path}\n" for path in libraries))
    pip = (sys.executable, "-m", "pip", "--python", python)
    # An sdist is built by the setuptools of the host.
    install = (*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", distribution.resolve())
    return "".join(
        _run(*command, cwd=folder)
        for command in (
            install,
            (python, "-c", SMOKE),
            (folder / "bin" / "mllm-fast", "--version"),
            (folder / "bin" / "mllm-fast", "info"),
        )
    )


def _run(*command: str | Path, cwd: Path) -> str:
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """Check each distribution, in an environment of its own."""
    if not arguments:
        sys.exit("usage: python tests/fresh_environment.py FILE...")
    for distribution in map(Path, arguments):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{distribution.name}:\n{check(distribution, Path(folder))}", end="")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

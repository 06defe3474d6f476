"""The `mllm-fast` command: `info`, and what it says about requests it cannot serve."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mllm_fast import __version__, cli, information
from mllm_fast.kernels import runtime
from mllm_fast.models import captioner


def _fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run the command, expect status 2 and one line on stderr, and return that line."""
    try:
        status = cli.main(argv)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_info_json_lists_devices_versions_and_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["devices"][0]["kind"] == "cpu"
    assert len(info["devices"]) == 1 + torch.cuda.device_count()
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["mllm-fast"] == __version__
    assert set(info["versions"]) == {"python", "mllm-fast", *information.LIBRARIES}
    ops = {op["name"]: op for op in info["ops"]}
    assert set(ops) == {op.name for op in runtime.ops()}
    assert {"attention", "gated_residual", "layer_norm", "linear_residual", "norm_linear", "rms_norm"} <= set(ops)
    for op in ops.values():
        assert op["implementation"] in ("torch", "triton")
        assert op["reason"]
        assert op["summary"]


def test_info_json_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    """What a user attached to a report of a bug can be shown as tables elsewhere."""
    assert cli.main(["info", "--json"]) == 0
    info = information.Info.from_json(capsys.readouterr().out)
    assert info == information.collect_info()
    assert info.system
    information.print_info(info)
    assert info.system.split("-")[0] in capsys.readouterr().out


def test_info_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for text in ("Devices", "Versions", "Ops", "Triton kernels", "attention", torch.__version__, "cpu"):
        assert text in out


def test_info_without_an_optional_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(information, "LIBRARIES", ("torch", "a-library-nobody-has"))
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["a-library-nobody-has"] is None
    assert cli.main(["info"]) == 0
    assert "not installed" in capsys.readouterr().out


def test_info_names_versions_that_this_was_not_made_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert information.collect_info().unsupported == {}
    real = information.library_version
    monkeypatch.setattr(information, "library_version", lambda n: "5.99.0" if n == "transformers" else real(n))
    monkeypatch.setattr(
        metadata, "requires", lambda _: ["transformers<5.24,>=5.17", "torch>=2.11", "einops; extra == 'test'"]
    )
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unsupported"] == {"transformers": ">=5.17,<5.24"}
    assert cli.main(["info"]) == 0
    assert "5.99.0 (made for >=5.17,<5.24)" in capsys.readouterr().out


def test_a_version_names_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels of torch with CUDA have it in their module alone, and reports of bugs need it."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert information.library_version("torch") == "2.13.0+cu130"
    assert information.library_version("no-such-library") is None


def test_info_says_why_a_kernel_does_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_ops", dict(runtime._ops))
    runtime.register_op("an_op", "an op with kernels", has_triton=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    (op,) = [op for op in info["ops"] if op["name"] == "an_op"]
    assert op["implementation"] == "torch"
    assert "no GPU" in op["reason"] or "not installed" in op["reason"]
    assert info["triton"].startswith("cannot run: ")


def test_info_lists_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=141 * 2**30, gcnArchName="gfx942")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for cuda, target in (("13.0", "sm_90"), (None, "gfx942")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert cli.main(["info", "--json"]) == 0
        device = json.loads(capsys.readouterr().out)["devices"][1]
        assert device == {"name": "cuda:0", "kind": "cuda", "detail": f"A GPU, {target}", "memory_gib": 141.0}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "required: COMMAND"),
        (("no-such-command",), "'no-such-command'"),
        (("info", "--no-such-flag"), "--no-such-flag"),
        (("generate",), "required: MODEL, IMAGE"),
        (("generate", "model", "image.png", "--max-new-tokens", "0"), "at least 1, got '0'"),
        (("generate", "model", "image.png", "--max-new-tokens", "many"), "at least 1, got 'many'"),
        (("generate", "no-such-model", "image.png"), "image.png does not exist"),
    ],
)
def test_bad_commands(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], says: str) -> None:
    line = _fails(capsys, *argv)
    assert line.startswith("mllm-fast")
    assert ": error: " in line
    assert says in line


def test_generate_names_the_missing_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    missing = tmp_path / "image.png"
    assert f"{missing} does not exist" in _fails(capsys, "generate", str(tmp_path / "model"), str(missing))


def test_demo_names_the_missing_libraries(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    line = _fails(capsys, "demo")
    assert "matplotlib, skimage, sklearn" in line
    assert "mllm-fast[demo]" in line


def test_demo_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in cli.DEMO_MODULES:
        pytest.importorskip(name)
    calls: list[tuple[Path, bool, tuple[str, ...]]] = []

    def run(out_dir: Path, quick: bool = False, only: Sequence[str] = ()) -> int:
        calls.append((out_dir, quick, tuple(only)))
        return 3

    demo = types.ModuleType("mllm_fast.demo")
    monkeypatch.setattr(demo, "run", run, raising=False)
    monkeypatch.setitem(sys.modules, "mllm_fast.demo", demo)
    assert cli.main(["demo", "--out", str(tmp_path), "--quick"]) == 3
    assert cli.main(["demo", "--only", "llava", "digits"]) == 3
    assert calls == [(tmp_path, True, ()), (Path("demo_output"), False, ("llava", "digits"))]


def test_generate_prints_a_line_per_image(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, first, second = (tmp_path / name for name in ("model", "1.png", "2.png"))
    model.mkdir()
    for path in (model / captioner.CONFIG_FILE, first, second):
        path.touch()

    def generate_captions(
        path: str, images: Sequence[Path], prompt: str | None = None, max_new_tokens: int = 1, llm: str | None = None
    ) -> list[str]:
        assert (path, llm) == (str(model), "nf4")
        return [f"{prompt} {max_new_tokens} {image.name}" for image in images]

    monkeypatch.setattr(captioner, "generate_captions", generate_captions)
    command = [
        "generate",
        str(model),
        str(first),
        str(second),
        "--prompt",
        "a",
        "--max-new-tokens",
        "4",
        "--llm",
        "nf4",
    ]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{first}: a 4 1.png\n{second}: a 4 2.png\n"
    for more in (["--num-beams", "2"], ["--no-fuse"], ["--dtype", "float32"], ["--device", "cpu"], ["--cuda-graphs"]):
        line = _fails(capsys, *command, *more)
        assert f"greedily, on the CPU; leave out {more[0]}" in line


def test_an_error_is_one_line_unless_debugging(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(cli, "collect_info", broken)
    assert _fails(capsys, "info") == "mllm-fast: error: RuntimeError: two lines\n"
    with pytest.raises(RuntimeError, match="two\nlines"):
        cli.main(["--debug", "info"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "collect_info", interrupted)
    assert cli.main(["info"]) == 130


def test_bench_gets_its_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["bench", "--list", "qformer"]) == 0
    assert "attention.qformer" in capsys.readouterr().out
    assert cli.main(["bench", "no-such-workload"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert "usage: mllm-fast bench" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert "run this in a checkout" in _fails(capsys, "bench")


def test_bench_runs_from_any_folder(tmp_path: Path) -> None:
    """The installed command has no checkout on its path, neither the one of the package nor the folder that it is run in."""
    checkout = str(Path(cli.__file__).parents[1])
    code = (
        "import sys\n"
        f"sys.path.insert(0, {checkout!r})\n"
        "import mllm_fast\n"
        f"sys.path = [path for path in sys.path if path not in ('', {checkout!r})]\n"
        "from mllm_fast import cli\n"
        "sys.exit(cli.main(['bench', '--list', 'qformer']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "attention.qformer" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mllm-fast {__version__}\n"

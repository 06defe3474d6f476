"""`mllm-fast generate` and `verify` on folders with tiny models of several systems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mllm_fast import cli
from mllm_fast.pipeline import drawn_image, load_pipeline, read_image
from mllm_fast.quantization import loading
from tests.cli.systems import SYSTEMS

# Several images are several prompts.
ONE_IMAGE = ("blip", "blip2", "instructblip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("systems")
    for name, write in SYSTEMS.items():
        write(root / name)
    return {name: root / name for name in SYSTEMS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        drawn_image(40 + 10 * i).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(2)]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("name", SYSTEMS)
def test_generate_says_the_same_fused_and_unfused(
    folders: dict[str, Path], pictures: list[str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = ("generate", str(folders[name]), *pictures, "--prompt", "what is", "--max-new-tokens", "5")
    options = ("--dtype", "float32", "--device", "cpu")
    said = [run(capsys, *arguments, *options, flag) for flag in ("--fuse", "--no-fuse")]
    assert [status for status, _, _ in said] == [0, 0], said
    assert said[0][1] == said[1][1]
    lines = said[0][1].splitlines()
    assert len(lines) == (2 if name in ONE_IMAGE else 1)
    assert all(any(line.startswith(p) for p in pictures) for line in lines if name in ONE_IMAGE)
    pipeline = load_pipeline(folders[name], fuse=False, device="cpu")
    assert len(pipeline.generate([read_image(p) for p in pictures], max_new_tokens=2)) == len(lines)


def test_generate_with_cuda_graphs(
    folders: dict[str, Path], pictures: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", str(folders["llava"]), pictures[0], "--max-new-tokens", "2")
    status, _, err = run(capsys, *command, "--cuda-graphs", "--device", "cpu")
    assert status == 2 and err.count("\n") == 1
    assert "CUDA graphs need a GPU" in err and "device 'cuda'" in err
    status, _, err = run(capsys, *command, "--cuda-graphs", "--no-fuse")
    assert status == 2 and "fuse=False" in err
    # Fused with them, it runs on a CPU too.
    monkeypatch.setattr(loading, "check_cuda_graphs", lambda *_, **__: None)
    fused: list[bool] = []
    fuse = loading._fuse
    monkeypatch.setattr(loading, "_fuse", lambda m, **given: fused.append(given["cuda_graphs"]) or fuse(m, **given))
    said = [run(capsys, *command, "--device", "cpu", *flag) for flag in ((), ("--cuda-graphs",))]
    assert said[0] == said[1] and said[0][0] == 0
    assert fused == [False, True]


@pytest.mark.parametrize("llm", ["nf4", "int8"])
def test_generate_with_a_quantised_language_model(
    folders: dict[str, Path], pictures: list[str], capsys: pytest.CaptureFixture[str], llm: str
) -> None:
    status, out, err = run(capsys, "generate", str(folders["llava"]), pictures[0], "--llm", llm, "--num-beams", "2")
    assert status == 0, err
    assert out.startswith(pictures[0])


@pytest.mark.parametrize("name", SYSTEMS)
def test_verify(
    folders: dict[str, Path], pictures: list[str], capsys: pytest.CaptureFixture[str], name: str, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    status, said, err = run(capsys, "verify", str(folders[name]), *pictures, "--out", str(out), "--dtype", "float32")
    assert status == 0, said + err
    assert "passed" in said
    report = json.loads(out.read_text())
    assert report["passed"] is True
    assert (report["native"] if name == "flamingo" else report["fused"]) > 0
    status, said, err = run(capsys, "verify", str(folders[name]), "--dtype", "bfloat16")
    assert status == 0, said + err


@pytest.mark.parametrize("llm", ["nf4", "int8"])
def test_verify_over_a_quantised_language_model(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], llm: str
) -> None:
    status, said, err = run(capsys, "verify", str(folders["llava"]), "--llm", llm, "--dtype", "bfloat16")
    assert status == 0, said + err


def test_errors_are_one_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.png").write_text("no picture")
    whole = tmp_path / "whole.png"
    Image.new("RGB", (64, 64), "red").save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:60])
    model = str(folders["llava"])
    for argv, says in (
        (("generate", model, str(tmp_path / "text.png")), "not an image that Pillow can read"),
        (("generate", model, str(tmp_path / "cut.png")), "damaged"),
        (("generate", "no-such/model", str(whole)), "no-such/model"),
        (("verify", str(tmp_path)), str(tmp_path)),
    ):
        status, _, err = run(capsys, *argv)
        assert status == 2
        assert err.count("\n") == 1
        assert says in err

"""`mllm-fast generate` and `verify` on folders with tiny models of several systems."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm_fast import cli
from mllm_fast.pipeline import drawn_image, load_pipeline, read_image
from mllm_fast.quantization import loading
from tests.cli.systems import SYSTEMS
from tests.families import qformers
from tests.families.upstream_versions import IDEFICS_BEAMS

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


@pytest.mark.parametrize("name", [pytest.param(n, marks=IDEFICS_BEAMS) if n == "idefics" else n for n in SYSTEMS])
def test_an_answer_is_what_was_generated(folders: dict[str, Path], pictures: list[str], name: str) -> None:
    """Without the prompt, also where other ids stand in the image's places of what `generate` returns; for each sequence."""
    pipeline = load_pipeline(folders[name], fuse=False, device="cpu", dtype=torch.float32)
    images, prompt = [read_image(p) for p in pictures], "what is"
    settings = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "min_new_tokens": 4}
    inputs = pipeline.inputs(images, prompt)
    ids = pipeline.model.generate(**inputs, **settings)
    texts = pipeline.processor.batch_decode(ids[:, -4:], skip_special_tokens=True)
    answers = pipeline.generate(images, prompt, **settings)
    assert len(answers) == 2 * (len(images) if name in ONE_IMAGE else 1)
    if name == "blip":  # its prompt is what the caption begins with
        assert all(answer.endswith(text.strip()) for answer, text in zip(answers, texts, strict=True))
    else:
        assert answers == [text.strip() for text in texts]


def test_an_answer_ends_where_the_system_ends_answers(
    folders: dict[str, Path], pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(folders["minigpt4"], device="cpu")
    images = [read_image(p) for p in pictures]
    given: dict[str, Any] = {}

    def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        given.update(kwargs)
        said = pipeline.processor.tokenizer("a###Human: b", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat((input_ids.clamp(min=1), said), dim=1)

    monkeypatch.setattr(pipeline.model, "generate", generate)
    assert pipeline.generate(images, "what is") == ["a"]
    assert given["stop_strings"] == ["###"]
    assert given["tokenizer"] is pipeline.processor.tokenizer


def test_frames_of_a_video(folders: dict[str, Path], pictures: list[str], tmp_path: Path) -> None:
    """As many as there are, in their order, before the instruction; prepared as InstructBLIP prepares a picture."""
    pipeline = load_pipeline(folders["instructblipvideo"], device="cpu", dtype=torch.float32)
    images = [read_image(p) for p in (*pictures, pictures[0])]
    inputs = pipeline.inputs(images, "what is")
    one = load_pipeline(folders["instructblip"], device="cpu", dtype=torch.float32).inputs(images, "what is")
    assert torch.equal(inputs["pixel_values"], one["pixel_values"][None])
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        assert torch.equal(inputs[name], one[name][:1])
    ids, queries = inputs["input_ids"], qformers.QUERIES
    assert ids[0].tolist() == [qformers.IMAGE_TOKEN] * 3 * queries + one["input_ids"][0, queries:].tolist()
    assert torch.equal(inputs["attention_mask"], torch.ones_like(ids))
    with pytest.raises(ValueError, match="no frames"):
        pipeline.inputs([], "what is")
    # Older folders have the settings in files of their own.
    for file in ("video_preprocessor_config.json", "preprocessor_config.json"):
        older = tmp_path / file.split("_")[0]
        shutil.copytree(folders["instructblipvideo"], older)
        settings = json.loads((older / "processor_config.json").read_text())
        (older / file).write_text(json.dumps(settings.pop("video_processor")))
        (older / "processor_config.json").write_text(json.dumps(settings))
        again = load_pipeline(older, device="cpu", dtype=torch.float32).inputs(images, "what is")
        assert all(torch.equal(again[name], inputs[name]) for name in inputs)


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
    if name != "blip":  # whose prompt is the beginning of the caption
        assert report["new_tokens"] == 8 * (len(pictures) if name in ONE_IMAGE else 1)
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.png").write_text("no picture")
    whole = tmp_path / "whole.png"
    Image.new("RGB", (64, 64), "red").save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:60])
    model = str(folders["llava"])
    for kind in ("llava", "instructblipvideo"):
        shutil.copytree(folders[kind], tmp_path / kind)
        for file in (tmp_path / kind).glob("*processor_config.json"):
            file.unlink()
    for argv, says in (
        (("generate", model, str(tmp_path / "text.png")), "not an image that Pillow can read"),
        (("generate", model, str(tmp_path / "cut.png")), "damaged"),
        (("generate", "no-such/model", str(whole)), "no-such/model"),
        (("verify", str(tmp_path)), str(tmp_path)),
        (("generate", str(tmp_path / "llava"), str(whole)), "holds a model but not its whole processor"),
        (("verify", str(tmp_path / "instructblipvideo")), "does not say how frames are prepared"),
        (("generate", model, str(whole), "--device", "cuda"), "torch finds no GPU here"),
    ):
        status, _, err = run(capsys, *argv)
        assert status == 2
        assert err.count("\n") == 1
        assert says in err

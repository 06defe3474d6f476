"""Files that were cut short, overwritten or never were what their name says: an error that a person can act on.

Every loader raises a ValueError or an OSError that names the file or folder; the command prints one line and ends with 2.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

import mllm_fast
from mllm_fast import cli
from mllm_fast.models.captioner import Captioner
from mllm_fast.models.flamingo import Flamingo
from mllm_fast.models.original_checkpoint import read_checkpoint
from mllm_fast.pipeline import drawn_image, read_image
from tests.cli.systems import SYSTEMS
from tests.models.helpers import Vision, flamingo, language_model

GARBAGE = (b"", b"\0", b"{", b"[]", b"null", b"{}", b"not JSON", b'{"a": 1}', bytes(range(256)))


def cuts(content: bytes) -> list[bytes]:
    """The beginnings of a file, and files that hold something else."""
    size = len(content)
    return [content[:length] for length in (1, 7, 8, 9, 100, size // 3, size - 200, size - 1)] + list(GARBAGE[:7])


def flipped(content: bytes, data: st.DataObject) -> bytes:
    """Some bytes overwritten, where most formats keep what they are."""
    changed = bytearray(content)
    places = st.integers(0, len(content) - 1) | st.integers(0, min(80, len(content) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
        changed[place] = value
    return bytes(changed)


def check(path: Path, read: Callable[[Path], Any]) -> None:
    """What was overwritten may be no harm; otherwise the error is one line that names the file."""
    said = str(path)
    try:
        read(path)
    except ValueError as error:
        said = str(error)
    assert str(path) in said
    assert "\n" not in said


# images


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    drawn_image(24).save(buffer, kind)
    return buffer.getvalue()


KINDS = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "ICO", "PPM")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_images(kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"image.{kind.lower()}"
    content = encoded(kind)
    damaged = data.draw(st.sampled_from(cuts(content)) | st.builds(lambda: flipped(content, data)))
    path.write_bytes(damaged)
    check(path, read_image)


def test_an_image_of_a_billion_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes may claim to be a picture that fills the memory."""
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded("PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"bomb\.png"):
        read_image(path)


# checkpoints in the originals' layouts


def pickled(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    state = {"model": {"a.weight": torch.randn(4, 5), "b": torch.arange(3)}}
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "model.pth": lambda: pickled(True),
    "model.pt": lambda: pickled(False),
    "model.safetensors": lambda: save_safetensors({"a.weight": torch.randn(4, 5), "b": torch.arange(3)}),
}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_cut_checkpoints(name: str, meta: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in cuts(CHECKPOINTS[name]()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name) as caught:
            read_checkpoint(path, meta=meta)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CHECKPOINTS)
@settings(max_examples=60)
@given(data=st.data(), meta=st.booleans())
def test_overwritten_checkpoints(
    name: str, meta: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(flipped(CHECKPOINTS[name](), data))
    check(path, functools.partial(read_checkpoint, meta=meta))


@pytest.mark.parametrize("content", [*GARBAGE, b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}'], ids=str)
def test_damaged_indices(content: bytes, tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_bytes(content)
    with pytest.raises(ValueError, match="index"):
        read_checkpoint(tmp_path)


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    """Shards lie beside their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "other.bin").write_bytes(pickled(True))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../other.bin"}}))
    with pytest.raises(ValueError, match=r"\.\./other\.bin"):
        read_checkpoint(folder)


# bridges and captioners


@pytest.mark.parametrize("name", ["bridge.json", "bridge.safetensors"])
def test_bridges(name: str, tmp_path: Path) -> None:
    model = flamingo()
    model.save_bridge(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for content in (*cuts(whole), *GARBAGE):
        (tmp_path / name).write_bytes(content)
        for load in (model.load_bridge, lambda path: Flamingo.from_bridge(path, language_model(), Vision())):
            if name == "bridge.json" and content == whole[:-1]:
                continue  # the newline at its end
            with pytest.raises(ValueError, match=str(tmp_path)) as caught:
                load(tmp_path)
            assert "Traceback" not in str(caught.value)


def test_captioners(tmp_path: Path) -> None:
    for name in ("lm", "tokenizer"):
        (tmp_path / name).mkdir()
    from mllm_fast.models import captioner

    folder = tmp_path / "captioner"
    for name in (captioner.LANGUAGE_MODEL_FOLDER, captioner.TOKENIZER_FOLDER):
        (folder / name).mkdir(parents=True)
    for content in (*GARBAGE, b'{"vision": 3}', b'{"vision": {"no such option": 3}}'):
        (folder / captioner.CONFIG_FILE).write_bytes(content)
        with pytest.raises(ValueError, match=captioner.CONFIG_FILE):
            Captioner.load(folder)


# folders as transformers writes them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "llava"
    SYSTEMS["llava"](path)
    drawn_image(28).save(path.parent / "image.png")
    return path


FILES = ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", FILES)
def test_models(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / name).read_bytes()
    copied = Path(shutil.copytree(folder, tmp_path / "llava"))
    kinds: list[Any] = [whole[: len(whole) // 2], whole[:-20], b"", b"[]", b"\0\1\2"]
    for content in kinds:
        (copied / name).write_bytes(content)
        if name in ("config.json", "model.safetensors"):
            with pytest.raises((ValueError, OSError), match="llava"):
                mllm_fast.load(copied, device="cpu", local_files_only=True)
        status = cli.main(["generate", str(copied), str(folder.parent / "image.png"), "--device", "cpu"])
        said = capsys.readouterr().err
        assert status == 2, (content, said)
        lines = [line for line in said.splitlines() if "mllm-fast: error:" in line]
        assert len(lines) == 1, said
        assert "Traceback" not in said


@pytest.mark.parametrize("llm", [None, "nf4", "int8"])
def test_weights_that_are_not_there(
    llm: str | None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would draw them at random and go on."""
    copied = Path(shutil.copytree(folder, tmp_path / "llava"))
    state = load_safetensors((copied / "model.safetensors").read_bytes())
    gone = [name for name in state if "o_proj" in name]
    assert len(gone) == 2
    rest = {name: value for name, value in state.items() if name not in gone}
    (copied / "model.safetensors").write_bytes(save_safetensors(rest, metadata={"format": "pt"}))
    command = ["generate", str(copied), str(folder.parent / "image.png"), "--device", "cpu"]
    assert cli.main([*command, *(("--llm", llm) if llm else ())]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert str(copied) in said and "self_attn.o_proj.weight" in said and "random" in said


def test_a_folder_with_lora_in_it(folder: Path, tmp_path: Path) -> None:
    """The names in such a file are those of a model that PEFT has adapted; no plain model has them."""
    for llm, says in ((None, "adapted are not those of a whole Llava"), ("nf4", "adapted cannot be read.*LoRA in it")):
        model: Any = mllm_fast.load(folder, llm=llm, device="cpu")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
        model.save_pretrained(tmp_path / "adapted")
        with pytest.raises(ValueError, match=says):
            mllm_fast.load(tmp_path / "adapted", device="cpu")


def test_quantised_models(tmp_path: Path) -> None:
    from tests.quantization.systems import blip2

    blip2().save_pretrained(tmp_path / "plain")
    model = mllm_fast.load(tmp_path / "plain", llm="nf4", device="cpu", dtype=torch.float32)
    model.save_pretrained(tmp_path / "nf4")  # type: ignore[operator]
    file = tmp_path / "nf4" / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:9], b""):
        file.write_bytes(content)
        with pytest.raises((ValueError, OSError), match="nf4"):
            mllm_fast.load(tmp_path / "nf4", device="cpu")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    file.write_bytes(whole)
    for wrong in ({"quant_method": "no such method"}, {"quant_method": "bitsandbytes", "load_in_4bit": "maybe"}, 3):
        (tmp_path / "nf4" / "config.json").write_text(json.dumps(config | {"quantization_config": wrong}))
        with pytest.raises((ValueError, OSError, TypeError)):
            mllm_fast.load(tmp_path / "nf4", device="cpu")

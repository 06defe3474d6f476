"""No file that a user is given runs code when it is loaded: pickles, code beside a configuration, tags in YAML."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm_fast
from mllm_fast import cli
from mllm_fast.models import flamingo_checkpoint, llava_checkpoint, minigpt4_checkpoint, mplug_owl
from mllm_fast.models.original_checkpoint import read_checkpoint
from mllm_fast.pipeline import load_pipeline
from tests.cli.systems import SYSTEMS
from tests.families import llava_models
from tests.models import minigpt4_models, mplug_owl_models
from tests.models.helpers import flamingo


class Payload:
    """Unpickling it creates a file, as an attacker's would do worse."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def test_the_payload_works(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()


# A loader of every kind of checkpoint, on the path of a pickle.
LOADERS: dict[str, Callable[[Path], Any]] = {
    "read_checkpoint": read_checkpoint,
    "read_checkpoint of shapes": lambda path: read_checkpoint(path, meta=True),
    "flamingo": lambda path: flamingo_checkpoint.load_original(flamingo(), path),
    "llava projector": lambda path: llava_checkpoint.load_projector(llava_models.model(), path),
    "minigpt4": lambda path: minigpt4_checkpoint.load_original(minigpt4_models.minigpt4(), path),
    "mplug_owl": lambda path: mplug_owl.load_original(mplug_owl_models.owl(), path),
}


@pytest.mark.parametrize("form", ["zip", "old torch", "plain pickle", "below a key", "as the whole"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_pickle(name: str, form: str, tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "model.pth"
    tensors = {"model": {"weight": torch.zeros(2)}}
    content: Any = Payload(proof) if form == "as the whole" else {**tensors, "hook": Payload(proof)}
    if form == "below a key":
        content = {"model": {"weight": Payload(proof)}}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "old torch")
    with pytest.raises(ValueError, match=r"nothing else is loaded|damaged or no checkpoint"):
        LOADERS[name](path)
    assert not proof.exists()


def system(folder: Path, name: str = "llava") -> Path:
    SYSTEMS[name](folder / name)
    return folder / name


def test_pickled_weights_in_a_folder(tmp_path: Path) -> None:
    """transformers reads pytorch_model.bin where there are no safetensors."""
    folder, proof = system(tmp_path), tmp_path / "proof"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(2), "hook": Payload(proof)}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError)):
        mllm_fast.load(folder, device="cpu", local_files_only=True)
    assert not proof.exists()


CODE = "import pathlib\npathlib.Path({proof!r}).touch()\nclass Own: pass\n"
CLASSES = {
    "config.json": {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForImageTextToText": "own.Own"},
    "processor_config.json": {"AutoProcessor": "own.Own"},
    "preprocessor_config.json": {"AutoProcessor": "own.Own", "AutoImageProcessor": "own.Own"},
    "tokenizer_config.json": {"AutoProcessor": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]},
}


@pytest.mark.parametrize("unknown", [False, True], ids=["known class", "unknown class"])
@pytest.mark.parametrize("name", CLASSES)
def test_code_beside_a_configuration(
    name: str, unknown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An auto_map names classes in .py files of the folder. Nobody is asked whether to run them, whoever sits there."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, proof = system(tmp_path), tmp_path / "proof"
    (folder / "own.py").write_text(CODE.format(proof=str(proof)))
    file = folder / name
    values = json.loads(file.read_text()) if file.exists() else {}
    values["auto_map"] = CLASSES[name]
    if unknown:
        kinds = {"config.json": "model_type", "preprocessor_config.json": "image_processor_type"}
        values[kinds.get(name, "processor_class" if name.startswith("processor") else "tokenizer_class")] = "Own"
    file.write_text(json.dumps(values))
    with contextlib.suppress(ValueError, OSError, ImportError, AttributeError):
        load_pipeline(folder, device="cpu")
    assert not proof.exists()
    image = tmp_path / "image.png"
    shutil.copy(_picture(tmp_path), image)
    status = cli.main(["generate", str(folder), str(image), "--device", "cpu", "--max-new-tokens", "2"])
    said = capsys.readouterr().err
    assert status == 0 or (status == 2 and said.count("\n") == 1), said
    assert not proof.exists()


def test_a_pickled_adapter(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    torch.save({"weight": torch.zeros(2), "hook": Payload(proof)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="nothing else is loaded"):
        llava_checkpoint.load_lora(llava_models.model(), tmp_path)
    assert not proof.exists()


def test_a_tag_in_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof, config = tmp_path / "proof", tmp_path / "config.yaml"
    config.write_text(
        f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{proof}]]\n"
    )
    if "finetune" not in [command.name for command in cli.COMMANDS]:
        pytest.skip("this version has no command that reads YAML")
    assert cli.main(["finetune", str(config)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not proof.exists()


def _picture(folder: Path) -> Path:
    from mllm_fast.pipeline import drawn_image

    path = folder / "drawn.png"
    drawn_image(28).save(path)
    return path

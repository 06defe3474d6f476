"""The captioner's folder: self-contained, read back whole, and clear about what it cannot read."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_fast.demo.digits import build_bridge, build_tokenizer
from mllm_fast.models.captioner import Captioner, generate_captions
from mllm_fast.models.patch_encoder import PatchEncoder
from mllm_fast.quantization import quantize_llm
from tests.models.helpers import flamingo


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    """Untrained, and so random that its words depend on the image."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = build_bridge(LlamaForCausalLM(config), tokenizer.convert_tokens_to_ids("<image>"))
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 2.0)
        elif name.startswith(("blocks.", "resampler.")) and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return Captioner(model, tokenizer)


def test_a_folder_is_all_there_is(captioner: Captioner, tmp_path: Path) -> None:
    folder = captioner.save(tmp_path / "bridge")
    assert sorted(path.name for path in folder.iterdir()) == [
        "bridge.json", "bridge.safetensors", "captioner.json", "language_model", "tokenizer",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [folder]
    moved = folder.rename(tmp_path / "elsewhere")
    images = 10 * torch.randn(6, 1, 8, 8)
    expected = captioner.caption(images, max_new_tokens=6)
    assert len(set(expected)) > 1
    assert Captioner.load(moved).caption(images, max_new_tokens=6) == expected


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_language_model(captioner: Captioner, kind: str, tmp_path: Path) -> None:
    """Saved as it is, and read back with mllm_fast's computation in it."""
    ours = copy.deepcopy(captioner)
    quantize_llm(ours.model, kind)
    images = 10 * torch.randn(6, 1, 8, 8)
    expected = ours.caption(images, max_new_tokens=6)
    again = Captioner.load(ours.save(tmp_path / "bridge"))
    assert again.caption(images, max_new_tokens=6) == expected
    layers = [m for m in again.model.lm.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert len(layers) == 14
    assert all(type(m).__qualname__.startswith("Fused") for m in layers)
    path = tmp_path / "digit.png"
    Image.fromarray(np.arange(0, 128, 2, dtype=np.uint8).reshape(8, 8)).save(path)
    plain = captioner.save(tmp_path / "plain")
    assert generate_captions(plain, [path], llm=kind) == generate_captions(tmp_path / "bridge", [path])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantised already"):
        generate_captions(tmp_path / "bridge", [path], llm=kind)  # type: ignore[arg-type]


def test_image_files_are_captioned(captioner: Captioner, tmp_path: Path) -> None:
    folder = captioner.save(tmp_path / "bridge")
    pixels = np.random.default_rng(0).integers(0, 120, (8, 8), dtype=np.uint8)
    paths = [tmp_path / "grey.png", tmp_path / "large.png", tmp_path / "colour.png", tmp_path / "ink_on_paper.png"]
    Image.fromarray(pixels).save(paths[0])
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(paths[1])
    Image.fromarray(pixels).convert("RGB").save(paths[2])
    Image.fromarray(255 - pixels).save(paths[3])
    expected = torch.from_numpy(pixels / np.float32(255))[None]
    for path in paths:
        torch.testing.assert_close(captioner.read(path), expected)
    captions = generate_captions(folder, paths, "a photo of", max_new_tokens=4)
    assert len(captions) == len(paths)
    assert len(set(captions)) == 1
    assert captions[0].startswith("a photo of")
    assert captions == captioner.caption(expected.expand(4, 1, 8, 8), "a photo of", max_new_tokens=4)


def test_it_replaces_only_captioners_and_only_when_asked(captioner: Captioner, tmp_path: Path) -> None:
    folder = captioner.save(tmp_path / "bridge")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        captioner.save(folder)
    (folder / "old").touch()
    captioner.save(folder, overwrite=True)
    assert not (folder / "old").exists()
    assert list(tmp_path.iterdir()) == [folder]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").touch()
    with pytest.raises(FileExistsError, match="thesis exists"):
        captioner.save(other, overwrite=True)
    assert (other / "chapter").exists()


def test_clear_errors(captioner: Captioner, tmp_path: Path) -> None:
    folder = captioner.save(tmp_path / "bridge")
    with pytest.raises(FileNotFoundError, match=r"no captioner in .*captioner.json, language_model, tokenizer missing"):
        generate_captions(tmp_path, [tmp_path])
    with pytest.raises(ValueError, match=r"unknown words; this model knows: .*handwritten"):
        captioner.caption(torch.rand(1, 1, 8, 8), "a picture of")
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    with pytest.raises(ValueError, match=r"notes.txt is not an image"):
        generate_captions(folder, [text])
    with pytest.raises(ValueError, match="at least one image"):
        generate_captions(folder, [])
    with pytest.raises(TypeError, match="expected a PatchEncoder"):
        Captioner(flamingo(), None)
    with pytest.raises(ValueError, match="patch must divide image_size"):
        PatchEncoder(8, 3, 4)
    with pytest.raises(ValueError, match=r"expected \(1, 8, 8\)"):
        captioner.model.vision_encoder(torch.rand(1, 3, 8, 8))

"""Saving and loading what was trained: complete, strict, atomic, and never over something else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_fast.models import BridgeMismatchError, Flamingo
from mllm_fast.models.bridge_file import write_atomically
from tests.models.helpers import Vision, config, flamingo, language_model, prompts


def logits(model: Flamingo) -> torch.Tensor:
    torch.manual_seed(5)
    ids, mask, images, image_mask = prompts()
    return model(ids, images, image_mask=image_mask, attention_mask=mask).logits


@pytest.mark.parametrize("train_vision", [False, True])
def test_a_bridge_comes_back(tmp_path: Path, train_vision: bool) -> None:
    model = flamingo(train_vision=train_vision)
    folder = model.save_bridge(tmp_path / "a" / "bridge")
    names = set(load_file(folder / "bridge.safetensors"))
    assert names == set(model.bridge_state_dict())
    assert any(name.startswith("vision_encoder.") for name in names) == train_vision
    assert not any(name.startswith("lm.") for name in names)
    assert json.loads((folder / "bridge.json").read_text()) == asdict(model.config)

    vision = Vision()
    if not train_vision:
        vision.load_state_dict(model.vision_encoder.state_dict())
    lm = language_model()
    lm.load_state_dict(model.lm.state_dict())
    again = Flamingo.from_bridge(folder, lm, vision).eval()
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))


def test_it_refuses_to_overwrite(tmp_path: Path) -> None:
    model = flamingo()
    model.save_bridge(tmp_path)
    before = (tmp_path / "bridge.safetensors").read_bytes()
    torch.nn.init.zeros_(model.blocks[0].attn_gate)
    with pytest.raises(FileExistsError, match=r"already holds bridge.safetensors and bridge.json.*overwrite=True"):
        model.save_bridge(tmp_path)
    assert (tmp_path / "bridge.safetensors").read_bytes() == before
    model.save_bridge(tmp_path, overwrite=True)
    assert (tmp_path / "bridge.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bridge.json", "bridge.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = flamingo()
    model.save_bridge(tmp_path)
    file = tmp_path / "bridge.safetensors"
    weights = load_file(file)
    weights["resampler.extra"] = torch.zeros(1)
    del weights["blocks.1.attn_gate"]
    weights["blocks.0.to_q.weight"] = torch.zeros(3, 5)
    save_file(weights, file, metadata={"config": (tmp_path / "bridge.json").read_text()})
    other = flamingo(seed=1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(BridgeMismatchError) as caught:
        other.load_bridge(tmp_path)
    message = str(caught.value)
    assert "missing: blocks.1.attn_gate" in message
    assert "unexpected: resampler.extra" in message
    assert "shape of blocks.0.to_q.weight: the file has (3, 5), the model has (32, 32)" in message
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_another_configuration_is_named(tmp_path: Path) -> None:
    flamingo().save_bridge(tmp_path)
    with pytest.raises(BridgeMismatchError, match="every: the file has 2, the model has 1"):
        flamingo(every=1).load_bridge(tmp_path)
    narrow = Flamingo(language_model(dim=16), Vision(), config())
    with pytest.raises(BridgeMismatchError, match=r"shape of blocks.0.norm.weight: the file has \(32,\)"):
        narrow.load_bridge(tmp_path)


def test_a_torn_pair_is_noticed(tmp_path: Path) -> None:
    model = flamingo()
    model.save_bridge(tmp_path)
    changed = asdict(model.config) | {"every": 1}
    (tmp_path / "bridge.json").write_text(json.dumps(changed))
    with pytest.raises(BridgeMismatchError, match="come from different saves"):
        flamingo(every=1).load_bridge(tmp_path)


def test_no_bridge_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bridge.json and bridge.safetensors missing"):
        flamingo().load_bridge(tmp_path / "nowhere")

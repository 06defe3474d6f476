"""Vision features on disk: the same losses bit for bit, no second run of the vision model, and no damaged file believed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mllm_fast.families.recipes import recipe_of, resolve
from mllm_fast.finetune.data import Sample
from mllm_fast.finetune.features import DamagedFeaturesWarning, FeatureCache, VisionIsTrainedError
from mllm_fast.finetune.stages import prepare_stage
from mllm_fast.models.patch_encoder import PatchEncoder
from tests.finetune import systems

STAGES = {
    "flamingo": "flamingo-bridge",
    "blip2-opt": "blip2-stage2",
    "blip2-t5": "blip2-stage2",
    "instructblip": "blip2-stage2",
    "llava": "llava-stage1",
    "minigpt4": "minigpt4-projection",
    "mplug-owl": "mplug-owl-lora",
    "blip2-stage1": "blip2-stage1",
}
BUILD = {**systems.SYSTEMS, "blip2-stage1": systems.blip2_stage1}
# Three batches an epoch, two epochs.
SETTINGS = {"batch_size": 2, "steps": 6, "learning_rate": 1e-3}


def vision_of(model: nn.Module) -> Any:
    return resolve(model, recipe_of(model).vision)[0]


def first_layer(model: nn.Module) -> nn.Module:
    return next(module for name, module in vision_of(model).named_modules() if name.endswith("layers.0"))


class Rows:
    """How many pictures went through a vision model's first layer."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        first_layer(model).register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count += len(args[0] if args else kwargs["hidden_states"])


def trained(name: str, folder: Path, cached: bool, samples: list[Sample] | None = None) -> tuple[list[float], int]:
    """Losses of two epochs, and how many pictures the vision model saw."""
    torch.manual_seed(0)
    model, processor = BUILD[name]()
    rows = Rows(model)
    run = prepare_stage(
        STAGES[name], model=model, processor=processor, data=samples or systems.samples(6),
        features=folder / "features" if cached else None, **SETTINGS,
    )  # fmt: skip
    losses = run.train(folder / f"run{int(cached)}{len(list(folder.iterdir()))}", progress=False).losses
    assert "forward" not in vision_of(model).__dict__
    return losses, rows.count


@pytest.mark.parametrize("name", STAGES)
def test_losses_are_the_same_and_a_picture_is_seen_once(name: str, tmp_path: Path) -> None:
    expected, seen = trained(name, tmp_path, cached=False)
    assert seen == 12
    found, seen = trained(name, tmp_path, cached=True)
    assert found == expected
    assert seen == 6
    # A second run needs the vision model no more.
    found, seen = trained(name, tmp_path, cached=True)
    assert found == expected
    assert seen == 0


def test_pictures_that_several_samples_share(tmp_path: Path) -> None:
    base = systems.samples(6)
    shared = [Sample(base[i // 2].images, sample.caption) for i, sample in enumerate(base)]
    expected, _ = trained("llava", tmp_path, cached=False, samples=shared)
    found, seen = trained("llava", tmp_path, cached=True, samples=shared)
    # Alone in its batch, a picture's last bits are other ones.
    assert found == pytest.approx(expected, rel=1e-5)
    assert seen == 3


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[tuple[Any, Any, FeatureCache]]:
    """A model, a batch of three pictures, and its cache."""
    model, processor = systems.llava()
    model.requires_grad_(False)
    with FeatureCache(model, tmp_path) as cache:
        yield vision_of(model), processor, cache


def pixels(seed: int = 0, rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def files(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.rglob("*.safetensors"))


def test_a_batch_is_read_row_by_row(cached: tuple[Any, Any, FeatureCache]) -> None:
    vision, _, cache = cached
    ask = {"output_hidden_states": True, "return_dict": True}
    all_states = copy.deepcopy(vision.hidden_states) if hasattr(vision, "hidden_states") else None
    assert all_states is None
    first = vision(pixel_values=pixels(), **ask).hidden_states[-2]
    assert (cache.computed, cache.read, len(files(cache))) == (3, 0, 3)
    # In another order, one twice, one new.
    mixed = torch.cat([pixels()[[2, 0, 2]], pixels(1, 1)])
    second = vision(pixel_values=mixed, **ask).hidden_states[-2]
    assert (cache.computed, cache.read) == (4, 3)
    assert torch.equal(second[:3], first[[2, 0, 2]])
    cache.__exit__(None, None, None)
    torch.testing.assert_close(second, vision(pixel_values=mixed, **ask).hidden_states[-2])
    cache.__enter__()
    # What nobody reads is not on disk, and asking for it is an error and not another tensor.
    (key,) = load_file(files(cache)[0])
    assert key == f"hidden_states.{len(vision.encoder.layers) - 1}"
    with pytest.raises(IndexError, match="hidden state 1 was not kept"):
        vision(pixel_values=pixels(), **ask).hidden_states[1]


def test_other_arguments_and_other_weights_are_other_features(tmp_path: Path) -> None:
    model, _ = systems.SYSTEMS["blip2-opt"]()
    model.requires_grad_(False)
    vision = vision_of(model)
    with FeatureCache(model, tmp_path) as cache:
        vision(pixels(), interpolate_pos_encoding=False)
        vision(pixels(), interpolate_pos_encoding=True)
        assert cache.computed == 6
        with torch.autocast("cpu", torch.bfloat16):
            narrow = vision(pixels(), interpolate_pos_encoding=False).last_hidden_state
        assert cache.computed == 9
        assert narrow.dtype == torch.bfloat16 or not torch.equal(narrow, vision(pixels()).last_hidden_state)
        tensor = vision(pixel_values=pixels(), return_dict=False)  # not kept
        assert isinstance(tensor, tuple)
    first = cache.folder
    with torch.no_grad():
        vision.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    with FeatureCache(model, tmp_path) as cache:
        assert cache.folder != first
        vision(pixels(), interpolate_pos_encoding=False)
        assert cache.computed == 3
    vision.config.layer_norm_eps *= 2
    with FeatureCache(model, tmp_path) as again:
        assert again.folder not in (first, cache.folder)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_file_is_computed_again(cached: tuple[Any, Any, FeatureCache], damage: str) -> None:
    vision, _, cache = cached
    ask = {"output_hidden_states": True, "return_dict": True}
    expected = vision(pixel_values=pixels(), **ask).hidden_states[-2]
    path = files(cache)[1]
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[-3] ^= 1
    path.write_bytes({"cut": whole[:-5], "flipped": bytes(broken), "empty": b"", "other": b"no tensors here"}[damage])
    with pytest.warns(DamagedFeaturesWarning, match=rf"{path.name} is damaged .*computed again"):
        found = vision(pixel_values=pixels(), **ask).hidden_states[-2]
    assert torch.allclose(found, expected, atol=1e-6)
    assert (cache.computed, cache.damaged) == (4, 1)
    vision(pixel_values=pixels(), **ask)
    assert (cache.computed, cache.damaged) == (4, 1)
    assert not list(cache.folder.rglob(".*"))  # nothing half written is left


def test_dropout_of_a_frozen_model_is_not_kept(tmp_path: Path) -> None:
    model, _ = systems.flamingo()
    tower = model.model.vision_encoder.tower
    for layer in tower.encoder.layers if hasattr(tower, "encoder") else tower.vision_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    model.requires_grad_(False)
    expected = model.model.vision_encoder(torch.ones(2, 3, 16, 16))
    model.train()
    model.model.vision_encoder.train()
    with FeatureCache(model, tmp_path):
        assert torch.equal(model.model.vision_encoder(torch.ones(2, 3, 16, 16)), expected)
    assert model.model.vision_encoder.training


def test_what_it_refuses(tmp_path: Path) -> None:
    model, _ = systems.SYSTEMS["blip2-opt"]()
    model.requires_grad_(False)
    model.vision_model.post_layernorm.requires_grad_(True)
    with FeatureCache(model, tmp_path):  # what the norm reads is kept
        assert "forward" in model.vision_model.encoder.__dict__
        with pytest.raises(ValueError, match="stands before this vision model already"):
            FeatureCache(model, tmp_path).__enter__()
    model.vision_model.requires_grad_(True)
    with pytest.raises(VisionIsTrainedError, match=r"vision_model\..* more are trained, .*change with every step"):
        FeatureCache(model, tmp_path).__enter__()
    model, processor = systems.SYSTEMS["blip2-opt"]()
    with pytest.raises(VisionIsTrainedError):
        prepare_stage(
            "blip2-stage2", model=model, processor=processor, data=systems.samples(), features=tmp_path, train="vision+bridge",
            batch_size=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="no recipe"):
        FeatureCache(PatchEncoder(8, 2, 4), tmp_path).__enter__()

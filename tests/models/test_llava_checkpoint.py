"""LLaVA's own checkpoint files, written here in the original layout from a model whose outputs are known."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mllm_fast
from mllm_fast.models.llava_checkpoint import load_llava, load_lora, load_projector, save_lora, save_projector
from mllm_fast.models.original_checkpoint import CheckpointMismatchError
from tests.families.builders import randomise
from tests.families.llava_models import PATCHES, TEXT, VISION, inputs, model

# The original's names, written down from its code (llava_arch.py, clip_encoder.py) and not from ours.
ORIGINAL = {
    "model.multi_modal_projector.linear_1": "model.mm_projector.0",
    "model.multi_modal_projector.linear_2": "model.mm_projector.2",
    "model.language_model.embed_tokens": "model.embed_tokens",
    "model.language_model.layers": "model.layers",
    "model.language_model.norm": "model.norm",
    "model.vision_tower": "model.vision_tower.vision_tower",
}


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        prefix = next((ours for ours in ORIGINAL if name.startswith(ours + ".")), None)
        renamed[name if prefix is None else ORIGINAL[prefix] + name.removeprefix(prefix)] = value.clone()
    return renamed


def logits(llava: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = llava(**inputs()).logits
    return out


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("form", ["bin", "safetensors", "sharded"])
def test_a_whole_model(tmp_path: Path, tower: bool, form: str) -> None:
    trained, fresh = model(1), model(2)
    if not tower:
        fresh.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    state = original(trained.state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if not tower:
        state = {name: value for name, value in state.items() if "vision_tower" not in name}
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    else:
        halves = [dict(list(state.items())[i::2]) for i in range(2)]
        for i, half in enumerate(halves):
            torch.save(half, tmp_path / f"pytorch_model-{i}.bin")
        index = {name: f"pytorch_model-{i}.bin" for i, half in enumerate(halves) for name in half}
        (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    mllm_fast.fuse(fresh)
    load_llava(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(trained), rtol=1e-5, atol=1e-5)


def test_the_projector_alone_and_back(tmp_path: Path) -> None:
    trained, fresh = model(1), model(2)
    before = copy.deepcopy(fresh.state_dict())
    file = save_projector(trained, tmp_path)
    assert file == tmp_path / "mm_projector.bin"
    saved = torch.load(file, weights_only=True)
    assert sorted(saved) == [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_projector(fresh, tmp_path)
    load_projector(fresh, tmp_path)
    for name, value in fresh.state_dict().items():
        expected = trained.state_dict() if "projector" in name else before
        assert torch.equal(value, expected[name]), name
    save_projector(fresh, tmp_path, overwrite=True)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_lora(tmp_path: Path, merge: bool, fused: bool) -> None:
    base, fresh = model(1), model(1)
    peft_model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    )
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name or "projector" in name:
                parameter.normal_(std=0.3)
    # What llava/train/train.py writes: the adapter over LlavaLlamaForCausalLM, and the rest that was trained.
    state = {f"base_model.model.{k}": v for k, v in original(_plain(peft_model, "lora_")).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    rest = {f"base_model.model.{k}": v for k, v in original(_plain(peft_model, "projector")).items()}
    torch.save(rest, tmp_path / "non_lora_trainables.bin")
    peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], base_model_name_or_path="x"
    ).save_pretrained(tmp_path)
    if fused:
        mllm_fast.fuse(fresh)
    load_lora(fresh, tmp_path, merge=merge)
    torch.testing.assert_close(logits(fresh), logits(base), rtol=1e-4, atol=1e-4)
    adapters = [name for name, _ in fresh.named_parameters() if "lora_" in name]
    assert not any("vision_tower" in name for name in adapters)
    assert bool(adapters) is not merge


def _plain(peft_model: nn.Module, part: str) -> dict[str, Tensor]:
    """The parameters with `part` in their names, as they are named in the model without PEFT."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", "."): value.detach()
        for name, value in peft_model.named_parameters()
        if part in name
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_lora_is_saved_back(tmp_path: Path, wrapped: bool) -> None:
    """In the original's names, which its own loader puts on the language model alone; and read again."""
    trained = model(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    adapted = peft.get_peft_model(trained, config) if wrapped else peft.inject_adapter_in_model(config, trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "projector" in name:
                parameter.normal_(std=0.3)
    folder = save_lora(adapted, tmp_path / "run")
    files = ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin")
    assert {path.name for path in folder.iterdir()} >= set(files)
    layers = [f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.down_proj", "self_attn.q_proj")]
    assert sorted(peft.LoraConfig.from_pretrained(folder).target_modules) == layers
    assert set(load_file(folder / files[1])) == {f"base_model.model.{n}.lora_{k}.weight" for n in layers for k in "AB"}
    extra = torch.load(folder / files[2], weights_only=True)
    names = [f"base_model.model.model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    assert sorted(extra) == names
    fresh = model(1)
    load_lora(fresh, folder)
    assert torch.equal(logits(fresh), logits(adapted))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_lora(fresh, folder)
    save_lora(fresh, folder, overwrite=True)
    with pytest.raises(ValueError, match="no adapter 'other'; it has default"):
        save_lora(fresh, tmp_path / "other", adapter="other")
    with pytest.raises(ValueError, match="it has none"):
        save_lora(model(1), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_does_not_fit_is_listed_and_changes_nothing(tmp_path: Path) -> None:
    fresh = model(2)
    before = copy.deepcopy(fresh.state_dict())
    state = original(model(1).state_dict())
    state["model.mm_projector.0.weight"] = torch.zeros(3, 3)
    state["model.surprise"] = torch.zeros(1)
    del state["lm_head.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointMismatchError) as caught:
        load_llava(fresh, tmp_path)
    for part in ("missing: lm_head.weight", "unexpected: model.surprise", "linear_1.weight: the checkpoint has (3, 3)"):
        assert part in str(caught.value)
    torch.save({"model.mm_projector.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointMismatchError, match=r"kind 'linear', .* projector_hidden_act='linear'"):
        load_projector(fresh, tmp_path)
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointMismatchError, match="holds no projector"):
        load_projector(fresh, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_llava_1_with_one_projector_layer(tmp_path: Path, fused: bool) -> None:
    """Whole, the projector alone, and with LoRA: its rows are bitwise those of the one layer."""
    llava = model(1, projector_hidden_act="linear")
    layer = randomise(nn.Linear(VISION, TEXT), 5).to(torch.bfloat16)
    own = {f"model.mm_projector.{name}": value for name, value in layer.state_dict().items()}
    state = {name: value for name, value in original(llava.state_dict()).items() if "mm_projector" not in name}
    torch.save(state | own, tmp_path / "pytorch_model.bin")
    torch.save(own, tmp_path / "mm_projector.bin")
    features = torch.randn(2, PATCHES, VISION, dtype=torch.bfloat16)
    for load, seed in ((load_llava, 2), (load_projector, 1)):
        fresh = model(seed, projector_hidden_act="linear")
        if fused:
            assert not any("projector" in row.path for row in mllm_fast.fuse(fresh).left_alone)
        load(fresh, tmp_path)
        projector = copy.deepcopy(fresh).to(torch.bfloat16).model.multi_modal_projector
        with torch.no_grad():
            assert torch.equal(projector(features), layer(features))
        assert save_projector(fresh, tmp_path / f"back-{seed}").is_file()
        back = torch.load(tmp_path / f"back-{seed}" / "mm_projector.bin", weights_only=True)
        assert {name: value.to(torch.bfloat16).tolist() for name, value in back.items()} == {
            name: value.tolist() for name, value in own.items()
        }
    # Trained further, both of its layers have changed: what is written is still the one layer.
    randomise(fresh.model.multi_modal_projector, 9)
    again = model(3, projector_hidden_act="linear")
    load_projector(again, save_projector(fresh, tmp_path / "trained"))
    x = torch.randn(3, VISION)
    with torch.no_grad():
        torch.testing.assert_close(again.model.multi_modal_projector(x), fresh.model.multi_modal_projector(x))
    save_projector(model(1), tmp_path / "mlp")
    with pytest.raises(CheckpointMismatchError, match=r"kind 'mlp2x_gelu', .* projector_hidden_act='gelu'"):
        load_projector(again, tmp_path / "mlp")


def test_a_llava_1_trains_the_one_layer_that_it_has(tmp_path: Path) -> None:
    """transformers' second layer stays the identity, also where the language model is trained too."""
    layer = randomise(nn.Linear(VISION, TEXT), 5)
    torch.save({f"model.mm_projector.{n}": v for n, v in layer.state_dict().items()}, tmp_path / "mm_projector.bin")
    for train, fused in (("projection", False), ("projection", True), ("projection+language_model", False)):
        llava = model(1, projector_hidden_act="linear")
        load_projector(llava, tmp_path)
        if fused:
            mllm_fast.fuse(llava)
        plan = mllm_fast.prepare_finetuning(llava, train)
        projector = llava.model.multi_modal_projector
        expected = {f"model.multi_modal_projector.linear_1.{n}" for n in ("weight", "bias")}
        assert {name for name in plan.trained if "projector" in name} == expected
        optimizer = torch.optim.AdamW(plan.trained.values(), lr=1e-2, weight_decay=0.1)
        batch = inputs() | {"labels": inputs()["input_ids"].masked_fill(inputs()["input_ids"] == 90, -100)}
        losses = []
        for _ in range(3):
            loss = llava(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert torch.equal(projector.linear_2.weight, torch.eye(TEXT))
        assert not projector.linear_2.bias.any()
        assert not torch.equal(projector.linear_1.weight, layer.weight)
        saved = torch.load(save_projector(llava, tmp_path / f"{train}-{fused}"), weights_only=True)
        assert torch.equal(saved["model.mm_projector.weight"], projector.linear_1.weight)
        assert torch.equal(saved["model.mm_projector.bias"], projector.linear_1.bias)
    both = mllm_fast.prepare_finetuning(model(1), "projection").trained
    assert {name.split(".")[-2] for name in both} == {"linear_1", "linear_2"}


def test_lora_of_a_llava_1(tmp_path: Path) -> None:
    fresh, layer = model(1, projector_hidden_act="linear"), randomise(nn.Linear(VISION, TEXT), 5)
    rest = {f"base_model.model.model.mm_projector.{name}": value for name, value in layer.state_dict().items()}
    torch.save(rest, tmp_path / "non_lora_trainables.bin")
    peft.LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    name, weight = (
        "base_model.model.model.layers.0.self_attn.q_proj",
        fresh.model.language_model.layers[0].self_attn.q_proj,
    )
    shapes = {"lora_A": (2, weight.in_features), "lora_B": (weight.out_features, 2)}
    save_file(
        {f"{name}.{kind}.weight": torch.randn(shape) for kind, shape in shapes.items()},
        tmp_path / "adapter_model.safetensors",
    )
    load_lora(fresh, tmp_path)
    x = torch.randn(3, VISION)
    with torch.no_grad():
        assert torch.equal(fresh.model.multi_modal_projector(x), layer(x))


def test_missing_files(tmp_path: Path) -> None:
    fresh = model(2)
    with pytest.raises(FileNotFoundError, match=r"neither mm_projector\.bin"):
        load_projector(fresh, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_lora(fresh, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no adapter weights"):
        load_lora(fresh, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_llava(fresh, tmp_path)


def test_a_lora_of_another_model_changes_nothing(tmp_path: Path) -> None:
    fresh = model(2)
    peft.LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    save_file(
        {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(2, 4)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointMismatchError, match=r"no such layer: model\.language_model\.layers\.9"):
        load_lora(fresh, tmp_path)
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 4)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointMismatchError, match="the model needs"):
        load_lora(fresh, tmp_path)
    assert not any("lora" in name for name in fresh.state_dict())

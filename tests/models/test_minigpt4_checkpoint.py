"""MiniGPT-4's original files: layout, order, positions of another grid, LoRA; written back; and what is wrong with them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import mllm_fast
from mllm_fast.models import CheckpointMismatchError
from mllm_fast.models.minigpt4 import (
    MiniGPT4ForConditionalGeneration,
    load_original,
    save_original,
)
from mllm_fast.models.minigpt4_checkpoint import convert_original
from tests.models.minigpt4_models import (
    PATCHES,
    QFORMER,
    QUERIES,
    TEXT,
    VISION,
    config,
    inputs,
    llama,
    minigpt4,
    original_files,
    original_rows,
    write_files,
)

Files = dict[str, dict[str, Tensor]]


def load(folder: Path, files: Files, **options: Any) -> MiniGPT4ForConditionalGeneration:
    """Write the files and read them."""
    given = write_files(folder, files, llama())
    has_qformer = bool(files["qformer"])
    return MiniGPT4ForConditionalGeneration.from_original(
        **{**given, "config": config(has_qformer=has_qformer), **options}
    )


def rows(model: Any) -> Tensor:
    return model.double().get_image_features(inputs()["pixel_values"].double()).pooler_output.detach()


def same(model: Any, files: Files) -> None:
    torch.testing.assert_close(rows(model), original_rows(files, inputs()["pixel_values"]), atol=1e-11, rtol=1e-11)


def refusal(folder: Path, files: Files, **options: Any) -> list[str]:
    with pytest.raises(CheckpointMismatchError) as caught:
        load(folder, files, **options)
    return str(caught.value).splitlines()


def test_the_four_files(tmp_path: Path) -> None:
    files = original_files()
    model = load(tmp_path, files)
    assert not model.training
    expected = llama()
    assert all(torch.equal(p, expected.get_parameter(n)) for n, p in model.language_model.named_parameters())
    assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])
    same(model, files)


def test_every_tensor_matters(tmp_path: Path) -> None:
    """A name that went to the wrong place, or nowhere, would leave the rows as they are."""
    files = original_files()
    before = original_rows(files, inputs()["pixel_values"][:1])
    unused = re.compile(r"blocks\.2\.|^norm\.|^head\.|^t5_proj|position_ids|inv_freq|self\.key\.bias")
    for part in files.values():
        for name, value in part.items():
            if not unused.search(name):
                part[name] = value + 0.5 * torch.randn(value.shape)
                after = original_rows(files, inputs()["pixel_values"][:1])
                assert (before - after).abs().max() > 1e-9, name
                before = after
    same(load(tmp_path, files), files)


def test_without_qformer(tmp_path: Path) -> None:
    """No file holds `ln_vision`, so the norm stays without weights, whatever the model was before."""
    files = original_files(has_qformer=False)
    model = load(tmp_path, files)
    assert torch.equal(model.vision_model.post_layernorm.weight, torch.ones(VISION))
    assert torch.equal(model.vision_model.post_layernorm.bias, torch.zeros(VISION))
    assert not hasattr(model, "qformer")
    same(model, files)


def test_a_later_file_replaces_what_an_earlier_one_held(tmp_path: Path) -> None:
    """The original loads one after the other; LAVIS saves a vision model that it trained with its Q-Former."""
    files, other = original_files(), original_files(seed=1)
    model = load(
        tmp_path / "a",
        {
            "vision": files["vision"],
            "qformer": other["qformer"] | {f"visual_encoder.{n}": v for n, v in other["vision"].items()},
            "projection": files["projection"] | {"query_tokens": files["qformer"]["query_tokens"]},
        },
    )
    other["qformer"]["query_tokens"] = files["qformer"]["query_tokens"]
    same(model, {**other, "projection": files["projection"]})


def test_the_first_stage_of_lavis_will_do(tmp_path: Path) -> None:
    """Its text half, heads and momentum-free temperature are left out, as the original leaves them out."""
    files = original_files()
    more = {
        "Qformer.bert.embeddings.word_embeddings.weight": torch.randn(9, QFORMER),
        "Qformer.bert.embeddings.position_embeddings.weight": torch.randn(9, QFORMER),
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.randn(9, QFORMER),
        "Qformer.bert.encoder.layer.0.output.LayerNorm.weight": torch.randn(QFORMER),
        "Qformer.cls.predictions.bias": torch.randn(9), "vision_proj.weight": torch.randn(4, QFORMER),
        "text_proj.bias": torch.randn(4), "itm_head.weight": torch.randn(2, QFORMER), "temp": torch.tensor(0.07),
    }  # fmt: skip
    same(load(tmp_path, files | {"qformer": files["qformer"] | more}), files)


@pytest.mark.parametrize("old", [3, 7])
def test_positions_of_another_grid(tmp_path: Path, old: int) -> None:
    """Interpolated as the original does: bicubic, in fp32, but for the class token's."""
    files = original_files()
    given = torch.randn(1, 1 + old * old, VISION).half()
    model = load(tmp_path, files | {"vision": files["vision"] | {"pos_embed": given}})
    grid = given[:, 1:].float().reshape(1, old, old, VISION).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    expected = torch.cat([given[:, :1].float(), grid.permute(0, 2, 3, 1).reshape(1, PATCHES, VISION)], dim=1)
    assert torch.equal(model.vision_model.embeddings.position_embedding, expected)
    files["vision"]["pos_embed"] = expected
    same(model, files)


def test_another_size_of_pictures(tmp_path: Path) -> None:
    model = load(tmp_path, original_files(), image_size=28)
    assert model.config.vision_config.image_size == 28
    assert model.vision_model.embeddings.position_embedding.shape == (1, 5, VISION)
    assert model.get_image_features(torch.randn(1, 3, 28, 28)).pooler_output.shape == (1, QUERIES, TEXT)


def test_released_layers_by_default(tmp_path: Path) -> None:
    """Without a config the sizes are those of the released files, which these are not."""
    lines = refusal(tmp_path, original_files(), config=None)
    assert lines[0] == "the original's files do not fit this model:"
    assert "    missing: vision_model.encoder.layers.38.layer_norm1.bias" in lines
    assert any("cls_token" not in line and "class_embedding: the checkpoint has (1, 1, 32)" in line for line in lines)


def test_safetensors(tmp_path: Path) -> None:
    files = original_files()
    given: dict[str, Any] = {}
    for part, tensors in files.items():
        given[part] = tmp_path / f"{part}.safetensors"
        save_file({name: value.contiguous() for name, value in tensors.items()}, given[part])
    same(load(tmp_path / "x", files, **given), files)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """By default the language model's; in fp16 the Q-Former stays fp32, as the original has it."""
    files = original_files()
    files["vision"] = {name: value.half() for name, value in files["vision"].items()}
    given = write_files(tmp_path, files, llama().bfloat16())
    model = MiniGPT4ForConditionalGeneration.from_original(**given, config=config(), dtype=dtype)
    wanted = torch.bfloat16 if dtype is None else dtype
    kept = torch.float32 if wanted == torch.float16 else wanted
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (kept if name.startswith(("query_tokens", "qformer.")) else wanted), name
    out = model(**inputs()).logits
    mllm_fast.fuse(model)
    scale = out.abs().max().item()
    torch.testing.assert_close(model(**inputs()).logits, out, atol=0.05 * scale, rtol=0)


def test_the_files_may_go(tmp_path: Path) -> None:
    """Nothing of the model is a view into a file."""
    files = original_files()
    model = load(tmp_path, files)
    for file in tmp_path.glob("*.pth"):
        file.write_bytes(b"\0" * file.stat().st_size)
    same(model, files)


def test_a_language_model_that_is_loaded_already(tmp_path: Path) -> None:
    lm = llama()
    lm.generation_config.max_new_tokens = 7
    model = load(tmp_path, original_files(), language_model=lm)
    assert model.language_model is lm
    assert model.generation_config.max_new_tokens == 7


def lora_file(rank: int = 2) -> dict[str, Tensor]:
    at = "llama_model.base_model.model.model.layers"
    tensors = {}
    for layer in range(2):
        for name, width in (("q_proj", TEXT), ("v_proj", TEXT // 2)):
            tensors[f"{at}.{layer}.self_attn.{name}.lora_A.default.weight"] = torch.randn(rank, TEXT)
            tensors[f"{at}.{layer}.self_attn.{name}.lora_B.default.weight"] = torch.randn(width, rank)
    return tensors


def with_lora(model: Any) -> Any:
    settings = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model.language_model = peft.get_peft_model(model.language_model, settings)
    return model.eval()


def test_lora_is_merged(tmp_path: Path) -> None:
    """MiniGPT-v2's last file: what PEFT computes with the matrices in place."""
    files = original_files(has_qformer=False)
    lora = lora_file()
    model = load(tmp_path, files | {"projection": files["projection"] | lora})
    expected = with_lora(load(tmp_path / "b", files))
    own = {name.replace("llama_model.", "language_model."): value for name, value in lora.items()}
    assert not expected.load_state_dict(own, strict=False).unexpected_keys
    given = inputs(4)
    torch.testing.assert_close(model(**given).logits, expected(**given).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(**given).logits, load(tmp_path / "b", files)(**given).logits, atol=1e-2)

    lora["llama_model.base_model.model.model.layers.9.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, TEXT)
    del lora["llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    lines = refusal(tmp_path / "c", files | {"projection": files["projection"] | lora})
    assert any("unexpected: " in line and "layers.9.self_attn.q_proj.lora_A" in line for line in lines)
    assert any("layers.0.self_attn.q_proj.lora_A.default.weight has no partner" in line for line in lines)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("lora", [False, True], ids=["projection", "lora"])
def test_what_is_trained_comes_back(tmp_path: Path, suffix: str, lora: bool) -> None:
    """By the original's names, and with nothing that is frozen."""
    model = with_lora(minigpt4()) if lora else minigpt4()
    path = save_original(model, tmp_path / f"a/trained{suffix}")
    saved = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)["model"]
    names = {"llama_proj.weight", "llama_proj.bias"}
    if lora:
        at = "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default.weight"
        names |= {at.format(layer, name, part) for layer in (0, 1) for name in "qv" for part in "AB"}
    assert set(saved) == names
    assert torch.equal(saved["llama_proj.weight"], model.language_projection.linear.weight)
    other = with_lora(minigpt4(seed=1)) if lora else minigpt4(seed=1)
    load_original(other, path)
    assert torch.equal(other.language_projection.linear.bias, model.language_projection.linear.bias)
    if lora:
        for (_, ours), (name, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(ours, theirs) or "lora_" not in name
    with pytest.raises(FileExistsError, match="exists; choose another name or pass overwrite=True"):
        save_original(model, path)
    before = path.read_bytes()
    save_original(other.half(), path, overwrite=True)
    assert path.read_bytes() != before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_not_frozen_is_saved_too(tmp_path: Path) -> None:
    """All of the original's names, by which its files are read."""
    model = minigpt4(freeze_vision=False, freeze_qformer=False)
    path = save_original(model, tmp_path / "all.pth")
    saved = torch.load(path, weights_only=True)["model"]
    files = original_files()
    expected = {f"visual_encoder.{name}" for name in files["vision"] if not re.match(r"blocks\.2|norm\.|head\.", name)}
    expected |= {name for name in files["qformer"] if not re.search(r"t5_proj|position_ids", name)}
    assert set(saved) == expected | {"llama_proj.weight", "llama_proj.bias"}
    other = minigpt4(seed=1, freeze_vision=False, freeze_qformer=False)
    load_original(other, path)
    assert torch.equal(rows(other), rows(model))
    trained = model.freeze()
    assert {n for n, p in trained.named_parameters() if not p.requires_grad} == {
        n for n, _ in trained.named_parameters() if n.startswith("language_model.")
    }


def test_what_does_not_fit_is_listed_by_file(tmp_path: Path) -> None:
    files = original_files()
    del (
        files["vision"]["blocks.1.attn.v_bias"],
        files["qformer"]["ln_vision.weight"],
        files["projection"]["llama_proj.bias"],
    )
    files["vision"]["blocks.0.gamma_1"] = torch.zeros(VISION)
    files["qformer"]["query_tokens"] = torch.zeros(1, 5, QFORMER)
    lines = refusal(tmp_path, files)
    assert lines == [
        "the original's files do not fit this model:",
        f"  {tmp_path}/eva_vit_g.pth:",
        "    missing: vision_model.encoder.layers.1.self_attn.qkv.bias",
        "    unexpected: vision_model.encoder.layers.0.gamma_1",
        "    unexpected: vision_model.encoder.layers.1.self_attn.q_bias",
        f"  {tmp_path}/blip2_pretrained_flant5xxl.pth:",
        "    missing: vision_model.post_layernorm.weight",
        "    shape of query_tokens: the checkpoint has (1, 5, 24), the model has (1, 3, 24)",
        f"  {tmp_path}/pretrained_minigpt4.pth:",
        "    missing: language_projection.linear.bias",
    ]


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    files = original_files()
    given = write_files(tmp_path, files, llama())
    build = MiniGPT4ForConditionalGeneration.from_original
    with pytest.raises(ValueError, match=r"config.has_qformer is True, but qformer is None"):
        build(**given | {"qformer": None}, config=config())
    with pytest.raises(ValueError, match=r"config.has_qformer is False, but qformer is /"):
        build(**given, config=config(has_qformer=False))
    swapped = given | {"vision": given["qformer"], "qformer": given["vision"]}
    # Whatever is there is found, in whichever file; here both lack nothing.
    same(build(**swapped, config=config()), files)
    with pytest.raises(CheckpointMismatchError, match=r"missing: language_projection.linear.weight"):
        load_original(minigpt4(), given["vision"])


def one_line(build: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    given = write_files(tmp_path, original_files(), llama())

    def build(**changes: Any) -> Any:
        return lambda: MiniGPT4ForConditionalGeneration.from_original(**given | changes, config=config())

    nowhere = tmp_path / "nowhere"
    for part in ("vision", "qformer", "projection"):
        assert one_line(build(**{part: nowhere})) == f"there is no checkpoint at {nowhere}"
    assert one_line(build(language_model=nowhere)).startswith(
        f"there is no language model at {nowhere}; expected a folder"
    )
    assert "config.json is missing" in one_line(build(language_model=tmp_path))

    cut = tmp_path / "cut.pth"
    whole = given["vision"].read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        cut.write_bytes(content)
        assert str(cut) in one_line(build(vision=cut))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert one_line(build(vision=cut)).startswith(f"{cut} is damaged or no checkpoint; copy it here again (")
    harmful = tmp_path / "harmful.pth"
    harmful.write_bytes(pickle.dumps({"model": Harmful()}))
    assert "nothing else is loaded, because a pickle can run code" in one_line(build(projection=harmful))
    assert not Harmful.ran
    empty = tmp_path / "empty.pth"
    torch.save({"model": {}}, empty)
    assert one_line(build(projection=empty)) == f"{empty} holds no tensors; expected the parameters of a model"

    weights = given["language_model"] / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(weights).items()}
    weights.write_bytes(weights.read_bytes()[:200])
    assert one_line(build()).startswith(f"no language model could be loaded from {given['language_model']}: ")
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=r"lacks weights:\n  missing: model.norm.weight$"):
        build()()


class Harmful:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Harmful, "ran", True)


def test_convert_keeps_unknown_names() -> None:
    assert set(convert_original({"llama_proj.bias": torch.zeros(1), "other": torch.zeros(1)}, config())) == {
        "language_projection.linear.bias",
        "other",
    }

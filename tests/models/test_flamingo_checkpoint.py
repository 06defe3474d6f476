"""Checkpoints of OpenFlamingo and Otter: files as the projects write them, the original model's logits and sentences.

OpenFlamingo runs here (2.0.1, over transformers' language models) and is the reference. Otter does not import on today's
transformers; its files are OpenFlamingo's tensors under the names of Otter's modules.
"""

from __future__ import annotations

import copy
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mllm_fast.models import CheckpointMismatchError, Flamingo, FlamingoForConditionalGeneration
from mllm_fast.models.flamingo_checkpoint import load_original, save_original
from tests.families import builders
from tests.families.builders import END_OF_CHUNK, IMAGE_TOKEN, MEDIA_DIM, PAD, left_padded, of_inputs, of_model

sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # open_flamingo's training utilities import it

from open_flamingo.train.train_utils import filter_state_dict_to_trainable  # noqa: E402

State = dict[str, Tensor]


class _Clip(nn.Module):
    """CLIP as OpenFlamingo calls it: (pooled, patches without the class token)."""

    def __init__(self, tower: CLIPVisionModel) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        return None, self.tower(images).last_hidden_state[:, 1:]


def original(kind: str = "llama", every: int = 2) -> tuple[Any, Any, Any]:
    """An OpenFlamingo in fp64, frozen as its factory does it, and its language and vision models alone."""
    model = of_model(kind, every=every)
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28}
    tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=MEDIA_DIM, patch_size=14, **sizes)).eval()
    builders.randomise(tower, 5)
    model.vision_encoder = _Clip(tower)
    model.double().requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    lm = builders._language_model(kind).double().eval()
    lm.load_state_dict(_language_model(model.state_dict()))
    return model, lm, copy.deepcopy(tower)


def _language_model(state: State) -> State:
    """The language model's own tensors, by its own names."""
    kept = {k.removeprefix("lang_encoder."): v for k, v in state.items() if k.startswith("lang_encoder.")}
    left_out = ("gated_cross_attn", "old_decoder_blocks")
    return {k.replace(".decoder_layer.", "."): v for k, v in kept.items() if not any(o in k for o in left_out)}


def released(model: Any) -> State:
    """What OpenFlamingo's training saves, by its own function."""
    return dict(filter_state_dict_to_trainable(model, model.state_dict()))


def layouts(model: Any) -> dict[str, State]:
    """The same model as files have it."""
    state, out = dict(model.state_dict()), released(model)
    first = {k: v for k, v in state.items() if k.startswith("perceiver.") or "gated_cross_attn_layers" in k}
    wrapped = {"module." + k.replace(".attn.", "._checkpoint_wrapped_module.attn."): v for k, v in out.items()}
    return {"released": out, "by registration": first, "everything": state, "wrapped": wrapped}


def otter(model: Any) -> State:
    """The tensors under the names of Otter's modules, the frozen models among them, as its files have them."""
    renamed = {}
    for name, value in model.state_dict().items():
        if "gated_cross_attn_layers" in name or "old_decoder_blocks" in name:
            continue
        new = re.sub(r"^vision_encoder\.tower\.", "vision_encoder.vision_model.", name)
        new = re.sub(r"^(perceiver\.layers\.\d+)\.0\.", r"\1.", new)
        new = re.sub(r"^(perceiver\.layers\.\d+)\.1\.", r"\1.feed_forward.", new)
        renamed[new.replace("gated_cross_attn_layer.ff.", "gated_cross_attn_layer.feed_forward.")] = value
    return {k: v.clone() for k, v in renamed.items()}


def write(path: Path, state: State) -> Path:
    torch.save({"epoch": 1, "model_state_dict": state, "lr_scheduler_state_dict": {"lr": 0.1}}, path)
    return path


def loaded(path: Path, lm: Any, tower: Any, **options: Any) -> Any:
    return FlamingoForConditionalGeneration.from_original(path, lm, tower, image_token_id=IMAGE_TOKEN, **options).eval()


@pytest.mark.parametrize(("kind", "every"), [("llama", 2), ("mpt", 1), ("opt", 4), ("gpt_neox", 2)])
def test_the_original_logits_and_sentences(tmp_path: Path, kind: str, every: int) -> None:
    model, lm, tower = original(kind, every)
    ours = loaded(write(tmp_path / "checkpoint.pt", released(model)), lm, tower)
    assert len(ours.model.blocks) == 4 // every and ours.dtype == torch.float64
    # Of padded rows, transformers' MPT makes NaN in fp64, and the original makes other positions for OPT.
    prompts = [of_inputs(), left_padded(of_inputs())] if kind == "llama" else [of_inputs()]
    for inputs in prompts:
        inputs["vision_x"] = inputs["vision_x"].double()
        mask = inputs["attention_mask"]
        given = {"pixel_values": inputs["vision_x"], "attention_mask": mask}
        expected = model(**inputs).logits[mask.bool()]
        # Rotary angles are fp32 in any case, and ours begin at the first token that is no padding.
        tight = 1e-5 if bool((mask == 0).any()) else 1e-9
        torch.testing.assert_close(
            ours(inputs["lang_x"], **given).logits[mask.bool()], expected, rtol=tight, atol=tight
        )
        alone = lm(inputs["lang_x"], attention_mask=mask).logits[mask.bool()]
        assert not torch.allclose(alone, expected)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "suppress_tokens": [IMAGE_TOKEN]}
        for beams in (1, 3) if kind == "llama" else (2,):
            theirs = model.generate(**inputs, num_beams=beams, **options)
            out = ours.generate(inputs["lang_x"], **given, num_beams=beams, eos_token_id=END_OF_CHUNK, **options)
            assert torch.equal(out, theirs)


@pytest.mark.parametrize("layout", ["released", "by registration", "everything", "wrapped"])
def test_all_layouts_are_the_same_model(tmp_path: Path, layout: str) -> None:
    model, lm, tower = original()
    ours = loaded(write(tmp_path / "checkpoint.pt", layouts(model)[layout]), lm, tower)
    inputs = of_inputs()
    pixels = inputs["vision_x"].double()
    torch.testing.assert_close(
        ours(inputs["lang_x"], pixels).logits, model(pixels, inputs["lang_x"], inputs["attention_mask"]).logits
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_otter(tmp_path: Path, frozen: bool) -> None:
    """Its resampler knows frames; its files hold all of the model."""
    model, lm, tower = original()
    options = {"dim": MEDIA_DIM, "max_num_frames": 3, "max_num_media": 2}
    model.perceiver = builders.randomise(builders.PerceiverResampler(**options), 3).double()
    save_file(otter(model), tmp_path / "model.safetensors")
    ours = loaded(tmp_path, lm, tower)
    assert (ours.config.max_frames, ours.config.max_images) == (3, 2)
    if frozen:
        with torch.no_grad():
            for part in (ours.model.lm, ours.model.vision_encoder):
                for p in part.parameters():
                    p.mul_(1.1)
        load_original(ours, tmp_path, frozen=True)
    inputs, pixels = of_inputs(), of_inputs()["vision_x"].double()
    expected = model(pixels, inputs["lang_x"], inputs["attention_mask"]).logits
    torch.testing.assert_close(ours(inputs["lang_x"], pixels).logits, expected)
    torch.testing.assert_close(ours(inputs["lang_x"], pixels[:, :, 0]).logits, expected)
    video = torch.randn(2, 2, 3, 3, 28, 28, dtype=torch.float64)
    patches = model.vision_encoder(video.flatten(0, 2))[1].unflatten(0, (2, 2, 3))
    torch.testing.assert_close(ours.get_image_features(video).pooler_output, model.perceiver(patches))


def test_saved_as_released(tmp_path: Path) -> None:
    model, lm, tower = original()
    expected = released(model)
    ours = loaded(write(tmp_path / "checkpoint.pt", expected), lm, tower)
    saved = torch.load(save_original(ours, tmp_path / "new" / "saved.pt"), weights_only=True)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    assert load_file(save_original(ours, tmp_path / "saved.safetensors")).keys() == expected.keys()
    other = original()[0]
    builders.randomise(other, 9)
    missing, unexpected = other.load_state_dict(saved, strict=False)
    assert not unexpected
    # What the file names once has two names in the model.
    assert all("lang_encoder" in name or "vision_encoder" in name for name in missing)
    for name, value in model.state_dict().items():
        if name.startswith("perceiver.") or "gated_cross_attn" in name:
            assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("frozen", [False, True])
def test_saved_as_otter(tmp_path: Path, frozen: bool) -> None:
    model, lm, tower = original()
    ours = loaded(write(tmp_path / "checkpoint.pt", released(model)), lm, tower)
    expected = otter(model)
    if not frozen:  # its trainer leaves out what is frozen
        kept = ("perceiver.", "lang_encoder.model.embed_tokens.")
        expected = {k: v for k, v in expected.items() if k.startswith(kept) or "gated_cross_attn_layer" in k}
    saved = load_file(save_original(ours, tmp_path / "saved.safetensors", layout="otter", frozen=frozen))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    changed = copy.deepcopy(ours)
    with torch.no_grad():
        for p in changed.parameters():
            p.mul_(1.1)
    load_original(changed, tmp_path / "saved.safetensors", frozen=frozen)
    inputs, pixels = of_inputs(), of_inputs()["vision_x"].double()
    logits = [net(inputs["lang_x"], pixels).logits for net in (changed, ours)]
    assert torch.allclose(*logits) is frozen
    with pytest.raises(ValueError, match="hold no frozen models"):
        save_original(ours, tmp_path / "no.pt", frozen=True)
    with pytest.raises(ValueError, match="unknown layout 'flamingo'"):
        save_original(ours, tmp_path / "no.pt", layout="flamingo")  # type: ignore[arg-type]
    assert not (tmp_path / "no.pt").exists()


def test_frames_are_saved_too(tmp_path: Path) -> None:
    model, lm, tower = original()
    options = {"dim": MEDIA_DIM, "max_num_frames": 3, "max_num_media": 2}
    model.perceiver = builders.randomise(builders.PerceiverResampler(**options), 3).double()
    ours = loaded(write(tmp_path / "checkpoint.pt", released(model)), lm, tower)
    saved = load_file(save_original(ours, tmp_path / "saved.safetensors"))
    assert saved["perceiver.media_time_embs"].shape == (2, 1, MEDIA_DIM)
    assert all(torch.equal(saved[name], value) for name, value in released(model).items())


def test_embeddings_of_new_tokens(tmp_path: Path) -> None:
    """OpenFlamingo adds tokens to the language model and saves all embeddings."""
    model, lm, tower = original()
    state = released(model)
    name = "lang_encoder.model.embed_tokens.weight"
    state[name] = torch.cat((state[name] + 1, torch.randn(2, state[name].shape[1], dtype=torch.float64)))
    path = write(tmp_path / "checkpoint.pt", state)
    ours = loaded(path, copy.deepcopy(lm), tower)
    assert torch.equal(ours.get_input_embeddings().weight, state[name])
    assert ours.config.text_config.vocab_size == 98
    narrow = Flamingo(lm, ours.model.vision_encoder, ours.config.bridge)
    with pytest.raises(CheckpointMismatchError, match=r"embed_tokens.weight: the checkpoint has \(98, 64\)"):
        load_original(narrow, path)


def test_everything_that_does_not_match_is_listed_and_nothing_changes(tmp_path: Path) -> None:
    model, lm, tower = original()
    state = released(model)
    ours = loaded(write(tmp_path / "checkpoint.pt", state), lm, tower)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    prefix = "lang_encoder.model.layers"
    state["lang_encoder.model.layers.0.gated_cross_attn_layer.attn_gate"] = torch.ones(1)
    state["lang_encoder.strange.weight"] = torch.ones(1)
    state["perceiver.latents"] = torch.ones(5, MEDIA_DIM)
    del state[f"{prefix}.3.gated_cross_attn_layer.attn.to_kv.weight"], state["perceiver.layers.2.1.3.weight"]
    state[f"{prefix}.1.gated_cross_attn_layer.ff_gate"] = torch.full((1,), 9.0)
    with pytest.raises(CheckpointMismatchError) as caught:
        load_original(ours, write(tmp_path / "other.pt", state))
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "missing: blocks.1.to_k.weight",
        "missing: blocks.1.to_v.weight",
        "missing: resampler.layers.2.ffn_down.weight",
        "unexpected: lang_encoder.model.layers.0.gated_cross_attn_layer.attn_gate",
        "unexpected: lang_encoder.strange.weight",
        "shape of resampler.latents: the checkpoint has (5, 48), the model has (64, 48)",
    ]
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_clear_errors(tmp_path: Path) -> None:
    model, lm, tower = original()
    path = write(tmp_path / "checkpoint.pt", released(model))
    everything = {k: v.clone() for k, v in model.state_dict().items()}
    everything["lang_encoder.gated_cross_attn_layers.1.attn_gate"] += 1
    ours = loaded(path, lm, tower)
    with pytest.raises(CheckpointMismatchError, match=r"two different tensors for blocks.0.attn_gate"):
        load_original(ours, write(tmp_path / "torn.pt", everything))
    half = write(tmp_path / "half.pt", {k: v for k, v in everything.items() if k.startswith("perceiver.")})
    with pytest.raises(CheckpointMismatchError, match=r"before decoder layers \[\] and a resampler"):
        loaded(half, lm, tower)
    with pytest.raises(TypeError, match="got Linear"):
        load_original(nn.Linear(2, 2), path)
    vector = FlamingoForConditionalGeneration.from_parts(lm, tower, image_token_id=IMAGE_TOKEN, gate="vector")
    with pytest.raises(ValueError, match=r"vector gates; .* scalar gates"):
        save_original(vector, tmp_path / "vector.pt")
    assert not (tmp_path / "vector.pt").exists()

"""Recipes against real models: every path leads somewhere, and what is trained is what the original trains."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mllm_fast
from mllm_fast.families.recipes import RECIPES, MissingPartError, Recipe, recipe_of, resolve
from mllm_fast.models.minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from mllm_fast.models.mplug_owl import MplugOwlConfig, MplugOwlForConditionalGeneration
from tests.families import builders, qformers
from tests.finetune.every_system import SYSTEMS, built

_QFORMER = r"qformer\..*|query_tokens|language_projection\..*|vision_model\.post_layernorm\..*"
_HEADS = r"(vision|text)_projection\..*|itm_head\..*"
_RETRIEVAL = rf"qformer\..*|query_tokens|embeddings\..*|{_HEADS}|vision_model\.post_layernorm\..*"

# What each part trains, by patterns over the whole names of the parameters, written down without the recipes.
TRAINED: dict[str, dict[str, str]] = {
    "open_flamingo": {
        "bridge": r"perceiver\..*|.*gated_cross_attn_layer\..*",
        "embeddings": r"lang_encoder\.model\.embed_tokens\.weight",
    },
    "flamingo_pytorch": {"bridge": r"perceiver_resampler\..*|layers\.(0|2)\.1\..*"},
    "flamingo": {
        "bridge": r"(resampler|blocks)\..*",
        "embeddings": r"lm\.model\.embed_tokens\.weight",
        "vision": r"vision_encoder\..*",
    },
    "flamingo_hf": {
        "bridge": r"model\.(resampler|blocks)\..*",
        "embeddings": r"model\.lm\.model\.embed_tokens\.weight",
        "vision": r"model\.vision_encoder\..*",
    },
    "idefics": {
        "bridge": r"model\.(gated_cross_attn_layers|perceiver_resampler)\..*",
        "embeddings": r".*\.additional_(embedding|fc)\..*",
        "vision": r"model\.vision_model\.(?!post_layernorm).*",
    },
    "idefics2": {"bridge": r"model\.connector\..*", "vision": r"model\.vision_model\..*"},
    "mllama": {
        "bridge": r"model\.multi_modal_projector\..*|model\.language_model\.layers\.(1|3)\..*",
        "projection": r"model\.multi_modal_projector\..*",
        "vision": r"model\.vision_model\..*",
    },
    "blip": {"vision": r"vision_model\..*", "decoder": r"text_decoder\..*"},
    "blip_vqa": {"vision": r"vision_model\..*", "encoder": r"text_encoder\..*", "decoder": r"text_decoder\..*"},
    "blip_retrieval": {
        "vision": r"vision_model\..*",
        "encoder": r"text_encoder\..*",
        "heads": r"(vision_proj|text_proj|itm_head)\..*",
    },
    "blip_pretraining": {
        "vision": r"vision_model\..*",
        "encoder": r"text_encoder\..*",
        "heads": r"(vision_projection|text_projection|itm_head)\..*|temperature",
    },
    "blip2": {"bridge": _QFORMER, "projection": r"language_projection\..*", "vision": r"vision_model\..*"},
    "blip2_t5": {"bridge": _QFORMER},
    "blip2_retrieval": {"bridge": _RETRIEVAL, "vision": r"vision_model\..*"},
    "blip2_stage1": {
        "bridge": rf"retrieval\.({_RETRIEVAL})|lm_head\..*|temperature",
        "vision": r"retrieval\.vision_model\..*",
    },
    "instructblip": {"bridge": _QFORMER, "projection": r"language_projection\..*", "vision": r"vision_model\..*"},
    "instructblipvideo": {"bridge": _QFORMER, "projection": r"language_projection\..*", "vision": r"vision_model\..*"},
    "llava": {
        "projection": r"model\.multi_modal_projector\..*",
        "language_model": r"model\.language_model\..*|lm_head\..*",
    },
    "minigpt4": {"projection": r"language_projection\..*"},
    "mplug_owl": {"bridge": r"query_tokens|abstractor\..*", "vision": r"vision_model\..*"},
}
# Parameters of a part that this model's configuration reads nothing of: CLIP's norm of the class token.
UNREAD = {("flamingo_hf", "vision"): r".*\.post_layernorm\..*"}
CASES = [(name, part) for name, parts in TRAINED.items() for part in parts]


def test_every_recipe_is_tested() -> None:
    assert set(TRAINED) == set(SYSTEMS)
    used = {id(recipe_of(built(name)[0])) for name in SYSTEMS}
    assert used == {id(recipe) for recipe in RECIPES.values()}


@pytest.mark.parametrize(("name", "part"), CASES)
def test_a_part_is_what_the_original_trains_and_all_of_it_gets_gradients(name: str, part: str) -> None:
    model, batch = built(name)
    expected = {n for n, _ in model.named_parameters() if re.fullmatch(TRAINED[name][part], n)}
    plan = mllm_fast.prepare_finetuning(model, part)
    assert set(plan.trained) == expected
    SYSTEMS[name].loss(model, batch).backward()
    unread = UNREAD.get((name, part), "")
    expected = {n for n in expected if not re.fullmatch(unread, n)}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == expected


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_vision_and_language_model(name: str) -> None:
    model, _ = built(name)
    recipe = recipe_of(model)
    assert recipe.vision is not None
    (vision,) = resolve(model, recipe.vision)
    assert re.search("vis|img|Patch|tower", f"{recipe.vision} {type(vision).__name__}")
    if recipe.language_model is not None:
        (text,) = resolve(model, recipe.language_model)
        assert isinstance(text, nn.Module)
        assert not {id(p) for p in text.parameters()} & {id(p) for p in vision.parameters()}
    for path in (*recipe.fp32, *recipe.evaluation):
        assert resolve(model, path)


def test_sizes_of_released_models() -> None:
    """MiniGPT-4 over Vicuna-7B trains 768 x 4096 + 4096; mPLUG-Owl's abstractor has 77.2 M in its layers."""
    with torch.device("meta"):
        minigpt4 = MiniGPT4ForConditionalGeneration(MiniGPT4Config(text_config=LlamaConfig()))
        owl = MplugOwlForConditionalGeneration(MplugOwlConfig())
    plan = mllm_fast.prepare_finetuning(minigpt4, "projection")
    assert sum(p.numel() for p in plan.trained.values()) == 3_149_824
    plan = mllm_fast.prepare_finetuning(owl, "lora", lora=mllm_fast.Lora(r=4))
    assert sum(p.numel() for p in plan.trained.values()) == 2_097_152
    assert all(n.startswith("language_model.") for n in plan.trained)
    assert {row.part: row.optimizer for row in plan.rows}["lora"] == 8 * 2_097_152


def test_subclasses_have_their_systems_recipe() -> None:
    class Mine(type(qformers.generator("blip2"))):  # type: ignore[misc]
        pass

    model = qformers.generator("blip2")
    before = recipe_of(model)
    model.__class__ = Mine
    assert recipe_of(model) is before


def test_unknown_systems() -> None:
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,
                                         num_attention_heads=1))  # fmt: skip
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no recipe.*\n(.*\n)*.*LlavaForConditionalGeneration"):
        recipe_of(llama)


def test_a_missing_part() -> None:
    model = qformers.generator("blip2")
    model.language_projektion = model.language_projection
    del model.language_projection
    with pytest.raises(MissingPartError, match=r"nothing at language_projection.*nearest is language_projektion"):
        mllm_fast.prepare_finetuning(model, "bridge")


def test_what_paths_mean() -> None:
    model = builders.of_model()
    blocks = resolve(model, "lang_encoder.gated_cross_attn_layers.*")
    assert len(blocks) == 2  # the other two places hold None
    assert resolve(model, "perceiver.latents") == [model.perceiver.latents]
    assert resolve(model, "lang_encoder.get_input_embeddings()") == [model.lang_encoder.model.embed_tokens]
    assert len(resolve(model, "perceiver.layers.*.*[to_q]")) == 6
    assert resolve(model, "perceiver.frame_embs?") == resolve(model, "perceiver.latents.weight?") == []
    for path in ("nowhere", "perceiver.frame_embs", "lang_encoder.get_nothing()", "perceiver.layers.*[to_q]"):
        with pytest.raises(MissingPartError, match=re.escape(path.split(".")[0])):
            resolve(model, path)


def test_recipes_name_only_parts_that_they_explain() -> None:
    for recipe in RECIPES.values():
        assert isinstance(recipe, Recipe)
        assert "lora" not in recipe.parts
        assert all(paths for paths in recipe.parts.values())

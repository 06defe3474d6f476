"""Exactly the language model: which layers are chosen in each system, by name and on request."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MllamaForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from mllm_fast.quantization import NothingToQuantizeError, UnmatchedNameError
from mllm_fast.quantization.selection import names_to_skip, select
from tests.families import blip_models, builders, qformers
from tests.models import helpers, minigpt4_models, mplug_owl_models
from tests.quantization import systems

_LLAMA = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_OPT = r"(self_attn\.(q|k|v|out)_proj|fc1|fc2)"


def mllama() -> nn.Module:
    from transformers import MllamaConfig

    text = {
        "vocab_size": 50, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
        "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))


# What is quantised, as one pattern over all paths of all plain linear layers.
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "blip2": (lambda: qformers.generator("blip2"), rf"language_model\.model\.decoder\.layers\.\d+\.{_OPT}"),
    "blip2-t5": (
        lambda: qformers.generator("blip2", "t5"),
        r"language_model\.(encoder|decoder)\.block\.\d+\.layer\.\d\.(Self|EncDec)Attention\.[qkvo]"
        r"|language_model\.(encoder|decoder)\.block\.\d+\.layer\.\d\.DenseReluDense\.(wi|wi_\d)",
    ),
    "instructblip": (
        lambda: qformers.generator("instructblip"),
        rf"language_model\.model\.decoder\.layers\.\d+\.{_OPT}",
    ),
    "instructblipvideo": (
        lambda: qformers.generator("instructblipvideo"),
        rf"language_model\.model\.decoder\.layers\.\d+\.{_OPT}",
    ),
    "llava": (systems.llava, rf"model\.language_model\.layers\.\d+\.{_LLAMA}"),
    "idefics": (builders.idefics, rf"model\.layers\.\d+\.{_LLAMA}"),
    "mllama": (mllama, rf"model\.language_model\.layers\.[02]\.{_LLAMA}"),
    "open_flamingo": (
        builders.of_model,
        rf"lang_encoder\.(model\.layers\.\d+\.decoder_layer|old_decoder_blocks\.\d+)\.{_LLAMA}",
    ),
    "flamingo-pytorch": (builders.palm, r"layers\.\d+\.0\.fn\.(fused_attn_ff_proj|attn_out|ff_out\.\d+)"),
    "flamingo": (helpers.flamingo, rf"lm\.model\.layers\.\d+\.{_LLAMA}"),
    "mplug_owl": (mplug_owl_models.owl, rf"language_model\.model\.layers\.\d+\.{_LLAMA}"),
    "minigpt4": (minigpt4_models.minigpt4, rf"language_model\.model\.layers\.\d+\.{_LLAMA}"),
    "llama": (systems.llama, rf"model\.layers\.\d+\.{_LLAMA}"),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=50)),
        r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+",
    ),
}


def linears(model: nn.Module) -> list[str]:
    named = model.named_modules(remove_duplicate=False)
    return [name for name, m in named if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def chosen(model: nn.Module, **options: Any) -> set[str]:
    return {path for target in select(model, **options).targets for path in target.paths}


@pytest.mark.parametrize("name", CASES)
def test_exactly_the_language_model(name: str) -> None:
    build, pattern = CASES[name]
    model = build()
    expected = {path for path in linears(model) if re.fullmatch(pattern, path)}
    assert len(expected) >= 8
    assert chosen(model) == expected
    # On the meta device, as `load` sees the model.
    assert chosen(build().to("meta")) == expected
    # What is left is accounted for, layer by layer or as a whole module.
    selection = select(model)
    told = {*(path for path, _ in selection.left), *selection.outside}
    rest = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in expected]
    assert [n for n in rest if not any(n == t or n.startswith(f"{t}.") for t in told)] == []
    assert not [n for n in expected if any(n == t or n.startswith(f"{t}.") for t in told)]


@pytest.mark.parametrize("name", CASES)
def test_transformers_is_told_the_same(name: str) -> None:
    model = CASES[name][0]()
    wanted = chosen(model)
    kept = [n for m in model.modules() for n in (getattr(m, "_keep_in_fp32_modules", None) or ())]
    names = names_to_skip(model, wanted)
    plain = [n for n in linears(model) if type(model.get_submodule(n)).__name__ in ("Linear", "Conv1D")]
    first = {n for n, _ in model.named_modules()}
    assert {n for n in plain if should_convert_module(n, [*names, *kept]) and n in first} == wanted & first


def test_names_that_are_the_end_of_another() -> None:
    """transformers takes a name also as the end of any path, without regard to dots."""
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "lm": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
    assert not should_convert_module("lm.q_proj", ["proj"])
    names = names_to_skip(model, ["lm.q_proj"])
    assert should_convert_module("lm.q_proj", names)
    assert not should_convert_module("proj", names)
    assert names_to_skip(model, ["proj", "lm.q_proj"]) == []


def test_skip() -> None:
    model = systems.llava()
    everything = chosen(model)
    without = {"skip": ["layers.0", "o_proj"]}
    assert chosen(model, **without) == {n for n in everything if ".layers.0." not in n and not n.endswith("o_proj")}
    assert chosen(model, skip=["model.language_model.layers.1.mlp"]) == {n for n in everything if ".1.mlp." not in n}
    # The vision tower, by the name that transformers silently ignores, is not quantised anyway.
    assert chosen(model, skip=["vision_tower"]) == everything
    reasons = dict(select(model, **without).left)
    assert reasons["model.language_model.layers.0.mlp.up_proj"] == "named in skip"


def test_include() -> None:
    model = systems.llava()
    more = chosen(model, include=["lm_head", "multi_modal_projector"]) - chosen(model)
    assert more == {"lm_head", "model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"}
    tower = chosen(model, include=["vision_tower"], skip=["out_proj"]) - chosen(model)
    assert len(tower) == 2 * 5
    assert all("vision_tower" in path for path in tower)


@pytest.mark.parametrize(
    ("name", "gated"),
    [
        ("idefics", r"model\.gated_cross_attn_layers\..*"),
        ("mllama", r"model\.language_model\.layers\.1\..*"),
        ("open_flamingo", r".*gated_cross_attn_layer.*"),
        ("flamingo-pytorch", r"layers\.\d+\.1\..*"),
        ("flamingo", r"blocks\..*"),
    ],
)
def test_gated_layers_on_request(name: str, gated: str) -> None:
    build, pattern = CASES[name]
    model = build()
    expected = {n for n in linears(model) if re.fullmatch(pattern, n) or re.fullmatch(gated, n)}
    assert chosen(model, gated_layers=True) == expected
    assert len(expected) > len(chosen(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ["vision_towr"]}, "skip names 'vision_towr'.*did you mean vision_tower"),
        ({"skip": ["model.vision_tower."]}, "which no module of LlavaForConditionalGeneration has"),
        ({"skip": ["roj"]}, "no module"),
        ({"include": ["lm_heads"]}, "include names 'lm_heads'.*did you mean lm_head"),
        ({"include": ["embed_tokens"]}, "no linear layer"),
        ({"skip": ["q_proj"], "include": ["mlps"]}, "include names 'mlps'"),
    ],
)
def test_names_that_match_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmatchedNameError, match=message):
        select(systems.llava(), **options)


def test_clear_errors() -> None:
    with pytest.raises(TypeError, match="expected a list"):
        select(systems.llava(), skip="lm_head")
    with pytest.raises(NothingToQuantizeError, match="no gated cross-attention layers"):
        select(systems.llava(), gated_layers=True)
    for model in (blip_models.model(), nn.Linear(3, 3), systems.llava().model.vision_tower):
        with pytest.raises(NothingToQuantizeError, match="no language model was found"):
            select(model)
    tied = systems.llama(tie_word_embeddings=True)
    with pytest.raises(UnmatchedNameError, match="input embeddings"):
        select(tied, include=["lm_head"])
    assert "lm_head" not in chosen(tied)


def test_a_model_without_language_model_by_name() -> None:
    """`include` alone is enough."""
    found = chosen(blip_models.model(), include=["text_decoder"], skip=["crossattention"])
    assert found
    assert all(n.startswith("text_decoder.") and "crossattention" not in n for n in found)
    assert "text_decoder.cls.predictions.decoder" not in found  # its weight is that of the embeddings

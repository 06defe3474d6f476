"""LoRA on mPLUG-Owl: on the language model and nowhere else, with the original's number of parameters and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from mllm_fast.models.mplug_owl import (
    MplugOwlConfig,
    MplugOwlForConditionalGeneration,
    load_original,
    lora_targets,
)
from mllm_fast.models.original_checkpoint import CheckpointMismatchError
from tests.models.mplug_owl_models import inputs, owl


def lora(model: nn.Module, r: int = 2, *names: str) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=32, target_modules=lora_targets(*names)))


@pytest.mark.parametrize(("r", "expected"), [(4, 2_097_152), (8, 4_194_304)])
def test_lora_over_llama_7b(r: int, expected: int) -> None:
    """The released size: 303.2 M parameters of the vision model, 77.2 M of the abstractor's layers, LLaMA-7B."""
    with torch.device("meta"):
        model = MplugOwlForConditionalGeneration(MplugOwlConfig())

        def count(module: nn.Module) -> float:
            return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)

        assert (count(model.vision_model), count(model.abstractor.encoder)) == (303.2, 77.2)
        assert sum(p.numel() for p in model.language_model.parameters()) == 6_738_415_616
        trained = {name: p for name, p in lora(model, r).named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == expected
    assert len(trained) == 32 * 2 * 2
    assert all(".language_model." in name and "lora_" in name for name in trained)


def test_lora_stays_in_the_language_model() -> None:
    """GPT-NeoX names its projections as the vision model does, and OPT as the abstractor's and its own."""
    for text, names in (("gpt_neox", ("query_key_value", "dense")), ("opt", ("q_proj", "out_proj"))):
        plain = peft.LoraConfig(r=2, target_modules=list(names))
        everywhere = peft.get_peft_model(owl(text), plain)
        assert any("language_model" not in n for n, p in everywhere.named_parameters() if p.requires_grad)
        model = lora(owl(text), 2, *names)
        adapted = [n for n, p in model.named_parameters() if p.requires_grad]
        assert adapted
        assert all(".language_model." in n and n.split(".lora_")[0].rsplit(".", 1)[1] in names for n in adapted)


@pytest.mark.parametrize("old_names", [True, False])
def test_a_checkpoint_of_the_originals_lora_training(tmp_path: Path, old_names: bool) -> None:
    """It is the whole model as PEFT wrapped it; older versions of PEFT called the weight below an adapter by its own name."""
    trained = lora(owl(seed=1))
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if "lora_" in name:
                p.normal_()
    state = trained.state_dict()
    if old_names:
        state = {name.replace(".base_layer.", "."): value for name, value in state.items()}
    assert "base_model.model.query_tokens" in state
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = lora(owl(seed=2))
    load_original(model, tmp_path / "pytorch_model.bin")
    assert torch.equal(model(**inputs()).logits, trained(**inputs()).logits)
    with pytest.raises(CheckpointMismatchError, match=r"unexpected: .*q_proj.lora_A.default.weight"):
        load_original(owl(), tmp_path / "pytorch_model.bin")
    torch.save(owl().state_dict(), tmp_path / "plain.bin")
    with pytest.raises(CheckpointMismatchError, match=r"missing: .*q_proj.lora_A.default.weight"):
        load_original(model, tmp_path / "plain.bin")

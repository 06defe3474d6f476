"""Requests to prepare_finetuning that are refused: what is said, and that nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mllm_fast
from mllm_fast.finetune import BatchShape, Lora, prepare_finetuning
from mllm_fast.finetune import prepare as prepare_module
from tests.families import builders, qformers
from tests.finetune.every_system import built, nf4, state

bf16 = torch.bfloat16


BAD: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "unknown part": (lambda m: prepare_finetuning(m, "bridge"), r"'bridge'; this system has projection, language_model, lora"),
    "empty": (lambda m: prepare_finetuning(m, ""), r"train names ''"),
    "twice": (lambda m: prepare_finetuning(m, "lora+lora"), r"a part twice"),
    "lora unasked": (lambda m: prepare_finetuning(m, "projection", lora=Lora()), r"'projection\+lora'"),
    "no such target": (
        lambda m: prepare_finetuning(m, "lora", lora=Lora(targets=("c_attn", "q_proj"))),
        r"called c_attn; its layers are down_proj, .*v_proj",
    ),
    "vision's layer": (lambda m: prepare_finetuning(m, "lora", lora=Lora(targets=("fc1",))), r"called fc1"),
    "quantised part": (
        lambda m: prepare_finetuning(m, "projection+language_model"),
        r"language_model cannot be trained, because model\.language_model.*q_proj and 27 more is quantised",
    ),
    "dtype": (lambda m: prepare_finetuning(m, "projection", trained_dtype=torch.int8), r"trained_dtype is torch.int8"),
    "checkpointing": (lambda m: prepare_finetuning(m, "lora", checkpointing="all"), r"checkpointing is 'all'; .*'offload'"),
    "optimizer": (lambda m: prepare_finetuning(m, "projection", optimizer="sgd"), r"optimizer is 'sgd'; .*'adamw8bit'"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_a_refused_request_changes_nothing(case: str) -> None:
    call, message = BAD[case]
    model = nf4("llava")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert state(model) == before


def test_a_narrow_dtype_is_refused() -> None:
    model, _ = built("blip2")
    with pytest.raises(ValueError, match=r"bfloat16, narrower than torch.float32.*load the language model"):
        prepare_finetuning(model, "bridge", trained_dtype=bf16)


def test_systems_without_a_language_model_have_no_lora() -> None:
    with pytest.raises(ValueError, match=r"'lora'; this system has bridge, vision"):
        prepare_finetuning(qformers.retrieval(), "lora")


def test_a_part_that_is_not_there() -> None:
    model = builders.idefics(resampler=False)
    assert not any("resampler" in n for n in prepare_finetuning(model, "bridge").trained)
    model.model.embed_tokens.additional_embedding = None
    del model.lm_head.additional_fc
    with pytest.raises(ValueError, match="embeddings has no parameters"):
        prepare_finetuning(model, "embeddings")


def test_another_lora_than_the_model_has() -> None:
    model = nf4("llava")
    prepare_finetuning(model, "lora", lora=Lora(r=2))
    prepare_finetuning(model, "lora", lora=Lora(r=2))
    before = state(model)
    for other in (Lora(r=4), Lora(r=2, alpha=3), Lora(r=2, dropout=0.1), Lora(r=2, targets=("q_proj",))):
        with pytest.raises(ValueError, match=r"has LoRA already, on 8 layers, and not as Lora\(r="):
            prepare_finetuning(model, "lora", lora=other)
    assert state(model) == before


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch, trained_before: bool) -> None:
    model = nf4("llava")
    mllm_fast.fuse(model)
    if trained_before:
        prepare_finetuning(model, "projection")
    before = state(model)

    def fail(*args: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(prepare_module, "fuse", lambda *args, **kwargs: fail())
    with pytest.raises(MemoryError):
        prepare_finetuning(model, "projection+lora")
    assert state(model) == before


@pytest.mark.parametrize(("arguments", "message"), [
    ({"r": 0}, "r >= 1"), ({"targets": ()}, "at least one target"), ({"targets": "q_proj"}, r"\('q_proj',\)"),
    ({"dropout": 1.0}, "dropout is 1.0"),
])  # fmt: skip
def test_bad_lora(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"samples": 0, "tokens": 1}, "at least one sample"), ({"samples": 1, "tokens": 0}, "at least one"),
    ({"samples": 1, "tokens": 4, "images": -1}, "fewer than 0"),
    ({"samples": 1, "tokens": 4, "supervised": 5}, "0 to tokens=4"),
])  # fmt: skip
def test_bad_batch_shapes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchShape(**arguments)

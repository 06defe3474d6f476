"""HF BLIP: the fused text layers in their three roles, the heads around them and the vision attention, against upstream."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

import mllm_fast
from tests.families.blip_models import (
    IMAGE,
    LABELS,
    PADDINGS,
    ROLES,
    TEXT,
    TOKENS,
    fresh,
    inputs,
    model,
    run_text,
    task,
    text_mask,
    text_model,
    twins,
)
from tests.families.instruments import (
    Results,
    assert_same,
    assert_within_twice,
    backward_results,
    check_precision,
    recording,
)

# the text model in its three roles


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("role", ROLES)
def test_text_model(role: str, padding: str) -> None:
    fused, upstream = twins(text_model())
    assert_same(run_text(fused, role, padding), run_text(upstream, role, padding))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("role", ROLES)
def test_text_model_at_other_levels(role: str, level: int) -> None:
    fused, upstream = twins(text_model(), level=level)
    assert_same(run_text(fused, role, "right"), run_text(upstream, role, "right"))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("mask", ["left", "nothing"])
def test_rows_that_see_nothing(mask: str, role: str) -> None:
    """Upstream's additive mask makes such a row attend to everything alike; all rows are compared, forward only."""
    fused, upstream = twins(text_model().double())
    ids, image = torch.randint(3, 90, (2, 7)), torch.randn(2, TOKENS, IMAGE).double()
    rows = text_mask("left")
    assert rows is not None
    if mask == "nothing":
        rows[1] = 0
    kwargs = {"encoder_hidden_states": None if role == "unimodal" else image, "is_decoder": role == "decoder"}
    ours, theirs = (m(input_ids=ids, attention_mask=rows, **kwargs).last_hidden_state for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("role", ROLES)
def test_text_model_precision(role: str, dtype: torch.dtype) -> None:
    def run(text: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        return run_text(text, role, "right", dtype, seed=seed)

    check_precision(text_model, mllm_fast.fuse, run, dtype)


def test_text_model_under_autocast() -> None:
    ours, theirs, exact = [], [], []
    for seed in range(3):
        fused, upstream = twins(text_model(seed))
        exact.append(run_text(copy.deepcopy(upstream), "decoder", "right", torch.float32, seed=seed))
        with torch.autocast("cpu", torch.bfloat16):
            ours.append(run_text(fused, "decoder", "right", torch.float32, seed=seed))
            theirs.append(run_text(upstream, "decoder", "right", torch.float32, seed=seed))
    assert_within_twice(ours, theirs, exact, eps=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "quick_gelu", "silu"])
def test_other_activations(activation: str) -> None:
    fused, upstream = twins(text_model(hidden_act=activation))
    assert_same(run_text(fused, "decoder"), run_text(upstream, "decoder"))


def test_a_layer_by_itself() -> None:
    fused, upstream = twins(text_model().encoder.layer[0].double())
    x, image = torch.randn(2, 5, TEXT).double(), torch.randn(2, TOKENS, IMAGE).double()
    dense = torch.zeros(2, 1, 5, 5).double().masked_fill_(torch.rand(2, 1, 5, 5) < 0.3, -1e9)
    for mask in (None, dense):
        torch.testing.assert_close(fused(x, image, mask), upstream(x, image, mask), atol=1e-10, rtol=1e-10)


def test_a_text_model_without_cross_attention() -> None:
    fused, upstream = twins(text_model(is_decoder=False))
    assert_same(run_text(fused, "unimodal", "right"), run_text(upstream, "unimodal", "right"))


# the heads


TASKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "captioning": (BlipForConditionalGeneration, {}),
    "captioning_loss": (BlipForConditionalGeneration, {"labels": LABELS}),
    "captioning_last_logits": (BlipForConditionalGeneration, {"logits_to_keep": 2}),
    "captioning_some_logits": (BlipForConditionalGeneration, {"logits_to_keep": torch.tensor([0, 3, 6])}),
    "vqa_loss": (BlipForQuestionAnswering, {"labels": LABELS.clamp_min(0)}),
    "itm": (BlipForImageTextRetrieval, {}),
    "itc": (BlipForImageTextRetrieval, {"use_itm_head": False}),
}


@pytest.mark.parametrize("name", TASKS)
def test_task(name: str) -> None:
    head, kwargs = TASKS[name]
    fused, upstream = twins(model(head).double())
    assert_same(task(fused, **kwargs), task(upstream, **kwargs), 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["captioning_loss", "vqa_loss", "itm"])
def test_task_precision(name: str, dtype: torch.dtype) -> None:
    head, kwargs = TASKS[name]

    def run(m: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        pixels = inputs(seed=seed)["pixel_values"].bfloat16().half()
        return task(m.to(dtype), pixel_values=pixels.to(dtype), **kwargs)

    check_precision(lambda seed: model(head, seed), mllm_fast.fuse, run, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_smoothing_and_reductions(reduction: str) -> None:
    fused, upstream = twins(model(label_smoothing=0.1).double())
    image = torch.randn(2, TOKENS, IMAGE).double()
    given = {
        "input_ids": inputs()["input_ids"],
        "labels": LABELS,
        "encoder_hidden_states": image,
        "reduction": reduction,
    }
    losses = [m.text_decoder(**given).loss for m in (fused, upstream)]
    torch.testing.assert_close(*losses, atol=1e-10, rtol=1e-10)
    scores = [m.text_decoder(**given, return_logits=True) for m in (fused, upstream)]
    torch.testing.assert_close(*scores, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("head", [BlipForConditionalGeneration, BlipForImageTextRetrieval], ids=lambda h: h.__name__)
def test_outputs_that_are_recorded(head: type[nn.Module]) -> None:
    """Hidden states from the ops, attentions from upstream's code; the hooks of the latter do not end the former."""
    fused, upstream = twins(model(head).double())
    given = fresh(inputs(left=2))
    given["pixel_values"] = given["pixel_values"].double()
    text = [getattr(m, "text_decoder", None) or m.text_encoder for m in (fused, upstream)]
    image = torch.randn(2, TOKENS, IMAGE).double()
    words = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "encoder_hidden_states": image}
    for kwargs in ({"output_hidden_states": True}, {"output_attentions": True, "output_hidden_states": True}):
        for ours, theirs in (
            (fused(**given, **kwargs), upstream(**given, **kwargs)),
            (text[0](**words, **kwargs), text[1](**words, **kwargs)),
        ):
            for name in ("hidden_states", "attentions", "cross_attentions"):
                assert (ours.get(name) is None) == (theirs.get(name) is None), name
                for mine, reference in zip(ours.get(name) or (), theirs.get(name) or (), strict=True):
                    torch.testing.assert_close(mine, reference, atol=1e-9, rtol=1e-9)
    for kwargs in ({}, {"output_hidden_states": True}):
        with recording() as seen:
            fused(**given, **kwargs)
        assert seen.count("_softmax") == 0, "upstream's attention ran"


def test_tuples_instead_of_outputs() -> None:
    fused, upstream = twins(model().double())
    given = {"input_ids": inputs()["input_ids"], "encoder_hidden_states": torch.randn(2, TOKENS, IMAGE).double()}
    for part in ("text_decoder", "text_decoder.bert"):
        ours, theirs = (m.get_submodule(part)(**given, return_dict=False) for m in (fused, upstream))
        assert len(ours) == len(theirs)
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-9, rtol=1e-9)


def test_positional_arguments() -> None:
    fused, upstream = twins(text_model().double())
    ids, image = torch.randint(3, 90, (2, 5)), torch.randn(2, TOKENS, IMAGE).double()
    ours, theirs = (m(ids, torch.ones_like(ids), None, None, None, image).last_hidden_state for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    embeds = torch.randn(2, 5, TEXT).double()
    for name in ("inputs_embeds", "encoder_embeds"):
        given = {name: embeds, "encoder_hidden_states": image}
        ours, theirs = (m(**copy.deepcopy(given)).last_hidden_state for m in (fused, upstream))
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_vision_attention(training: bool) -> None:
    fused, upstream = twins(model().vision_model.encoder.layers[0].self_attn.double().train(training))
    results = []
    for attention in (fused, upstream):
        x = torch.randn(2, 9, IMAGE, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        results.append(backward_results(attention(x)[0], {"x": x}, attention))
    assert_same(*results)
    ours, theirs = (m(torch.ones(1, 3, IMAGE).double(), output_attentions=True) for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs)

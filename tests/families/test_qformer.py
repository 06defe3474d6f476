"""The fused Q-Formers of BLIP-2 and InstructBLIP against upstream's: outputs, gradients, what is computed, and requests."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import Blip2QFormerModel

import mllm_fast
from tests.families.instruments import (
    Results,
    assert_same,
    assert_within_twice,
    backward_results,
    check_precision,
    fused,
    recording,
)
from tests.families.qformers import IMAGE, KINDS, LAYERS, QUERIES, TOKENS, Kind, arguments, draw, projections

CROSS = 3  # layers 0, 2 and 4
PASSES = ["queries", "text", "text only"]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
passes = pytest.mark.parametrize("which", PASSES)
BLIP2 = KINDS[0]


@torch.no_grad()
def calm(model: nn.Module) -> nn.Module:
    """Smaller matrices: the drawn ones amplify a rounding error at random, which says nothing about who made it."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter *= 0.7
    return model


def run(kind: Kind, which: str, model: nn.Module, seed: int, dtype: torch.dtype, **more: Any) -> Results:
    """Output and all gradients; rows of padding are not compared, as nobody reads them."""
    model.zero_grad(set_to_none=True)
    drawn = draw(seed)
    leaves = {name: drawn[name].to(dtype).requires_grad_() for name in ("tokens", "image")}
    output = model(**arguments(kind, which, drawn, **leaves), **more).last_hidden_state
    return backward_results(output, leaves, model)


@kinds
@passes
@pytest.mark.parametrize("level", [0, 1])
def test_output_and_gradients_equal_upstream(kind: Kind, which: str, level: int) -> None:
    model = kind.build().double().train()
    ours = run(kind, which, fused(model, level=level), 0, torch.float64)
    assert_same(ours, run(kind, which, model, 0, torch.float64))


@kinds
@passes
def test_inference_equals_upstream(kind: Kind, which: str) -> None:
    model = kind.build().double()
    drawn = draw(1)
    given = arguments(kind, which, drawn, drawn["tokens"], drawn["image"])
    with torch.no_grad():
        ours, theirs = (m(**given, return_dict=False) for m in (fused(model), model))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "gelu_new", "quick_gelu"])
def test_other_configurations(frequency: int, activation: str) -> None:
    model = BLIP2.build(cross_attention_frequency=frequency, hidden_act=activation, layer_norm_eps=1e-3).double()
    for which in PASSES:
        ours = run(BLIP2, which, fused(model), 0, torch.float64)
        assert_same(ours, run(BLIP2, which, model, 0, torch.float64))


def test_a_qformer_without_text_networks() -> None:
    model = BLIP2.build(use_qformer_text_input=False).double()
    twin = fused(model)
    assert_same(run(BLIP2, "queries", twin, 0, torch.float64), run(BLIP2, "queries", model, 0, torch.float64))
    with pytest.raises(ValueError, match="use_qformer_text_input=True"):
        run(BLIP2, "text", twin, 0, torch.float64)


@kinds
@passes
def test_dropout_on_hidden_states_draws_what_upstream_draws(kind: Kind, which: str) -> None:
    model = kind.build(hidden_dropout_prob=0.3).double().train()
    twin = fused(model)
    results = []
    for m in (twin, model):
        torch.manual_seed(3)
        results.append(run(kind, which, m, 0, torch.float64))
    assert_same(*results)


def test_dropout_on_probabilities_has_upstreams_mean_and_tells_rows_apart_only_in_training() -> None:
    model = BLIP2.build(attention_probs_dropout_prob=0.3).double()
    twin = fused(model)
    drawn = draw(0, 24)
    given = arguments(BLIP2, "queries", drawn, drawn["tokens"], drawn["image"][:1].expand(24, -1, -1))
    with torch.no_grad():
        rows = twin(**given).last_hidden_state
        assert torch.equal(rows[0], rows[1])
        samples = []
        for m in (twin.train(), model.train()):
            samples.append(torch.cat([m(**given).last_hidden_state for _ in range(15)]))
    ours, theirs = samples
    assert not torch.allclose(ours[0], ours[1])
    spread = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@passes
def test_low_precision_is_within_twice_upstreams_error(which: str, dtype: torch.dtype) -> None:
    def outcome(model: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        return run(BLIP2, which, model, seed, dtype)

    check_precision(lambda seed: calm(BLIP2.build(seed)), mllm_fast.fuse, outcome, dtype, seeds=range(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_of_instructblip(dtype: torch.dtype) -> None:
    def outcome(model: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        return run(KINDS[1], "text", model, seed, dtype)

    check_precision(lambda seed: calm(KINDS[1].build(seed)), mllm_fast.fuse, outcome, dtype, seeds=range(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_absorbed_projections_are_as_precise(dtype: torch.dtype) -> None:
    """Two queries and heads of 6 make absorbing worth while: no keys and values of the image are formed."""
    ours, theirs, exact = [], [], []
    for seed in range(4):
        model = calm(BLIP2.build(seed)).to(dtype)
        drawn, results = draw(seed, queries=2), []
        for m, kind in ((copy.deepcopy(model).double(), torch.float64), (model, dtype), (fused(model), dtype)):
            tokens, image = (drawn[name].to(dtype).to(kind) for name in ("tokens", "image"))
            given = arguments(BLIP2, "queries", drawn, tokens, image)
            given["encoder_attention_mask"][:, 3:5] = 0
            with torch.no_grad(), recording() as record:
                results.append({"output": m(**given).last_hidden_state})
        for results_of, result in zip((exact, theirs, ours), results, strict=True):
            results_of.append(result)
        assert not any(g.k == IMAGE and g.m == 3 * TOKENS for g in record.gemms)
    assert_within_twice(ours, theirs, exact)


@kinds
def test_autocast(kind: Kind) -> None:
    ours, theirs, exact = [], [], []
    for seed in range(4):
        model = calm(kind.build(seed))
        exact.append(run(kind, "text", copy.deepcopy(model), seed, torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            ours.append(run(kind, "text", fused(model), seed, torch.float32))
            theirs.append(run(kind, "text", model, seed, torch.float32))
    assert_within_twice(ours, theirs, exact, eps=torch.finfo(torch.bfloat16).eps)


@kinds
@passes
def test_hidden_states_and_attentions_are_recorded(kind: Kind, which: str) -> None:
    model = kind.build().double()
    twin = fused(model)
    drawn = draw(0)
    given = arguments(kind, which, drawn, drawn["tokens"], drawn["image"])
    for m in (model, twin):
        m.set_attn_implementation("eager")
    for request in ({"output_hidden_states": True}, {"output_attentions": True, "output_hidden_states": True}):
        ours, theirs = (m(**given, **request) for m in (twin, model))
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert len(ours[name]) == len(theirs[name]), name
            for mine, reference in zip(ours[name], theirs[name], strict=True):
                torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)
    assert len(theirs.hidden_states) == LAYERS + 1
    assert len(theirs.attentions) >= LAYERS
    # The hooks stay on the modules, and do not send later calls down upstream's path.
    assert projections(twin, given).gemms == projections(fused(model), given).gemms


def test_recording_survives_unfuse() -> None:
    model = fused(BLIP2.build().double())
    drawn = draw(0)
    given = arguments(BLIP2, "queries", drawn, drawn["tokens"], drawn["image"])
    mllm_fast.unfuse(model)
    assert type(model) is Blip2QFormerModel
    assert len(model(**given, output_hidden_states=True).hidden_states) == LAYERS + 1


@kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind: Kind, reentrant: bool) -> None:
    model = kind.build().double().train()
    twin = fused(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours = run(kind, "text", twin, 0, torch.float64)
    assert_same(ours, run(kind, "text", model, 0, torch.float64))


def test_lora_hooks_and_subclasses_are_called() -> None:
    model = KINDS[1].build().double()
    lora = peft.LoraConfig(r=2, target_modules=["query", "value", "dense"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    twin = fused(adapted)
    for which in ("queries", "text"):
        ours = run(KINDS[1], which, twin, 0, torch.float64)
        assert_same(ours, run(KINDS[1], which, adapted, 0, torch.float64))
    seen: list[str] = []
    twin = fused(model)
    for path in ("encoder.layer.0.crossattention.attention.key", "encoder.layer.1.intermediate.dense"):
        twin.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    assert_same(run(KINDS[1], "text", twin, 0, torch.float64), run(KINDS[1], "text", model, 0, torch.float64))
    assert len(seen) == 2


@pytest.mark.parametrize(
    "path", ["encoder", "encoder.layer.1.attention.output", "encoder.layer.2.output_query.dropout"]
)
def test_a_hooked_container_runs_upstreams_path(path: str) -> None:
    model = BLIP2.build().double()
    twin, seen = fused(model), []
    twin.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    assert_same(run(BLIP2, "text", twin, 0, torch.float64), run(BLIP2, "text", model, 0, torch.float64))
    assert seen


def test_a_hook_on_a_layer_runs_once_and_the_layer_stays_fused() -> None:
    twin, seen = fused(BLIP2.build()), []
    twin.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    drawn = draw(0)
    given = arguments(BLIP2, "queries", drawn, drawn["tokens"].float(), drawn["image"].float())
    record = projections(twin, given)
    assert seen == [1]
    assert sum(g.k == IMAGE for g in record.gemms) == 1


def test_stacked_weights_follow_every_change() -> None:
    model = BLIP2.build().double()
    twin = fused(model)

    def compare() -> None:
        drawn = draw(0)
        given = arguments(BLIP2, "text", drawn, drawn["tokens"], drawn["image"])
        with torch.no_grad():
            torch.testing.assert_close(twin(**given)[0], model(**given)[0], rtol=0, atol=1e-11)

    compare()
    for m in (twin, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        run(BLIP2, "text", m, 0, torch.float64)
        optimizer.step()
    compare()
    state = {name: t * 0.9 for name, t in model.state_dict().items()}
    for m in (twin, model):
        m.load_state_dict(state)
    compare()


def test_names_copies_and_unfuse() -> None:
    model = BLIP2.build().double()
    twin = fused(model)
    assert isinstance(twin, Blip2QFormerModel)
    assert type(twin).__name__ == "Blip2QFormerModel"
    assert list(twin.state_dict()) == list(model.state_dict())
    results = [
        run(BLIP2, "text", m, 0, torch.float64) for m in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), twin)
    ]
    mllm_fast.unfuse(twin)
    results.append(run(BLIP2, "text", twin, 0, torch.float64))
    for result in results:
        assert_same(result, run(BLIP2, "text", model, 0, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@passes
def test_prepacked_weights(which: str, dtype: torch.dtype) -> None:
    ours, theirs, exact = [], [], []
    for seed in range(4):
        model, drawn = calm(BLIP2.build(seed)).to(dtype), draw(seed)
        rounded = {name: drawn[name].to(dtype) for name in ("tokens", "image")}
        wide = {name: t.double() for name, t in rounded.items()}
        with torch.no_grad():
            ours.append({"output": fused(model, prepack=True)(**arguments(BLIP2, which, drawn, **rounded))[0]})
            theirs.append({"output": model(**arguments(BLIP2, which, drawn, **rounded))[0]})
            exact.append({"output": model.double()(**arguments(BLIP2, which, drawn, **wide))[0]})
    assert_within_twice(ours, theirs, exact)


def test_prepacked_weights_leave_training_alone() -> None:
    model = BLIP2.build().double()
    for which in PASSES:
        ours = run(BLIP2, which, fused(model, prepack=True), 0, torch.float64)
        assert_same(ours, run(BLIP2, which, model, 0, torch.float64))


def test_the_query_tokens_dtype_may_differ() -> None:
    """from_pretrained in fp16 keeps some of the parameters in fp32."""
    model = BLIP2.build()
    drawn = draw(0)
    given = arguments(BLIP2, "queries", drawn, drawn["tokens"].float(), drawn["image"].half())
    ours, theirs = fused(model)(**given)[0], model(**given)[0]
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_custom_mask_runs_upstreams_path() -> None:
    model = BLIP2.build().double()
    drawn = draw(0)
    given = arguments(BLIP2, "text", drawn, drawn["tokens"], drawn["image"])
    rows = QUERIES + 6
    given["attention_mask"] = torch.rand(3, 1, rows, rows).gt(0.4) | torch.eye(rows, dtype=torch.bool)
    torch.testing.assert_close(fused(model)(**given)[0], model(**given)[0], rtol=0, atol=1e-12)


def test_what_cannot_be_fused_is_left_alone_with_the_reason() -> None:
    model = BLIP2.build(hidden_act="mish")
    with pytest.raises(mllm_fast.NothingToFuseError, match="Mish"):
        mllm_fast.fuse(model.encoder.layer[0])
    report = mllm_fast.fuse(model)
    assert sum("Mish" in row.reason for row in report.left_alone) == LAYERS
    drawn = draw(0)
    given = arguments(BLIP2, "queries", drawn, drawn["tokens"].float(), drawn["image"].float())
    assert torch.equal(model(**given)[0], BLIP2.build(hidden_act="mish")(**given)[0])


def test_bad_input() -> None:
    model = fused(BLIP2.build())
    drawn = draw(0)
    given = arguments(BLIP2, "text", drawn, drawn["tokens"].float(), drawn["image"].float())
    with pytest.raises(ValueError, match=r"expected \(3, 10\): a value for each of the 4 queries and of the 6 text"):
        model(**given | {"attention_mask": drawn["text_mask"]})
    with pytest.raises(ValueError, match="3 sequences cannot share 2 images"):
        model(**given | {"encoder_hidden_states": drawn["image"][:2].float()})
    with pytest.raises(ValueError, match=r"image_index has shape \(2,\); expected \(3,\)"):
        model(**given, image_index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="pass encoder_hidden_states"):
        model(**given | {"encoder_hidden_states": None, "encoder_attention_mask": None})

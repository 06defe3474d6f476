"""The fused Q-Formers of BLIP-2 and InstructBLIP against upstream's: outputs, gradients, what is computed, and requests."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel

import mllm_fast
from mllm_fast.families._prompts import reading_only_queries
from tests.families.instruments import (
    Recorder,
    Results,
    assert_same,
    assert_within_twice,
    backward_results,
    check_precision,
    recording,
)
from tests.families.qformers import DIM, FFN, IMAGE, KINDS, LAYERS, QUERIES, TOKENS, Kind, draw

CROSS = 3  # layers 0, 2 and 4
PASSES = ["queries", "text", "text only"]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
passes = pytest.mark.parametrize("which", PASSES)
BLIP2 = KINDS[0]


def fused(model: nn.Module, **options: Any) -> nn.Module:
    twin = copy.deepcopy(model)
    mllm_fast.fuse(twin, **options)
    return twin


@torch.no_grad()
def calm(model: nn.Module) -> nn.Module:
    """Smaller matrices: the drawn ones amplify a rounding error at random, which says nothing about who made it."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter *= 0.7
    return model


def arguments(kind: Kind, which: str, drawn: dict[str, Tensor], tokens: Tensor, image: Tensor) -> dict[str, Any]:
    """Of one of the three passes, with query tokens and image as given."""
    rows = drawn["ids"].shape[0]
    queries = tokens.expand(rows, -1, -1)
    seen = {"encoder_hidden_states": image, "encoder_attention_mask": torch.ones(image.shape[:2], dtype=torch.long)}
    if which == "queries":
        return kind.only_queries(queries) | seen
    mask = drawn["text_mask"]
    if which == "text only":
        return kind.text(queries[:, :0], drawn["ids"], None) | {"attention_mask": mask}
    mask = torch.cat((torch.ones(rows, tokens.shape[1], dtype=torch.long), mask), 1)
    return kind.text(queries, drawn["ids"], None) | {"attention_mask": mask} | seen


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


def projections(model: nn.Module, given: dict[str, Any], grad: bool = False) -> Recorder:
    with torch.set_grad_enabled(grad), recording() as record:
        model(**given)
    return record


@kinds
@pytest.mark.parametrize("which", ["queries", "text"])
@pytest.mark.parametrize("grad", [False, True])
def test_image_keys_and_values_are_one_gemm(kind: Kind, which: str, grad: bool) -> None:
    model = kind.build()
    drawn = draw(0)
    given = arguments(kind, which, drawn, drawn["tokens"].float(), drawn["image"].float())
    ours, theirs = (projections(m, given, grad).gemms for m in (fused(model), model))
    assert [(g.m, g.n) for g in ours if g.k == IMAGE] == [(3 * TOKENS, CROSS * 2 * DIM)]
    assert sum(g.k == IMAGE for g in theirs) == 2 * CROSS


def test_one_image_row_is_projected_however_many_sequences_read_it() -> None:
    model = BLIP2.build()
    drawn = draw(0, 6, images=2)
    twin, image = fused(model), drawn["image"].float()
    given = arguments(BLIP2, "text", drawn, drawn["tokens"].float(), image)
    index = torch.tensor([1, 0, 0, 1, 1, 0])
    for more, rows in (({}, [0, 0, 0, 1, 1, 1]), ({"image_index": index}, index)):
        record = projections(twin, given | more)
        assert [g.m for g in record.gemms if g.k == IMAGE] == [2 * TOKENS]
        copied = given | {"encoder_hidden_states": image[rows], "encoder_attention_mask": torch.ones(6, TOKENS)}
        torch.testing.assert_close(twin(**given, **more)[0], model(**copied)[0], rtol=1e-4, atol=1e-4)
    expanded = given | {
        "encoder_hidden_states": image[:1].expand(6, -1, -1),
        "encoder_attention_mask": torch.ones(6, TOKENS),
    }
    assert [g.m for g in projections(twin, expanded).gemms if g.k == IMAGE] == [TOKENS]
    torch.testing.assert_close(twin(**expanded)[0], model(**expanded)[0], rtol=1e-4, atol=1e-4)


def test_shared_images_with_gradients_and_on_upstreams_path() -> None:
    model = BLIP2.build().double()
    drawn, twin = draw(0, 6, images=2), fused(model)
    index = torch.tensor([1, 0, 0, 1, 1, 0])
    results = []
    for m, more in ((twin, {}), (model, {}), (twin, {"output_attentions": True})):
        m.zero_grad()
        leaves = {name: drawn[name].clone().requires_grad_() for name in ("tokens", "image")}
        image = leaves["image"] if m is twin else leaves["image"][index]
        more = more | ({"image_index": index} if m is twin else {})
        m.set_attn_implementation("eager")
        given = arguments(BLIP2, "text", drawn, leaves["tokens"], image)
        results.append(backward_results(m(**given, **more).last_hidden_state, leaves, m))
    assert_same(results[0], results[1])
    assert_same(results[2], results[1])


@kinds
def test_the_first_layer_of_shared_queries_is_computed_for_one_row(kind: Kind) -> None:
    model = kind.build()
    drawn = draw(0)
    given = arguments(kind, "queries", drawn, drawn["tokens"].float(), drawn["image"].float())

    def self_rows(m: nn.Module, **changes: Any) -> list[int]:
        return [g.m // QUERIES for g in projections(m, given | changes).gemms if g.k == DIM and g.n == 3 * DIM]

    assert self_rows(fused(model)) == [1] + (LAYERS - 1) * [3]
    assert self_rows(fused(model, level=0)) == LAYERS * [3]
    assert self_rows(fused(model), query_embeds=given["query_embeds"].contiguous()) == LAYERS * [3]
    # Whether the rows are one is known without reading them; an active dropout tells them apart.
    drops = kind.build(hidden_dropout_prob=0.1)
    assert self_rows(fused(drops).train()) == LAYERS * [3]
    assert self_rows(fused(drops)) == [1] + (LAYERS - 1) * [3]


@kinds
def test_text_rows_that_nobody_reads_are_only_keys_and_values_in_the_last_layer(kind: Kind) -> None:
    model = fused(kind.build().double())
    drawn = draw(0)
    given = arguments(kind, "text", drawn, drawn["tokens"], drawn["image"])
    whole = projections(model, given)
    with reading_only_queries():
        pruned = projections(model, given)
        torch.testing.assert_close(model(**given)[0], model(**given)[0][:, :QUERIES], rtol=0, atol=0)
        everything = model(**given, output_hidden_states=True).hidden_states[-1]
        short = model(**given)[0]
    assert everything.shape[1] == QUERIES + 6
    torch.testing.assert_close(short, model(**given)[0][:, :QUERIES], rtol=0, atol=1e-12)
    text = 3 * 6
    # W_2 of the text's network once fewer; of W_q, W_o and W_1 only the query rows.
    assert whole.work(FFN) - pruned.work(FFN) == text * DIM
    assert whole.work(DIM) - pruned.work(DIM) >= text * (DIM + DIM + FFN)


def test_no_value_is_read_back_from_a_mask() -> None:
    model = fused(BLIP2.build())
    drawn = draw(0)
    given = arguments(BLIP2, "text", drawn, drawn["tokens"].float(), drawn["image"].float())
    names = {name for name, _ in projections(model, given).calls}
    assert not names & {"_local_scalar_dense", "all", "is_nonzero", "item"}, names


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

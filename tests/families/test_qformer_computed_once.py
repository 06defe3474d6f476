"""What the fused Q-Formers compute once that upstream computes again and again, and what they do not compute at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mllm_fast.families._prompts import reading_only_queries
from tests.families.instruments import assert_same, backward_results, fused
from tests.families.qformers import DIM, FFN, IMAGE, KINDS, LAYERS, QUERIES, TOKENS, Kind, arguments, draw, projections

CROSS = 3  # layers 0, 2 and 4
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
BLIP2 = KINDS[0]


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

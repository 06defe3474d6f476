"""splice_rows against transformers' masked_scatter, in the reference form; the drawn cases serve the kernels' tests too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast import ops
from mllm_fast.kernels import runtime
from tests.kernels.op_checks import check_exact, check_low_precision

VOCABULARY, IMAGE_TOKEN = 11, 97  # the image token lies beyond the table, as in MiniGPT-4 and mPLUG-Owl


def masked_scatter(text: Tensor, features: Tensor, places: Tensor, ids: Tensor | None = None) -> Tensor:
    """As upstream does it."""
    if ids is not None:
        text = F.embedding(ids.masked_fill(places, 0), text)
    return text.masked_scatter(places.unsqueeze(-1), features)


def gather(text: Tensor, features: Tensor, index: Tensor, ids: Tensor | None = None) -> Tensor:
    """By definition, a row at a time."""
    rows = []
    for b, i in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
        n = int(index[b, i])
        rows.append(features[n] if n >= 0 else text[b, i] if ids is None else text[ids[b, i]])
    # Gradients of 0 for what nobody reads.
    return torch.stack(rows).view(*index.shape, -1) + 0 * (text.sum() + features.sum())


@st.composite
def splices(draw: st.DrawFn) -> dict[str, Any]:
    """Text or table, features and an index with any rows in any order, some read twice and some never."""
    batch, length, width = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.sampled_from([1, 5, 32, 130]))
    count, table = draw(st.integers(0, 5)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    index = torch.randint(-3, max(count, 1), (batch, length), generator=generator)
    index = index.clamp(max=count - 1).to(draw(st.sampled_from([torch.int32, torch.int64])))
    ids = None
    if table:
        ids = torch.randint(VOCABULARY, (batch, length), generator=generator).masked_fill(index >= 0, IMAGE_TOKEN)
    shape = (VOCABULARY, width) if table else (batch, length, width)
    text = torch.randn(shape, generator=generator, dtype=torch.float64)
    features = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # rows that lie apart, as slices of a wider buffer do
        features = F.pad(features, (0, 3))[:, :width]
    return {"text": text, "features": features, "index": index, "ids": ids}


def as_op(text: Tensor, features: Tensor, index: Tensor, ids: Tensor | None = None) -> Tensor:
    return ops.splice_rows(text, features, index, token_ids=ids)


def ordered(ids: bool) -> tuple[Tensor, Tensor]:
    """(places, ids) of two prompts with images at the start, in the middle and at the end."""
    places = torch.zeros(2, 12, dtype=torch.bool)
    places[0, :3], places[0, 6:8], places[1, 9:] = True, True, True
    tokens = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    return places, tokens.masked_fill(places, IMAGE_TOKEN)


@given(splices())
def test_any_index(case: dict[str, Any]) -> None:
    kept = {"index": case["index"]} | ({} if case["ids"] is None else {"ids": case["ids"]})
    check_exact(as_op, gather, {"text": case["text"], "features": case["features"]} | kept)


@pytest.mark.parametrize("table", [False, True], ids=["embeddings", "table"])
def test_equals_masked_scatter(table: bool) -> None:
    places, tokens = ordered(table)
    given = {
        "text": torch.randn((VOCABULARY, 16) if table else (2, 12, 16), dtype=torch.float64),
        "features": torch.randn(int(places.sum()), 16, dtype=torch.float64),
        "places": places,
    } | ({"ids": tokens} if table else {})

    def ours(text: Tensor, features: Tensor, places: Tensor, ids: Tensor | None = None) -> Tensor:
        return as_op(text, features, ops.image_rows(places), ids)

    check_exact(ours, masked_scatter, given)
    for dtype in (torch.bfloat16, torch.float16):
        low = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
        assert torch.equal(ours(**low), masked_scatter(**low))
        check_low_precision(ours, masked_scatter, lambda: given, dtype, draws=1)


def test_image_rows() -> None:
    places, _ = ordered(False)
    expected = [[0, 1, 2, -1, -1, -1, 3, 4, -1, -1, -1, -1], [-1] * 9 + [5, 6, 7]]
    assert ops.image_rows(places).tolist() == expected


def test_features_that_nobody_reads_may_be_anything() -> None:
    index = torch.tensor([[-1, 1, -1]])
    features = torch.tensor([[torch.nan], [2.0], [torch.nan]])
    assert ops.splice_rows(torch.tensor([[[1.0], [torch.nan], [3.0]]]), features, index).flatten().tolist() == [1, 2, 3]


BAD = {
    "width": ({"features": torch.randn(3, 5)}, "as wide as the text"),
    "dtype": ({"features": torch.randn(3, 4).double()}, "one dtype and device"),
    "rank": ({"features": torch.randn(3)}, "expected \\[rows, 4\\]"),
    "index": ({"index": torch.zeros(2, 6)}, "int32 or int64"),
    "length": ({"index": torch.zeros(2, 5, dtype=torch.long)}, "expected \\[2, 5, D\\]"),
    "table": ({"token_ids": torch.zeros(2, 6, dtype=torch.long)}, "the table"),
    "ids": ({"text": torch.randn(9, 4), "token_ids": torch.zeros(2, 5, dtype=torch.long)}, "token_ids is"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    given = {"text": torch.randn(2, 6, 4), "features": torch.randn(3, 4), "index": torch.zeros(2, 6, dtype=torch.long)}
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ops.splice_rows(**(given | changed))


def test_triton_is_refused_where_it_cannot_run() -> None:
    if runtime.triton_unavailable_reason() is None:
        pytest.skip("Triton can run here")
    with pytest.raises(runtime.BackendUnavailableError):
        runtime.backend("triton").__enter__()
    assert runtime.explain("splice_rows", "cpu")[0] == "torch"


@pytest.mark.parametrize("table", [False, True], ids=["embeddings", "table"])
def test_traced_whole(table: bool) -> None:
    places, tokens = ordered(table)
    text = torch.randn((VOCABULARY, 16) if table else (2, 12, 16), requires_grad=True)
    features = torch.randn(8, 16, requires_grad=True)

    def splice(text: Tensor, features: Tensor) -> Tensor:
        return ops.splice_rows(text, features, ops.image_rows(places), token_ids=tokens if table else None)

    results = []
    for run in (splice, torch.compile(splice, fullgraph=True, backend="aot_eager")):
        out = run(text, features)
        results.append((out, *torch.autograd.grad(out.square().sum(), (text, features))))
    torch.testing.assert_close(results[1], results[0])

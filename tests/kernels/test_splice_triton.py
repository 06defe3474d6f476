"""The Triton kernels of splice_rows against the definition; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from mllm_fast import ops
from mllm_fast.kernels import runtime
from tests.kernels.test_splice import IMAGE_TOKEN, VOCABULARY, gather, ordered, splices
from tests.kernels.triton_device import DEVICE, INTERPRETING, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float16] if INTERPRETING else [torch.float32, torch.float16, torch.bfloat16]


def on_triton(text: Tensor, features: Tensor, index: Tensor, ids: Tensor | None) -> Tensor:
    with runtime.backend("triton"):
        return ops.splice_rows(text, features, index, token_ids=ids)


def results(run: Any, case: dict[str, Any], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Output and gradients, in fp64 on the CPU."""
    text, features = (case[name].detach().to(device, dtype).requires_grad_() for name in ("text", "features"))
    index, ids = (None if case[name] is None else case[name].to(device) for name in ("index", "ids"))
    out = run(text, features, index, ids)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).half().to(out)
    found = torch.autograd.grad(out, (text, features), grad)
    return [x.detach().cpu().double() for x in (out, *found)]


def check(case: dict[str, Any], dtype: torch.dtype) -> None:
    case = {name: x.to(dtype) if name in ("text", "features") else x for name, x in case.items()}
    mine, theirs = results(on_triton, case, dtype, DEVICE), results(gather, case, torch.float64, "cpu")
    assert torch.equal(mine[0], theirs[0])  # a copy has no rounding
    tolerance = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 1e-6
    for ours, reference in zip(mine[1:], theirs[1:], strict=True):
        # Sums in fp32, rounded once.
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=1e-6)


@settings(max_examples=20 if INTERPRETING else 100)
@given(splices())
def test_drawn(case: dict[str, Any]) -> None:
    for dtype in DTYPES:
        check(case, dtype)


@pytest.mark.parametrize("table", [False, True], ids=["embeddings", "table"])
@pytest.mark.parametrize("width", [7, 64, 520, 1100])
def test_widths(width: int, table: bool) -> None:
    places, tokens = ordered(table)
    text = torch.randn((VOCABULARY, width) if table else (2, 12, width))
    case = {"text": text, "features": torch.randn(8, width), "index": ops.image_rows(places)}
    for dtype in DTYPES:
        check(case | {"ids": tokens if table else None}, dtype)


def test_strides() -> None:
    """Rows of wider buffers, and a text whose batch is expanded."""
    text = torch.randn(1, 6, 40)[..., :24].expand(3, -1, -1)
    index = torch.tensor([[-1, 0, 1, -1, -1, -1]] * 2 + [[2, -1, -1, 2, -1, 0]])
    check({"text": text, "features": torch.randn(24, 3).T, "index": index, "ids": None}, torch.float32)


def test_equal_inputs_give_equal_bits() -> None:
    index = torch.randint(-1, 3, (4, 50))
    case = {"text": torch.randn(4, 50, 40), "features": torch.randn(3, 40), "index": index, "ids": None}
    first, second = (results(on_triton, case, torch.float32, DEVICE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_features_that_nobody_reads_may_be_anything() -> None:
    index = torch.tensor([[-1, 1, -1]], device=DEVICE)
    features = torch.tensor([[torch.nan], [2.0], [torch.nan]], device=DEVICE)
    text = torch.tensor([[[1.0], [torch.nan], [3.0]]], device=DEVICE)
    assert on_triton(text, features, index, None).flatten().tolist() == [1, 2, 3]


def test_fp64_falls_back_or_is_refused() -> None:
    text, features = torch.randn(1, 2, 4, device=DEVICE).double(), torch.randn(1, 4, device=DEVICE).double()
    index = torch.tensor([[-1, 0]], device=DEVICE)
    assert torch.equal(ops.splice_rows(text, features, index)[0, 1], features[0])
    with pytest.raises(runtime.BackendUnavailableError, match="float64"):
        on_triton(text, features, index, None)


@pytest.mark.parametrize("table", [False, True], ids=["embeddings", "table"])
def test_registered_op(table: bool) -> None:
    from mllm_fast.kernels.splice.triton_op import splice_backward_op, splice_op

    places, tokens = ordered(table)
    assert int(tokens.max()) == IMAGE_TOKEN
    ids = tokens.to(DEVICE) if table else None
    text = torch.randn((VOCABULARY, 16) if table else (2, 12, 16), device=DEVICE, requires_grad=True)
    features = torch.randn(8, 16, device=DEVICE, requires_grad=True)
    index = ops.image_rows(places).to(DEVICE)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(splice_op, (text, features, index, ids), test_utils=utils)
    grad = torch.randn(2, 12, 16, device=DEVICE)
    counts = (8, VOCABULARY if table else 0, True, True)
    torch.library.opcheck(splice_backward_op, (grad, index, ids, *counts), test_utils=utils[:3])

    def splice(text: Tensor, features: Tensor) -> Tensor:
        return on_triton(text, features, index, ids)

    eager = splice(text, features)
    with runtime.backend("triton"):
        compiled = torch.compile(
            lambda text, features: ops.splice_rows(text, features, index, token_ids=ids),
            fullgraph=True,
            backend="aot_eager",
        )(text, features)
    assert torch.equal(compiled, eager)
    for ours, theirs in zip(
        *(torch.autograd.grad(out.square().sum(), (text, features)) for out in (compiled, eager)), strict=True
    ):
        assert torch.equal(ours, theirs)

"""absorbed_attention against attention over keys and values that were formed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fast.kernels.attention import absorbed_attention
from tests.kernels.op_checks import Inputs, check_exact, check_low_precision


def draw(batch: int = 2, queries: int = 3, keys: int = 11, heads: int = 2, size: int = 5, width: int = 13) -> Inputs:
    inner = heads * size
    return {
        "q": torch.randn(batch, queries, heads, size),
        "x": torch.randn(batch, keys, width),
        "key_weight": 1.5 * torch.randn(inner, width) / width**0.5,
        "value_weight": torch.randn(inner, width) / width**0.5,
        "value_bias": torch.randn(inner),
    }


def formed(
    q: Tensor,
    x: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None = None,
    key_padding: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    k, v = (F.linear(x, w, b).unflatten(-1, q.shape[2:]) for w, b in ((key_weight, None), (value_weight, value_bias)))
    mask = None if key_padding is None else key_padding[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("queries", [1, 4])
def test_equals_attention_over_formed_keys_and_values(batch: int, queries: int) -> None:
    if batch == 0:
        assert absorbed_attention(**draw(0, queries)).shape == (0, queries, 2, 5)
        return
    check_exact(absorbed_attention, formed, draw(batch, queries))
    padding = torch.rand(batch, 11) > 0.4
    padding[:, 0] = True
    check_exact(
        lambda **kw: absorbed_attention(**kw, key_padding=padding, scale=0.3),
        lambda **kw: formed(**kw, key_padding=padding, scale=0.3),
        draw(batch, queries),
    )


def test_shared_queries_and_no_bias() -> None:
    inputs = {name: t.double() for name, t in draw(3).items() if name != "value_bias"}
    inputs["q"] = inputs["q"][:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(absorbed_attention(**inputs), formed(**inputs), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_as_precise_as_attention_over_formed_keys_and_values(dtype: torch.dtype) -> None:
    check_low_precision(absorbed_attention, formed, lambda: draw(2, 8, 40, 2, 16, 48), dtype, draws=6)


def test_is_as_precise_where_a_few_channels_dwarf_the_others() -> None:
    """Features of vision towers have such channels."""

    def outliers() -> Inputs:
        inputs = draw(2, 8, 40, 2, 16, 48)
        inputs["x"][..., :2] = inputs["x"][..., :2] * 3 + 60
        return inputs

    check_low_precision(absorbed_attention, formed, outliers, torch.bfloat16, draws=6)


def test_errors() -> None:
    inputs = draw()
    with pytest.raises(ValueError, match=r"expected x \[2, M, E\] and weights \[10, E\]"):
        absorbed_attention(**inputs | {"x": inputs["x"][:1]})
    with pytest.raises(ValueError, match="key_padding is"):
        absorbed_attention(**inputs, key_padding=torch.ones(2, 3, dtype=torch.bool))

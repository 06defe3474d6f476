"""as_rows: where the kernels find the rows of a tensor."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mllm_fast.kernels.rows import as_rows


def gathered(x: Tensor, inner: int, strides: tuple[int, int], rows: int) -> Tensor:
    """The rows by what `as_rows` says of them."""
    flat = torch.as_strided(x, (int(x.untyped_storage().nbytes() // x.element_size()),), (1,), 0)
    outer_step, inner_step = strides
    starts = [x.storage_offset() + r // inner * outer_step + r % inner * inner_step for r in range(rows)]
    return torch.stack([flat[start : start + x.shape[-1]] for start in starts])


@given(
    leading=st.lists(st.sampled_from([1, 2, 3, 4]), max_size=4),
    layouts=st.lists(
        st.sampled_from(["contiguous", "permuted", "columns", "rows", "expanded", "last"]), min_size=1, max_size=3
    ),
)
def test_every_row_is_found(leading: list[int], layouts: list[str]) -> None:
    tensors: list[Tensor | None] = []
    for layout in layouts:
        x = torch.randn(*leading, 5)
        if layout == "permuted":
            order = list(range(len(leading)))[::-1]
            x = x.permute(*order, -1).contiguous().permute(*order, -1)
        elif layout == "columns":
            x = torch.cat((x, x), dim=-1)[..., 5:]
        elif layout == "rows" and leading:
            x = torch.cat((x, x), dim=-2)[..., : leading[-1], :]
        elif layout == "expanded" and leading:
            x = x[:1].expand_as(x)
        elif layout == "last":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        tensors.append(x)
    found, inner, strides = as_rows(*tensors, None)
    assert found[-1] is None
    assert strides[-1] == (0, 0)
    rows = torch.Size(leading).numel()
    for given_, x, steps in zip(tensors, found, strides, strict=False):
        if given_ is not None and x is not None:
            assert torch.equal(gathered(x, inner, steps, rows), given_.reshape(rows, 5))


def test_what_lies_evenly_is_not_copied() -> None:
    whole = torch.randn(2, 6, 3, 8)
    evenly = {
        "a slice of the sequence": torch.randn(2, 9, 8)[:, 2:6],
        "a batch that is one row": torch.randn(1, 4, 8).expand(3, -1, -1),
        "heads out of a projection": torch.randn(2, 5, 48)[..., 16:32].unflatten(-1, (2, 8)),
        "all of it": whole,
        "its first rows": whole[:, :4],
    }
    for name, x in evenly.items():
        assert as_rows(x)[0][0] is x, name
    # A slice of the heads and of the sequence: three steps.
    assert as_rows(whole[:, :4, :2])[0][0] is not whole

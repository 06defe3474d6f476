"""How many kernels a linear op launches, and how many aten ops it runs beside them: counted without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_fast.kernels.launch import ARCHITECTURES, recording
from mllm_fast.kernels.linear import triton_op
from mllm_fast.kernels.linear.call import Extras, Group
from mllm_fast.kernels.norm import Norm
from tests.kernels.op_checks import CountOps
from tests.kernels.triton_device import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter leaves no launches to record")
pytest.importorskip("triton")

# Ops that start nothing on a device: allocations, views, questions.
_FREE = {
    "detach",
    "empty",
    "new_empty",
    "promote_types",
    "split",
    "split_with_sizes",
    "t",
    "unsqueeze",
    "view",
    "select",
    "unbind",
    "slice",
}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launched(call: Callable[[], Any]) -> Counter[str]:
    """The kernels and the aten ops of a call without gradients, by name."""
    with torch.no_grad(), recording(ARCHITECTURES["sm_90"]) as launches, CountOps() as ops:
        assert call() is not None
    found = Counter(launch.kernel.fn.__name__ for launch in launches)
    return found + Counter({name: n for name, n in ops.counts.items() if name not in _FREE})


def norm(width: int, kind: str = "layer_norm") -> Norm:
    return Norm(kind, empty(width), empty(width) if kind == "layer_norm" else None)  # type: ignore[arg-type]


def group(rows: int, k: int, n: int, residual: bool = False, batch: int = 1) -> Group:
    return Group(empty(batch, rows, k), empty(n, k), empty(n), residual=empty(batch, rows, n) if residual else None)


@pytest.mark.parametrize("rows", [1, 32, 96])
def test_one_launch_for_the_layers_of_a_flamingo_block(rows: int) -> None:
    heads = Norm("rms_norm", empty(64))
    calls: list[Callable[[], Any]] = [
        lambda: triton_op.attempt([group(rows, 2048, 512)], norms=[norm(2048)]),
        lambda: triton_op.attempt([group(rows, 2048, 512)], norms=[norm(2048)], head_norm=heads),
        lambda: triton_op.attempt(
            [group(rows, 512, 2048, residual=True)],
            Extras(gate=empty(1), row_mask=empty(1, rows, dtype=torch.bool)),
            norms=[None],
        ),
        lambda: triton_op.attempt([group(rows, 2048, 8192)], norms=[norm(2048)], activation="gelu"),
        lambda: triton_op.attempt(
            [group(rows, 2048, 5504)], Extras(empty(5504, 2048)), norms=[norm(2048)], activation="swiglu"
        ),
        lambda: triton_op.attempt([group(rows, 8192, 2048, residual=True)], Extras(gate=empty(2048)), norms=[None]),
    ]
    for call in calls:
        assert launched(call) == {"linear_tiles": 1}


@pytest.mark.parametrize("batch", [1, 8])
def test_one_launch_for_the_layers_of_a_qformer(batch: int) -> None:
    n = norm(768)
    slices = empty(batch, 44, 768).split((32, 12), 1)
    given = [Group(rows, empty(3072, 768), empty(3072)) for rows in slices]
    added = [Group(empty(batch, rows.shape[1], 3072), empty(768, 3072), empty(768), residual=rows) for rows in slices]
    calls: list[Callable[[], Any]] = [
        lambda: triton_op.attempt([group(32, 768, 2304, batch=batch)], norms=[n]),
        lambda: triton_op.attempt([group(32, 768, 768, residual=True, batch=batch)], norms=[None], residual_norms=[n]),
        lambda: triton_op.grouped_linear(given, [n, n], [None, None], [None, None], "gelu", 0.0, None),
        lambda: triton_op.grouped_linear(added, [None, None], [n, n], [None, None], None, 0.1, 3),
    ]
    for call in calls:
        assert sum(launched(call).values()) == 1
    x, weight, residual = empty(batch, 32, 768), empty(768, 768), empty(batch, 32, 768)
    post = launched(lambda: triton_op.linear_residual(x, weight, None, residual, None, None, n, 0.0, None, n))
    assert sum(post.values()) == 2


def test_many_rows_take_the_vendors_product_between_two_kernels() -> None:
    call = launched(lambda: triton_op.attempt([group(8192, 4096, 16384)], norms=[norm(4096)], activation="gelu"))
    assert call == {"norm_rows": 1, "addmm": 1, "linear_merge": 1}
    call = launched(lambda: triton_op.attempt([group(8192, 1408, 9216)], norms=[None]))
    assert call == {"addmm": 1}

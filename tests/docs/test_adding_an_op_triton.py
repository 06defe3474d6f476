"""The op that docs/adding_an_op.md builds, in Triton's interpreter: any strides, gradients, and what torch asks of an op."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm_fast
from tests.docs.pages import ROOT, blocks
from tests.kernels.triton_device import INTERPRETING

if not INTERPRETING:
    pytest.skip("test_interpreter.py runs it in Triton's interpreter", allow_module_level=True)

PAGE = ROOT / "docs" / "adding_an_op.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page defines; its audit compiles for GPUs, which the interpreter takes no part in."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(PAGE):
        if block.language == "python" and "inspect_variant" not in block.text:
            exec(compile("\n" * (block.line - 1) + block.text, str(PAGE), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "nothing"])
def test_as_the_definition(page: dict[str, Any], layout: str) -> None:
    made = {"contiguous": (5, 7), "transposed": (7, 5), "expanded": (1, 7), "nothing": (0, 7)}
    x, scale = torch.randn(made[layout]), torch.randn(made[layout][0] if layout == "nothing" else 5)
    x = x.T if layout == "transposed" else x.expand(5, 7) if layout == "expanded" else x
    leaves = x.requires_grad_(), scale.requires_grad_()
    with mllm_fast.backend("triton"):
        ours = page["scale_rows"](*leaves)
    theirs = page["reference"](*leaves)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(5, 1).expand_as(ours) if ours.numel() else torch.zeros_like(ours)
    for mine, other in zip(*(torch.autograd.grad(y, leaves, grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other)


def test_the_registered_op(page: dict[str, Any]) -> None:
    leaves = torch.randn(5, 7, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.library.opcheck(page["scale_rows_op"], leaves)

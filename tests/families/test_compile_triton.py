"""Generation with a static cache, compiled whole over the Triton kernels, in Triton's interpreter.

Elsewhere a traced generation contains the reference's ops, because it runs on a CPU, and the kernels' ops are traced one
by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node

import mllm_fast
from mllm_fast.kernels import runtime
from tests.families.builders import of_inputs, of_model, of_resampler
from tests.families.test_compile import Backend, compiled
from tests.kernels.triton_device import INTERPRETING, poisoned  # noqa: F401

if not INTERPRETING:
    pytest.skip("test_interpreter.py runs it in Triton's interpreter", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_compiler")

TOKENS = 3
# A gated block's decode step; its media's keys and values are the step's inputs.
BLOCK = ["norm_linear", "attention", "linear_residual", "norm_linear gelu", "linear_residual"]


class CountingBackend(Backend):
    """Counts the runs of its graphs, too."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        call = super().__call__(graph, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return call(*args)

        return run


def registered_op(node: Node) -> str | None:
    """Which of the library's ops the node calls; the linear ones are one in a graph, and differ in arguments."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "mllm_fast":
        return None
    name = node.target._opname
    if name != "linear":
        return name
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=True))
    parts = ("norm_linear" if given["norm"] else "", "linear_residual" if given["residual0"] is not None else "")
    return " ".join(filter(None, (*parts, given["activation"])))


def test_generation_with_a_static_cache() -> None:
    """Two gated blocks: one graph of the kernels' ops, and the unfused model's tokens."""
    upstream = of_model()
    upstream.perceiver = of_resampler(depth=1).eval()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    inputs, backend = of_inputs(length=6, images=1), CountingBackend()
    settings = {
        "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        with runtime.backend("torch"):
            theirs = upstream.generate(**inputs, **settings)
        with runtime.backend("triton"):
            ours = fused.generate(**inputs, **settings, **compiled(backend))
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=2e-4, rtol=2e-4)
    assert counters["stats"]["unique_graphs"] == len(backend.graphs) == 1
    assert not counters["graph_break"]
    assert backend.runs == TOKENS - 1, "the prompt is not compiled, and every step after it is"
    assert list(filter(None, map(registered_op, backend.graphs[0].graph.nodes))) == 2 * BLOCK

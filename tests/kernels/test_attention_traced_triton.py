"""Attention's Triton kernels in traced calls, and calls that they cannot serve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.attention import Mask, MediaSubsets, attention, registered
from mllm_fast.kernels.attention.settings import settings_of
from tests.kernels.attention_dense import gradients
from tests.kernels.attention_on_triton import moved, on_triton, qkv, random
from tests.kernels.test_attention_media import phi
from tests.kernels.triton_device import DEVICE, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")


class TestTraced:
    @staticmethod
    def arguments(kind: str) -> tuple[list[Tensor], Mask | None]:
        leaves = moved(random((2, 5, 4, 8), *((1, 12, 2, 8),) * 2, *((1, 3, 2, 8),) * 2), torch.float32)
        if kind == "media":
            return leaves[:3], Mask(media=phi(torch.eye(5, device=DEVICE)[2:4].bool(), 3, 4, "mean"))
        if kind == "subsets":
            return leaves, Mask(media=MediaSubsets.from_mask(torch.ones(2, 5, 3, device=DEVICE) > 0, 4))
        return leaves, Mask(key_lengths=torch.tensor([7, 12], device=DEVICE), causal=True)

    @pytest.mark.parametrize("kind", ["media", "subsets", "lengths"])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_one_graph_forward_and_backward(self, kind: str, dropout_p: float) -> None:
        leaves, mask = self.arguments(kind)

        def call(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
            more = dict(zip(("extra_k", "extra_v"), extra, strict=False))
            return attention(q * 2, k, v, **more, mask=mask, dropout_p=dropout_p, seed=5) + 1

        torch._dynamo.reset()
        with runtime.backend("triton"):
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves)
            out = call(*leaves)
        grad = torch.randn_like(out)
        assert torch.equal(out, compiled)
        assert all(map(torch.equal, gradients(out, leaves, grad), gradients(compiled, leaves, grad)))

    def test_a_seed_is_drawn_anew_in_each_call(self) -> None:
        leaves, _ = self.arguments("lengths")
        torch._dynamo.reset()
        compiled = torch.compile(lambda q, k, v: attention(q, k, v, dropout_p=0.5), backend="aot_eager", fullgraph=True)
        with runtime.backend("triton"):
            assert not torch.equal(compiled(*leaves[:3]), compiled(*leaves[:3]))

    @pytest.mark.parametrize("kind", ["media", "subsets", "lengths"])
    def test_opcheck(self, kind: str) -> None:
        leaves, mask = self.arguments(kind)
        s = settings_of(mask, None, 0.3, 0.2, 0, leaves[0].device)
        inputs = [*leaves, None, None][:5]
        numbers = (s.causal, s.prefix, s.images, s.tokens, s.beyond_mean, s.scale, s.dropout_p, True, True)
        torch.library.opcheck(registered.attention_op, (*inputs, *s.tensors, torch.tensor(7), *numbers))


class TestChoice:
    def test_fp64_and_wide_heads_go_to_the_reference(self) -> None:
        for x in (torch.randn(1, 2, 1, 8).double(), torch.randn(1, 2, 1, 136), torch.randn(1, 2, 1, 264).half()):
            x = x.to(DEVICE)
            with runtime.backend("triton"), pytest.raises(runtime.BackendUnavailableError, match="the Triton kernels"):
                attention(x, x, x)
            assert attention(x, x, x).shape == x.shape

    def test_empty(self) -> None:
        for batch, queries, keys in ((2, 0, 3), (2, 3, 0), (0, 3, 3)):
            leaves = moved(qkv(batch, queries, keys), torch.float32)
            out = on_triton(leaves)
            assert (out == 0).all()
            assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), leaves))

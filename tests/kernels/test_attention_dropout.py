"""Dropout of attention: its pattern, and output and gradients under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_fast.kernels.attention import Mask, attention, dense
from tests.kernels.attention_dense import gradients


class TestDropout:
    def call(self, p: float, seed: int | None, **more: Any) -> Tensor:
        return attention(self.q, self.k, self.v, dropout_p=p, seed=seed, **more)

    @pytest.fixture(autouse=True)
    def _inputs(self) -> None:
        self.q = torch.randn(2, 6, 2, 8, dtype=torch.double, requires_grad=True)
        self.k, self.v = (torch.randn(2, 5, 2, 8, dtype=torch.double, requires_grad=True) for _ in "kv")

    def kept(self, p: float, seed: int, queries: int, keys: int, mask: Mask | None = None) -> Tensor:
        """What each probability was multiplied with, read off with one-hot values: [2, 2, queries, keys]."""
        q = torch.zeros(2, queries, 2, keys, dtype=torch.double)
        v = torch.eye(keys, dtype=torch.double)[None, :, None].expand(2, -1, 2, -1)
        out = attention(q, torch.zeros_like(v), v, dropout_p=p, seed=seed, mask=mask)
        seen = attention(q, torch.zeros_like(v), v, mask=mask)
        return torch.where(seen > 0, out / seen, torch.nan).transpose(1, 2)

    def test_pattern_is_a_function_of_the_seed(self) -> None:
        assert torch.equal(self.call(0.5, 3), self.call(0.5, 3))
        assert not torch.equal(self.call(0.5, 3), self.call(0.5, 4))
        assert torch.equal(self.call(0.0, 3), self.call(0.0, None))

    def test_no_seed_draws_from_the_default_generator(self) -> None:
        torch.manual_seed(5)
        first, second = self.call(0.5, None), self.call(0.5, None)
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        assert torch.equal(self.call(0.5, None), first)

    def test_a_seed_leaves_the_default_generator_alone(self) -> None:
        state = torch.get_rng_state()
        self.call(0.5, 7).sum().backward()
        assert torch.equal(torch.get_rng_state(), state)

    def test_rate_and_mean(self) -> None:
        factors = self.kept(0.3, 1, 200, 100)
        assert set(factors.round(decimals=6).unique().tolist()) == {0.0, round(1 / 0.7, 6)}
        assert abs((factors == 0).double().mean() - 0.3) < 0.01
        assert abs(factors.mean() - 1) < 0.02

    def test_everything_dropped(self) -> None:
        out = self.call(1.0, 1)
        assert (out == 0).all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (self.q, self.k, self.v)))

    @pytest.mark.parametrize("scores", [1 << 20, 24])
    @pytest.mark.parametrize("mask", [None, Mask(causal=True), Mask(key_lengths=torch.tensor([4, 0]))])
    def test_output_and_gradients_match_the_same_pattern(self, scores: int, mask: Mask | None) -> None:
        # With few scores at a time, forward and backward both draw the pattern in several steps.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dense, "SCORES", scores)
            factors = self.kept(0.4, 9, 6, 5, mask)
            q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
            weights = (q @ k.mT * 8**-0.5).masked_fill(factors.isnan(), -1e300).softmax(-1)
            expected = (weights * factors.nan_to_num(0.0) @ v).transpose(1, 2)
            out = self.call(0.4, 9, mask=mask)
            torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-11)
            grad, leaves = torch.randn_like(out), [self.q, self.k, self.v]
            for mine, theirs in zip(gradients(out, leaves, grad), gradients(expected, leaves, grad), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-11)

    @pytest.mark.parametrize("p", [-0.1, 1.5])
    def test_not_a_probability(self, p: float) -> None:
        with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\]"):
            self.call(p, 1)

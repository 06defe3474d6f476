"""HF idefics in training: dropout and gradient checkpointing through fused layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.builders import MEDIA_DIM, TEXT_DIM, idefics, idefics_inputs
from tests.families.instruments import Results, assert_same, backward_results

P = 0.4
DRAWS = 1500


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def branch_layer(branch: str, attention: str) -> nn.Module:
    """A gated layer with dropout of which one branch alone is open: its output is linear in what dropout does last."""
    layer = idefics(dropout=P, attention=attention).model.gated_cross_attn_layers[0].train()
    closed = layer.alpha_dense if branch == "attention" else layer.alpha_cross_attn
    closed.data.zero_()
    return layer


def inputs(draws: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Text [draws, 3, 64], media and masks: the same row `draws` times, the first token of which sees nothing."""
    generator = torch.Generator().manual_seed(1)
    h, media = torch.randn(1, 3, TEXT_DIM, generator=generator), torch.randn(1, 16, MEDIA_DIM, generator=generator)
    mask = torch.zeros(1, 1, 3, 16)
    mask[:, :, 0] = torch.finfo(torch.float32).min
    mask[:, :, 1, 8:] = torch.finfo(torch.float32).min
    masks = {
        "image_attention_mask": mask.expand(draws, -1, -1, -1),
        "cross_attention_gate": torch.tensor([[0.0, 1, 1]]).expand(draws, -1),
    }
    return h.expand(draws, -1, -1), media.expand(draws, -1, -1), masks


def sample(layer: nn.Module) -> Tensor:
    """What the layer adds to its input [DRAWS, 3, 64]."""
    h, media, masks = inputs(DRAWS)
    with torch.no_grad():
        return layer(h, None, media, **masks) - h


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("branch", ["attention", "feed_forward"])
def test_dropout_has_upstream_s_moments(branch: str, attention: str) -> None:
    """Unbiased, with the variance of upstream's two dropouts (attention weights, branch output) and as many zeros."""
    fused, upstream = twins(branch_layer(branch, attention))
    ours, theirs = sample(fused), sample(upstream)
    h, media, masks = inputs()
    with torch.no_grad():
        expected = (upstream.eval()(h, None, media, **masks) - h)[0]
    spread = theirs.std(0)
    z = (ours.mean(0) - expected) * DRAWS**0.5 / spread.clamp_min(1e-6)
    assert z.abs().max() < 5.5, f"biased: {z.abs().max():.1f} standard errors"
    alive = spread > 1e-6
    assert torch.equal(alive, ours.std(0) > 1e-6)
    ratio = (ours.var(0)[alive] / theirs.var(0)[alive]).log()
    assert abs(ratio.mean()) < 0.05, f"variance is {ratio.mean().exp():.3f} of upstream's"
    zeros = [(t[:, 1:].abs() < 1e-6).float().mean().item() for t in (ours, theirs)]
    assert abs(zeros[0] - P) < 0.01 and abs(zeros[1] - P) < 0.01, zeros
    if branch == "attention":
        assert ours[:, 0].abs().max() == 0, "the token that sees nothing must stay as it is"


def test_dropout_draws_anew_each_call_and_obeys_the_seed() -> None:
    fused, _ = twins(branch_layer("attention", "sdpa"))
    torch.manual_seed(3)
    first, second = sample(fused), sample(fused)
    torch.manual_seed(3)
    again = sample(fused)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1]), "rows of a batch share a pattern"


def test_dropout_gradients_are_those_of_the_same_pattern() -> None:
    """With its pattern fixed by the seed the layer is smooth: its gradient agrees with a finite difference."""
    layer = idefics(dropout=P).model.gated_cross_attn_layers[0].train().double()
    fused, _ = twins(layer)
    h, media, masks = inputs(2)
    masks = {k: m.double().clamp_min(torch.finfo(torch.float64).min) for k, m in masks.items()}

    def loss(h: Tensor, media: Tensor) -> Tensor:
        torch.manual_seed(5)
        return fused(h, None, media, **masks).square().mean()

    leaves = [t.double().clone().requires_grad_() for t in (h, media)]
    grads = torch.autograd.grad(loss(*leaves), leaves)
    for i in range(2):
        direction = torch.randn_like(leaves[i])
        moved = [[t + (sign * 2e-3 * direction if i == j else 0) for j, t in enumerate(leaves)] for sign in (1, -1)]
        with torch.no_grad():
            slope = (loss(*moved[0]) - loss(*moved[1])) / 4e-3
        torch.testing.assert_close(slope, (grads[i] * direction).sum(), rtol=1e-2, atol=1e-4)


def test_no_dropout_in_eval() -> None:
    fused, upstream = twins(idefics(dropout=P).double())
    kw = idefics_inputs()
    kw["pixel_values"] = kw["pixel_values"].double()
    with torch.no_grad():
        torch.testing.assert_close(fused(**kw).logits, upstream(**kw).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fused(**kw).logits, fused(**kw).logits, atol=0, rtol=0)


def model_results(model: nn.Module, seed: int | None = None) -> Results:
    kw = idefics_inputs()
    kw["pixel_values"] = kw["pixel_values"].double()
    model.zero_grad()
    if seed is not None:
        torch.manual_seed(seed)
    return backward_results(model(**kw).logits, {}, model)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("order", ["fuse_first", "enable_first"])
def test_gradient_checkpointing(order: str, reentrant: bool) -> None:
    """Each layer runs twice, forward and to recompute: a swapped layer must not be checkpointed twice."""
    upstream = idefics().double().train()
    fused = copy.deepcopy(upstream)
    for step in ("fuse", "enable") if order == "fuse_first" else ("enable", "fuse"):
        if step == "fuse":
            mllm_fast.fuse(fused)
        else:
            fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    upstream.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: dict[str, int] = {"fused": 0, "upstream": 0}
    for name, model in (("fused", fused), ("upstream", upstream)):
        layers = model.model.gated_cross_attn_layers
        assert all(layer.gradient_checkpointing for layer in layers)
        for layer in layers:
            layer.cross_attn.o_proj.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    assert_same(model_results(fused), model_results(upstream), 1e-5)  # norm statistics are fp32
    assert calls["fused"] == calls["upstream"] == 4


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing_recomputes_the_same_dropout(reentrant: bool) -> None:
    fused, _ = twins(idefics(dropout=P).double().train())
    plain = model_results(fused, seed=11)
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(model_results(fused, seed=11), plain)


def test_training_steps() -> None:
    modules = twins(idefics().double().train())
    optimisers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in modules]
    for _ in range(4):
        losses = []
        for module, optimiser in zip(modules, optimisers, strict=True):
            kw = idefics_inputs()
            kw["pixel_values"] = kw["pixel_values"].double()
            optimiser.zero_grad()
            loss = module(**kw).logits.square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)

"""Norms that post-norm layers leave to their readers: whatever wraps or watches a layer, the output is upstream's.

In Triton's interpreter; the launches that it saves are counted in test_launch_budgets_triton.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, BlipTextConfig, BlipTextModel

import mllm_fast
from mllm_fast.kernels import runtime
from mllm_fast.modules.rows import Rows
from tests.families.builders import randomise
from tests.kernels.triton_device import INTERPRETING

if not INTERPRETING:
    pytest.skip("test_interpreter.py runs it in Triton's interpreter", allow_module_level=True)

SIZES = {"hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 30}
WRAPPED = {
    "qformer": ["crossattention.attention.query", "attention.output.dense", "intermediate_query.dense"],
    "text": ["crossattention.self.query", "attention.output.dense", "output.dense"],
}


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with runtime.backend("triton"):
        yield


def build(kind: str, dropout: float = 0.0) -> nn.Module:
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if kind == "qformer":
        config = Blip2QFormerConfig(
            encoder_hidden_size=16, cross_attention_frequency=1, use_qformer_text_input=True, **SIZES, **drops
        )
        return randomise(Blip2QFormerModel._from_config(config)).eval()
    config = BlipTextConfig(encoder_hidden_size=16, bos_token_id=1, sep_token_id=2, pad_token_id=0, **SIZES, **drops)
    return randomise(BlipTextModel(config)).eval()


def call(model: nn.Module, kind: str, text: int = 3, **kwargs: Any) -> Any:
    """Queries (Q-Former only) and `text` words that read two images; the second row is padded."""
    generator = torch.Generator().manual_seed(3)
    kwargs = {"encoder_hidden_states": torch.randn(2, 5, 16, generator=generator)} | kwargs
    if kind == "text":
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        return model(input_ids=torch.tensor([[4, 5, 6], [7, 8, 9]]), attention_mask=mask, **kwargs)
    x = torch.randn(2, 4 + text, 16, generator=generator)
    mask = torch.ones(2, 4 + text, dtype=torch.long)
    if text:
        mask[1, -1] = 0
    return model(query_embeds=x, query_length=4, attention_mask=mask, **kwargs)


def twins(
    kind: str, prepare: Callable[[nn.Module], Any] = lambda _: None, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights, both prepared."""
    upstream = build(kind)
    fused = copy.deepcopy(upstream)
    for model in (upstream, fused):
        torch.manual_seed(5)
        prepare(model)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def visible(out: Tensor) -> Tensor:
    """Without the padded row, which upstream computes to no use."""
    return torch.cat((out[0], out[1, :-1]))


def check_same(fused: nn.Module, upstream: nn.Module, kind: str, **kwargs: Any) -> None:
    with torch.no_grad():
        ours = call(fused, kind, **kwargs).last_hidden_state
        with runtime.backend("torch"):
            theirs = call(upstream, kind, **kwargs).last_hidden_state
    assert type(ours) is Tensor
    torch.testing.assert_close(visible(ours), visible(theirs), rtol=1e-4, atol=2e-5)


def handed_on(model: nn.Module) -> list[bool]:
    """Fills up with whether each layer hands on rows that are pending, while the model runs."""
    pending: list[bool] = []
    for layer in model.encoder.layer:
        forward = type(layer).forward

        def watched(self: nn.Module, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            out = forward(self, *args, **kwargs)
            parts = out if isinstance(out, tuple) else (out,)
            pending.append(any(isinstance(part, Rows) and part.norm is not None for part in parts))
            return out

        layer.__class__ = type(type(layer).__name__, (type(layer),), {"forward": watched})
    return pending


@pytest.mark.parametrize(("kind", "text"), [("qformer", 3), ("qformer", 0), ("text", 3)])
def test_pending_between_layers_but_not_after_the_last(kind: str, text: int) -> None:
    fused, upstream = twins(kind)
    pending = handed_on(fused)
    check_same(fused, upstream, kind, text=text)
    assert pending == [True, False]


@pytest.mark.parametrize("kind", ["qformer", "text"])
def test_level_0_computes_every_norm_where_upstream_does(kind: str) -> None:
    fused, upstream = twins(kind, level=0)
    pending = handed_on(fused)
    check_same(fused, upstream, kind)
    assert pending == [False, False]


@pytest.mark.parametrize("kind", ["qformer", "text"])
def test_lora_is_called_with_finished_rows(kind: str) -> None:
    def wrap(model: nn.Module) -> None:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=WRAPPED[kind], init_lora_weights=False), model)

    fused, upstream = twins(kind, wrap)
    check_same(fused, upstream, kind)


@pytest.mark.parametrize("kind", ["qformer", "text"])
def test_a_hook_on_a_layer_sees_finished_rows(kind: str) -> None:
    fused, upstream = twins(kind)
    seen: list[list[Tensor]] = [[], []]
    for i, model in enumerate((fused, upstream)):
        for layer in model.encoder.layer:
            layer.register_forward_hook(lambda _, args, out, i=i: seen[i].extend((args[0], out)))
    check_same(fused, upstream, kind)
    assert len(seen[0]) == len(seen[1]) == 4
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(visible(ours), visible(theirs), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["qformer", "text"])
def test_recorded_hidden_states_are_finished(kind: str) -> None:
    fused, upstream = twins(kind)
    pending = handed_on(fused)
    with torch.no_grad():
        ours = call(fused, kind, output_hidden_states=True).hidden_states
        with runtime.backend("torch"):
            theirs = call(upstream, kind, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(visible(mine), visible(reference), rtol=1e-4, atol=2e-5)
    check_same(fused, upstream, kind)
    assert pending == [False, False, True, False]  # the hooks that recorded are still there


@pytest.mark.parametrize("kind", ["qformer", "text"])
@pytest.mark.parametrize("trained", ["all", "image", "last layer"])
def test_gradients(trained: str, kind: str) -> None:
    """Of all weights; through frozen ones to the image; of a layer to which frozen ones leave rows pending."""

    def freeze(model: nn.Module) -> None:
        model.requires_grad_(trained == "all")
        if trained == "last layer":
            model.encoder.layer[-1].requires_grad_(True)

    fused, upstream = twins(kind, freeze)
    found = []
    for model, backend in ((fused, "triton"), (upstream, "torch")):
        image = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4)).requires_grad_(trained == "image")
        leaves = [image] if trained == "image" else [p for p in model.parameters() if p.requires_grad]
        with runtime.backend(backend):
            out = visible(call(model, kind, encoder_hidden_states=image).last_hidden_state)
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
            found.append(torch.autograd.grad(out, leaves, cotangent, allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1.0, theirs.abs().max().item()))


def test_dropout_in_training_is_drawn_by_the_kernels() -> None:
    model = build("qformer", dropout=0.5)
    mllm_fast.fuse(model)
    model.train()
    torch.manual_seed(1)
    first = call(model, "qformer").last_hidden_state
    torch.manual_seed(1)
    again, other = (call(model, "qformer").last_hidden_state for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["qformer", "text"])
def test_one_graph(kind: str) -> None:
    fused, _ = twins(kind)
    torch._dynamo.reset()
    with torch.no_grad():
        eager = call(fused, kind).last_hidden_state
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(call(compiled, kind).last_hidden_state, eager)

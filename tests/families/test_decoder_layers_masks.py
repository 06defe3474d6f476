"""Attention of decoder layers in padded batches: one mask for all layers, and grouped keys and values kept as they are."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fast.families import decoder_layers
from mllm_fast.finetune.memory import decoder_layer_bytes
from mllm_fast.modules import decoder_attention
from mllm_fast.modules.decoder_attention import ALIGNED, added_mask, grouped_attention, masked_attention
from tests.families.frozen_decoders import SIZES, adapted, close, fused, inputs, layers_of, results
from tests.families.quantized_layers import error
from tests.finetune.saved import saving


def visible(rows: int = 2, tokens: int = 7) -> Tensor:
    """Causal; the last tokens of the second row are padding, and so is the first token, which sees nothing."""
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool).tril()
    mask[1, ..., -2:] = False
    mask[1, ..., :1] = False
    return mask


def drawn(heads: int, groups: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, groups, groups)
    return [torch.randn(2, n, 7, 16, dtype=dtype, generator=generator).requires_grad_() for n in sizes]


def upstream(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _kept(targets: tuple[str, ...], name: str, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Bytes that each of two layers keeps in a padded batch, and those of the formula without a mask."""
    model = fused(adapted(name, "nf4", dtype, targets=targets))
    x = inputs(dtype)["inputs_embeds"].requires_grad_()
    modules = {str(i): layer for i, layer in enumerate(layers_of(model))}
    with saving(model, modules) as saved:
        model.model(**inputs(dtype) | {"inputs_embeds": x}, use_cache=False)
    h, f, heads = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_attention_heads"]
    kv = h if name == "Llama" else h // 2
    bare = decoder_layer_bytes(14, h, h, kv, f, heads, 0, dtype.itemsize)
    return saved.bytes, bare + 14 * 4 * len(targets) * 4  # the adapters are in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj")], ids=str)
def test_what_is_kept_in_a_padded_batch(targets: tuple[str, ...], name: str, dtype: torch.dtype) -> None:
    kept, bare = _kept(targets, name, dtype)
    assert kept["0"] == bare + 14 * 8 * dtype.itemsize
    assert kept["1"] == bare


def test_what_is_kept_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the attention's result either."""
    monkeypatch.setattr(decoder_layers, "masked_attention", _as_on_a_gpu)
    kept, bare = _kept((), "Mistral", torch.float32)
    attention = 14 * 4 * (SIZES["hidden_size"] + SIZES["num_attention_heads"])
    assert kept["0"] == bare - attention + 14 * 8 * 4
    assert kept["1"] == bare - attention


def _as_on_a_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return grouped_attention(q, k, v, added_mask(mask, q.dtype), scale)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_on_a_gpu(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("Mistral")
    expected = results(model, inputs())
    monkeypatch.setattr(decoder_layers, "masked_attention", _as_on_a_gpu)
    ours = fused(model)
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    close(results(ours, inputs()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("attend", [masked_attention, _as_on_a_gpu])
def test_attention(attend: Any, groups: int, dtype: torch.dtype) -> None:
    given, mask, scale = drawn(4, groups, dtype), visible(), 0.3
    found = []
    for f, dt in ((attend, dtype), (upstream, dtype), (upstream, torch.float64)):
        leaves = [t.detach().to(dt).requires_grad_() for t in given]
        y = f(*leaves, mask, scale)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dt)
        first = torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True)
        again = torch.autograd.grad((y * weights).sum(), leaves)
        assert all(map(torch.equal, first, again))
        found.append((y.detach(), *first))
    for mine, theirs, exact in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.isfinite(mine).all()
        assert error(mine, exact.double()) <= 2 * error(theirs, exact.double()) + {torch.bfloat16: 1e-4}.get(
            dtype, 1e-6
        )
    # A token that sees nothing gets nothing.
    assert not found[0][0][1, :, 0].any()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some(wanted: tuple[int, ...]) -> None:
    given = drawn(4, 2)
    for i, t in enumerate(given):
        t.requires_grad_(i in wanted)
    leaves = [given[i] for i in wanted]
    mine, theirs = (torch.autograd.grad(f(*given, visible(), 0.3).sum(), leaves) for f in (_as_on_a_gpu, upstream))
    for a, b in zip(mine, theirs, strict=True):
        assert error(a, b.double()) < 1e-5


def test_a_mask_is_made_once() -> None:
    gc.collect()
    before, mask = len(decoder_attention._added), visible()
    added = added_mask(mask, torch.bfloat16)
    assert added_mask(mask, torch.bfloat16) is added
    assert added_mask(mask, torch.float32) is not added
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, mask)
    assert torch.equal(added == float("-inf"), ~mask)
    assert all(step % ALIGNED == 0 for step in added.stride()[:-1])
    assert added_mask(added, torch.float32) is added
    mask[0, ..., 0] = False  # another mask from here on
    assert torch.equal(added_mask(mask, torch.bfloat16) == 0, mask)
    assert len(decoder_attention._added) == before + 1
    del mask
    gc.collect()
    assert len(decoder_attention._added) == before


def test_a_mask_of_inference_mode() -> None:
    with torch.inference_mode():
        mask = visible()
        assert not added_mask(mask, torch.float32).is_inference()
    y = masked_attention(*drawn(4, 2), mask, 0.3)
    y.sum().backward()

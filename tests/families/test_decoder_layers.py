"""Frozen decoder layers that are trained through: values, gradients and kept bytes against transformers and PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.frozen_decoders import KINDS, SEVEN, SIZES, adapted, close, fused, inputs, results
from tests.families.quantized_layers import error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_values_and_gradients(name: str, kind: str, calls: list[Any]) -> None:
    upstream = adapted(name, kind)
    ours = fused(upstream)
    expected = results(upstream, inputs())
    assert len(expected) == 2 + 2 * 2 * len(SEVEN)
    close(results(ours, inputs()), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("down_proj",)], ids=str)
def test_some_adapters(targets: tuple[str, ...], calls: list[Any]) -> None:
    upstream = adapted(targets=targets)
    given = inputs(padded=False)
    close(results(fused(upstream), given), results(upstream, given))
    assert len(calls) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, calls: list[Any]) -> None:
    """bf16 around fp32 adapters: at most twice the error of transformers and PEFT, for the output and every gradient."""
    upstream = adapted("Mistral", kind, torch.bfloat16)
    exact = results(adapted("Mistral", kind, torch.float32), inputs())
    given = inputs(torch.bfloat16)
    theirs, mine = results(upstream, given), results(fused(upstream), given)
    assert calls
    assert mine.keys() == theirs.keys() == exact.keys()
    for name, true in exact.items():
        assert mine[name].dtype == theirs[name].dtype
        assert error(mine[name], true.double()) <= 2 * error(theirs[name], true.double()) + 1e-6, name


def test_autocast(calls: list[Any]) -> None:
    """An fp32 stream between layers that compute in bf16, as behind a bridge that is trained in fp32."""
    upstream = adapted("Llama", "nf4", compute=torch.bfloat16)
    exact = results(adapted("Llama", "nf4"), inputs())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = results(upstream, inputs()), results(fused(upstream), inputs())
    assert len(calls) == 2
    for name, true in exact.items():
        assert mine[name].dtype == theirs[name].dtype
        assert error(mine[name], true.double()) <= 2 * error(theirs[name], true.double()) + 1e-6, name


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_kept_for_backward(trained: bool) -> None:
    """Per token 6 h and 2 f numbers, the ranks of the adapters, the logsumexps and nothing that grows otherwise."""
    model = fused(adapted(targets=("q_proj", "v_proj") if trained else ()))
    h, f, heads, layers, tokens = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_attention_heads"], 2, 14
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    base: Any = model.model
    given = inputs(padded=False) | {"inputs_embeds": inputs()["inputs_embeds"].requires_grad_()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = base.layers[1](base.layers[0](given["inputs_embeds"], **_positions(base, given)), **_positions(base, given))
    rank = 2 * 4 if trained else 0
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == 4 * tokens * layers * (
        6 * h + 2 * f + heads + rank
    )
    assert y.requires_grad


def _positions(base: Any, given: dict[str, Tensor]) -> dict[str, Any]:
    # Held by a name, so that they are nobody's but the caller's.
    if not hasattr(base, "known_positions"):
        ids = torch.arange(given["inputs_embeds"].shape[1])[None]
        base.known_positions = base.rotary_emb(given["inputs_embeds"], ids)
        for number, t in enumerate(base.known_positions):
            base.register_buffer(f"position_{number}", t)
    return {"position_embeddings": base.known_positions}

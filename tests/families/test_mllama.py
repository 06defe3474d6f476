"""HF Mllama: gated cross-attention with grouped queries, q/k norms and a cache, against upstream."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration

import mllm_fast
from tests.families.builders import randomise
from tests.families.instruments import Results, assert_same, backward_results
from tests.families.upstream_versions import MLLAMA_STATIC_CACHE

PATCHES = 5  # vision tokens of a tile


def model(seed: int = 0, attention: str = "sdpa", **text: Any) -> MllamaForConditionalGeneration:
    config = MllamaConfig(
        image_token_index=128,
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 3, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 64,
            "image_size": 28, "patch_size": 14, "max_num_tiles": 4, "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
        },
        text_config={
            "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 96, "cross_attention_layers": [1, 3], "max_position_embeddings": 256, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **text,
        },
        attn_implementation=attention,
    )  # fmt: skip
    net = randomise(MllamaForConditionalGeneration(config), seed).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.6)
    return net


def inputs(dtype: torch.dtype = torch.float64, *, rows_without_image: bool = True) -> dict[str, Tensor]:
    """Two prompts over two images of four tiles, with padding tiles and, at first, tokens that see no image."""
    ids = torch.randint(3, 128, (2, 9))
    ids[:, 1] = 128
    mask = torch.zeros(2, 9, 2, 4, dtype=torch.long)
    start = 1 if rows_without_image else 0
    mask[0, start:, 0, :1] = 1
    mask[0, 5:, 1, :2] = 1
    mask[1, start:, 0, :4] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 2, 4, 3, 28, 28, dtype=dtype),
        "aspect_ratio_ids": torch.tensor([[1, 2], [4, 0]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 1], [1, 0, 0, 0]]]),
        "cross_attention_mask": mask,
    }


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def results(net: nn.Module, given: dict[str, Any]) -> Results:
    net.zero_grad()
    out = net(**given)
    return backward_results(out.logits.square().mean(), {}, net) | {"logits": out.logits.detach()}


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("rows_without_image", [False, True])
def test_model(level: int, rows_without_image: bool) -> None:
    fused, upstream = twins(model().double(), level=level)
    given = inputs(rows_without_image=rows_without_image)
    # Upstream's RMS norms compute in fp32 whatever the model is in.
    assert_same(results(fused, given), results(upstream, given), tolerance=1e-6)


def layers(net: nn.Module) -> list[nn.Module]:
    return [layer for layer in net.model.language_model.layers if hasattr(layer, "cross_attn")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype: torch.dtype) -> None:
    exact_model = model()
    given = inputs()
    with torch.no_grad():
        exact = exact_model.double()(**given).logits
        low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        errors = [(net(**low).logits.double() - exact).square().mean().sqrt() for net in twins(exact_model.to(dtype))]
    assert errors[0] <= 2 * errors[1]


def test_the_fix_leaves_rows_without_an_image_alone() -> None:
    net = model().double()
    given = inputs()
    seen: dict[str, Tensor] = {}
    fixed, quirky = twins(net, fixes="rows_without_image")[0], twins(net)[0]
    for name, candidate in (("fixed", fixed), ("quirky", quirky)):
        first = layers(candidate)[0]

        def keep(module: nn.Module, args: Any, kwargs: Any, out: Tensor, name: str = name) -> None:
            seen[name] = (out - (args[0] if args else kwargs["hidden_states"])).detach()

        first.register_forward_hook(keep, with_kwargs=True)
    mllm_fast.unfuse(fixed)
    mllm_fast.fuse(fixed, fixes="rows_without_image")
    with torch.no_grad():
        for candidate in (fixed, quirky):
            candidate(**given)
    assert bool((seen["fixed"][:, 0] == 0).all())
    assert bool((seen["quirky"][:, 0] != 0).any())
    torch.testing.assert_close(seen["fixed"][:, 1:], seen["quirky"][:, 1:])


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, pytest.param({"cache_implementation": "static"}, marks=MLLAMA_STATIC_CACHE)], ids=str
)
def test_generate(how: dict[str, Any]) -> None:
    fused, upstream = twins(model(3))
    given = inputs(torch.float32)
    options = {"max_new_tokens": 6, "do_sample": False, **how}
    assert torch.equal(fused.generate(**given, **options), upstream.generate(**given, **options))


def test_the_image_is_projected_once() -> None:
    fused, _ = twins(model())
    counts: list[int] = []
    with torch.no_grad():
        project = type(layers(fused)[0])._keys_values

        def count(self: nn.Module, states: Tensor | None, *rest: Any) -> Any:
            counts.append(int(states is not None))
            return project(self, states, *rest)

        type(layers(fused)[0])._keys_values = count
        try:
            fused.generate(**inputs(torch.float32), max_new_tokens=5, do_sample=False, eos_token_id=None)
        finally:
            type(layers(fused)[0])._keys_values = project
    assert sum(counts) == 2
    assert len(counts) == 10


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_mask_upstreams_code_runs(attention: str) -> None:
    fused, upstream = twins(model(attention=attention).double())
    given = {k: v for k, v in inputs().items() if k != "cross_attention_mask"}
    with torch.no_grad():
        torch.testing.assert_close(fused(**given).logits, upstream(**given).logits)


def test_text_alone_and_training_dropout() -> None:
    fused, upstream = twins(model().double())
    ids = {"input_ids": torch.randint(3, 128, (2, 6))}
    with torch.no_grad():
        torch.testing.assert_close(fused(**ids).logits, upstream(**ids).logits)
    fused, _ = twins(model(dropout=0.5).double().train())
    given = inputs()
    assert not torch.equal(fused(**given).logits, fused(**given).logits)


def test_fuse_and_back() -> None:
    fused, upstream = twins(model())
    assert [type(layer).__qualname__ for layer in layers(fused)] == ["FusedMllamaCrossAttentionDecoderLayer"] * 2
    mllm_fast.unfuse(fused)
    assert [type(a) for a in fused.modules()] == [type(b) for b in upstream.modules()]

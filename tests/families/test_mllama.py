"""HF Mllama: gated cross-attention with grouped queries, q/k norms and a cache, against upstream."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, MllamaConfig, MllamaForConditionalGeneration

import mllm_fast
from tests.families.builders import randomise
from tests.families.instruments import Results, assert_same, backward_results, recording
from tests.families.upstream_versions import MLLAMA_STATIC_CACHE, MLLAMA_STEPS

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


def few_tiles(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Images of one tile and of two; the third and fourth are padding in every sample, and every token sees an image."""
    given = inputs(dtype, rows_without_image=False)
    mask = torch.zeros_like(given["cross_attention_mask"])
    mask[0, :, 0, :1] = 1
    mask[0, 5:, 1, :2] = 1
    mask[1, :, 0, :2] = 1
    shapes = {
        "aspect_ratio_ids": [[1, 2], [2, 0]],
        "aspect_ratio_mask": [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 0, 0, 0]]],
    }
    return given | {name: torch.tensor(value) for name, value in shapes.items()} | {"cross_attention_mask": mask}


FILLED = 4  # of eight tiles a sample: two of each image


def cross_caches(cache: Any) -> list[Any]:
    return [cache.layers[i] for i in (1, 3)]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_padding_tiles_are_left_out_with_the_fix(how: dict[str, Any]) -> None:
    """Where every token sees an image, upstream's result does not depend on them either."""
    upstream = model(3)
    fixed, quirky = twins(upstream, fixes="rows_without_image")[0], twins(upstream)[0]
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None, **how}
    outs = []
    for net, filled in ((fixed, FILLED), (quirky, 8), (upstream, 8)):
        torch.manual_seed(0)
        with recording() as seen:
            outs.append(net.generate(**few_tiles(), **settings))
        for layer in cross_caches(outs[-1].past_key_values):
            assert layer.keys.shape[2] == layer.values.shape[2] == filled * PATCHES
        rows = 2 * how.get("num_beams", how.get("num_return_sequences", 1))
        assert (
            sum(gemm.m == rows * filled * PATCHES and gemm.n == 32 for gemm in seen.gemms) >= 4
        )  # two layers' keys and values
    assert outs[0].sequences.tolist() == outs[1].sequences.tolist() == outs[2].sequences.tolist()


@pytest.mark.parametrize("cache", [pytest.param("static", marks=MLLAMA_STATIC_CACHE), "given"])
def test_other_caches_with_the_fix(cache: str) -> None:
    upstream = model(3)
    fixed = twins(upstream, fixes="rows_without_image")[0]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    given = few_tiles()
    expected = upstream.generate(**given, **settings)
    if cache == "static":
        settings["cache_implementation"] = cache
    else:
        settings["past_key_values"] = DynamicCache(config=fixed.config)
    assert torch.equal(fixed.generate(**given, **settings), expected)


def test_tokens_without_an_image_and_dropped_tiles() -> None:
    """The fix with dropped tiles is the fix without dropping them."""
    given = few_tiles(torch.float64)
    given["cross_attention_mask"][:, :2] = 0
    fixed = twins(model().double(), fixes="rows_without_image")[0]
    every = fixed(**given).logits.detach()  # with gradients all are projected
    with torch.no_grad():
        torch.testing.assert_close(fixed(**given).logits, every)
        # Whatever lies in them, and however little the image's own mask says of what a token sees.
        changed = given["pixel_values"].clone()
        assert not torch.equal(fixed(**given | {"pixel_values": changed + 1}).logits, every)
        given["aspect_ratio_mask"][0, 1] = torch.tensor([1, 0, 0, 0])
        kept = fixed(**given, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cross_caches(kept)] == [FILLED * PATCHES] * 2


def test_training_with_the_fix_recomputes_what_it_computed() -> None:
    given, found = few_tiles(torch.float64), []
    for checkpointed in (False, True):
        net = twins(model().double().train(), fixes="rows_without_image")[0]
        if checkpointed:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(results(net, given | {"use_cache": False}))
    assert_same(*found)


@MLLAMA_STEPS
@pytest.mark.parametrize("fallback", [False, True])
def test_steps_and_more_images_after_dropped_tiles(fallback: bool) -> None:
    """Tokens one by one, then a turn with another image, from the cache; upstream's code reads that cache too."""
    upstream = model(5, "eager").double()
    fixed = twins(upstream, fixes="rows_without_image")[0]
    first, second = few_tiles(torch.float64), few_tiles(torch.float64)
    # A token sees a tile that the image's own mask does not name.
    second["cross_attention_mask"][1, :, 0, 2] = 1
    second["cross_attention_mask"] = torch.cat(
        (first["cross_attention_mask"][:, -1:].expand(-1, 9, -1, -1), second["cross_attention_mask"]), dim=2
    )
    logits, tiles = [], []
    asked = {"output_attentions": True} if fallback else {}
    for net in (fixed, upstream):
        with torch.no_grad():
            out = net(**first, use_cache=True)
            found, cache = [out.logits], copy.deepcopy(out.past_key_values)
            for token in (7, 9):
                seen = first["cross_attention_mask"][:, -1:]
                ids = torch.full((2, 1), token)
                out = net(input_ids=ids, cross_attention_mask=seen, past_key_values=cache, use_cache=True, **asked)
                found.append(out.logits)
                cache = out.past_key_values
            turn = {name: value for name, value in second.items() if name != "attention_mask"}
            out = net(**turn, past_key_values=cache, use_cache=True, **asked)
            found.append(out.logits)
            tiles.append({layer.keys.shape[2] // PATCHES for layer in cross_caches(out.past_key_values)})
            turn = {"input_ids": torch.full((2, 1), 4), "cross_attention_mask": second["cross_attention_mask"][:, -1:]}
            found.append(net(**turn, past_key_values=out.past_key_values, use_cache=True).logits)
        logits.append(found)
    # Upstream's code keeps all of the second turn's.
    assert tiles == [{FILLED + (8 if fallback else FILLED + 1)}, {16}]
    for ours, theirs in zip(*logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


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

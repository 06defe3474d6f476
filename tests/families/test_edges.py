"""Corners where two features meet: parts fused or not, hooks and beams, function transforms, masks that broadcast."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import LlamaForCausalLM

import mllm_fast
from tests.families.blocks import KINDS, BlockKind
from tests.families.builders import (
    MEDIA_DIM,
    TEXT_DIM,
    idefics,
    idefics_inputs,
    left_padded,
    of_blocks,
    of_inputs,
    of_model,
)
from tests.families.instruments import recording
from tests.families.upstream_versions import BEFORE_5_20, beams

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
systems = pytest.mark.parametrize("system", ["open_flamingo", "idefics"])


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def build(system: str) -> nn.Module:
    return of_model() if system == "open_flamingo" else idefics()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return of_blocks(model) if hasattr(model, "lang_encoder") else list(model.model.gated_cross_attn_layers)


def generated(model: nn.Module, beams: int = 3) -> list[list[int]]:
    inputs = left_padded(of_inputs()) if hasattr(model, "lang_encoder") else idefics_inputs()
    return model.generate(**inputs, max_new_tokens=4, num_beams=beams, pad_token_id=0, do_sample=False).tolist()


def logits(model: nn.Module) -> Tensor:
    inputs = of_inputs() if hasattr(model, "lang_encoder") else idefics_inputs()
    with torch.no_grad():
        return model(**inputs).logits


# models of which only a part is fused

PARTS: dict[str, dict[str, Callable[[nn.Module], nn.Module]]] = {
    "open_flamingo": {
        "resampler": lambda m: m.perceiver,
        "language_model": lambda m: m.lang_encoder,
        "one_block": lambda m: of_blocks(m)[0],
    },
    "idefics": {
        "resampler": lambda m: m.model.perceiver_resampler,
        "inner_model": lambda m: m.model,
        "one_block": lambda m: m.model.gated_cross_attn_layers[1],
    },
}


@pytest.mark.parametrize(("system", "part"), [(s, p) for s, parts in PARTS.items() for p in parts])
def test_fusing_only_a_part(system: str, part: str) -> None:
    upstream = build(system)
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(PARTS[system][part](fused))
    torch.testing.assert_close(logits(fused), logits(upstream), atol=1e-4, rtol=1e-4)
    for number in beams(system):
        assert generated(fused, number) == generated(upstream, number)
    mllm_fast.fuse(fused)  # the rest
    assert generated(fused, beams(system)[-1]) == generated(upstream, beams(system)[-1])


@pytest.mark.parametrize(("system", "part"), [(s, p) for s, parts in PARTS.items() for p in parts])
def test_unfusing_only_a_part(system: str, part: str) -> None:
    fused, upstream = twins(build(system))
    mllm_fast.unfuse(PARTS[system][part](fused))
    torch.testing.assert_close(logits(fused), logits(upstream), atol=1e-4, rtol=1e-4)
    for number in beams(system):
        assert generated(fused, number) == generated(upstream, number)


@systems
def test_a_block_whose_forward_somebody_replaced(system: str) -> None:
    """Such a block is left alone and says so; the model around it must still give it what upstream would."""
    upstream = build(system)
    fused = copy.deepcopy(upstream)
    for model in (upstream, fused):
        block = blocks_of(model)[0]
        block.forward = functools.partial(type(block).forward, block)
    report = mllm_fast.fuse(fused)
    assert any("forward" in row.reason for row in report.left_alone)
    torch.testing.assert_close(logits(fused), logits(upstream), atol=1e-4, rtol=1e-4)
    for number in beams(system):
        assert generated(fused, number) == generated(upstream, number)


@systems
@pytest.mark.parametrize("where", ["attention", "feed_forward", "key_value", "block"])
def test_hooks_and_beams(system: str, where: str) -> None:
    """Under beams a fused model holds one copy of each image: whatever path a hook leads to has to cope with it."""
    path = {
        "open_flamingo": {"attention": "attn", "feed_forward": "ff", "key_value": "attn.to_kv", "block": ""},
        "idefics": {"attention": "cross_attn", "feed_forward": "mlp", "key_value": "cross_attn.v_proj", "block": ""},
    }[system][where]
    fused, upstream = twins(build(system))
    for model in (fused, upstream):
        for block in blocks_of(model):
            block.get_submodule(path).register_forward_hook(
                lambda _, __, out: (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5
            )
    for number in beams(system):
        assert generated(fused, number) == generated(upstream, number)


@systems
@pytest.mark.parametrize("level", [0, 2])
def test_generate_at_other_levels(system: str, level: int) -> None:
    fused, upstream = twins(build(system), level=level)
    torch.testing.assert_close(logits(fused), logits(upstream), atol=1e-4, rtol=1e-4)
    for number in beams(system):
        assert generated(fused, number) == generated(upstream, number)


# function transforms: refusing is no harm, a wrong derivative would be


@kinds
def test_function_transforms_are_right_or_refused(kind: BlockKind) -> None:
    """Tensors inside `torch.func.grad` are wrappers that do not say requires_grad as leaves do."""
    fused, upstream = twins(kind.build())
    x, media, where = kind.inputs()

    def gradient(block: nn.Module) -> Tensor:
        with torch.no_grad():
            kind.call(block, x, media, where)  # something to be stale
        return torch.func.grad(lambda m: kind.call(block, x, m, where).square().mean())(media)

    try:
        ours = gradient(fused)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(ours, gradient(upstream), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name != "idefics"], ids=str)
def test_forward_mode_derivatives_are_right_or_refused(kind: BlockKind) -> None:
    """A dual tensor shares its storage with its primal: keys and values without a tangent must not serve it."""
    fused, upstream = twins(kind.build())
    x, media, where = kind.inputs()
    tangent = torch.randn(media.shape, generator=torch.Generator().manual_seed(1))

    def derivative(block: nn.Module) -> Tensor | None:
        with torch.no_grad(), forward_ad.dual_level():
            kind.call(block, x, media, where)
            return forward_ad.unpack_dual(kind.call(block, x, forward_ad.make_dual(media, tangent), where)).tangent

    try:
        ours = derivative(fused)
    except (RuntimeError, NotImplementedError):
        return
    assert ours is not None, "the tangent was lost"
    torch.testing.assert_close(ours, derivative(upstream), atol=2e-5, rtol=2e-4)


# autocast over mixed types


@kinds
def test_autocast_over_half_precision_media(kind: BlockKind) -> None:
    fused, upstream = twins(kind.build())
    x, media, where = kind.inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            ours, theirs = (kind.call(b, x, media.bfloat16(), where) for b in (fused, upstream))
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.05)


# idefics: masks that broadcast, boolean masks, positional arguments, memory


def _layer() -> nn.Module:
    return idefics().model.gated_cross_attn_layers[0]


@pytest.mark.parametrize("shape", [(1, 1, 6, 24), (2, 1, 1, 24), (1, 1, 1, 24), (2, 4, 6, 24)], ids=str)
def test_layer_broadcasts_masks(shape: tuple[int, ...]) -> None:
    """Upstream adds the mask to scores [B, heads, S, keys]: any shape that broadcasts will do."""
    fused, upstream = twins(_layer())
    h, media = torch.randn(2, 6, TEXT_DIM), torch.randn(2, 24, MEDIA_DIM)
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.4
    hidden[..., 0] = False
    mask = torch.zeros(shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    gate = torch.ones(2, 6)
    ours, theirs = (m(h, None, media, image_attention_mask=mask, cross_attention_gate=gate) for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_layer_takes_a_boolean_mask_under_sdpa() -> None:
    fused, upstream = twins(_layer())
    h, media, gate = torch.randn(2, 6, TEXT_DIM), torch.randn(2, 24, MEDIA_DIM), torch.ones(2, 6)
    mask = torch.rand(2, 1, 6, 24, generator=torch.Generator().manual_seed(4)) < 0.5
    ours, theirs = (m(h, None, media, image_attention_mask=mask, cross_attention_gate=gate) for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_model_called_with_positional_arguments() -> None:
    fused, upstream = twins(idefics().model)
    kw = idefics_inputs()
    ids, mask = kw.pop("input_ids"), kw.pop("attention_mask")
    ours, theirs = (m(ids, mask, **kw).last_hidden_state for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int8], ids=str)
def test_image_attention_mask_of_any_type(dtype: torch.dtype) -> None:
    fused, upstream = twins(idefics())
    kw = idefics_inputs("scattered")
    kw["image_attention_mask"] = kw["image_attention_mask"].to(dtype)
    torch.testing.assert_close(fused(**kw).logits, upstream(**kw).logits, atol=1e-4, rtol=1e-4)


def test_model_without_an_attention_mask_and_with_embeddings() -> None:
    fused, upstream = twins(idefics())
    kw = idefics_inputs()
    del kw["attention_mask"]
    torch.testing.assert_close(fused(**kw).logits, upstream(**kw).logits, atol=1e-4, rtol=1e-4)
    kw["inputs_embeds"] = torch.randn(2, 10, TEXT_DIM)
    del kw["input_ids"]
    torch.testing.assert_close(fused(**kw).logits, upstream(**kw).logits, atol=1e-4, rtol=1e-4)


def test_idefics_model_builds_no_dense_mask() -> None:
    """More than upstream's layer alone can do: the whole model never spreads its mask over the image tokens."""
    fused, _ = twins(idefics())
    length, images, tokens = 120, 50, 8
    kw = idefics_inputs("incremental", batch=1, length=length, images=1)
    visible = torch.arange(length)[:, None] * images // length == torch.arange(images)
    kw["image_attention_mask"] = visible[None].long()
    del kw["pixel_values"]
    with torch.no_grad(), recording() as record:
        fused(**kw, perceiver_embeddings=torch.randn(1, images, tokens, MEDIA_DIM))
    limit = 4 * length * length  # the scores of the language model's own attention, which is none of our business
    assert record.largest()[1] <= max(limit, length * 98) and limit > length * images * tokens
    dense = [a for a in record.allocations if a[1] == length * images * tokens]
    assert not dense, dense


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_without_the_patch_that_upstream_needs(kwargs: dict[str, int]) -> None:
    """transformers 5 drops an all-ones mask, on which the mixin as released fails; the fused one does not."""
    upstream = of_model()
    fused = copy.deepcopy(upstream)
    fused.lang_encoder.__class__ = type("Released", (FlamingoLMMixin, LlamaForCausalLM), {"__module__": __name__})
    if not BEFORE_5_20:  # older versions of transformers 5 did not drop it
        with pytest.raises(TypeError, match="attention_mask"):
            fused.generate(**of_inputs(), max_new_tokens=4, **kwargs)
    mllm_fast.fuse(fused)
    expected = upstream.generate(**of_inputs(), max_new_tokens=4, **kwargs)
    assert torch.equal(fused.generate(**of_inputs(), max_new_tokens=4, **kwargs), expected)

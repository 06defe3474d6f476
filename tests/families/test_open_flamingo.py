"""open_flamingo 2.0.1: the fused gated block, resampler and whole model against the unfused ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import mllm_fast
from tests.families.builders import (
    MEDIA_DIM,
    TEXT_DIM,
    left_padded,
    location_cases,
    of_block,
    of_blocks,
    of_inputs,
    of_model,
    of_resampler,
)
from tests.families.instruments import (
    Results,
    assert_same,
    assert_within_twice,
    backward_results,
    check_precision,
    run_module,
)

CASES = {name: (locations, images) for name, locations, images in location_cases()}
TOKENS = 4  # an image's tokens after the resampler


def block_inputs(images: int, *, batch: int = 2, media_batch: int | None = None, length: int = 11) -> dict[str, Tensor]:
    media_batch = batch if media_batch is None else media_batch
    return {
        "x": torch.randn(batch, length, TEXT_DIM, dtype=torch.float64),
        "media": torch.randn(media_batch, images, TOKENS, MEDIA_DIM, dtype=torch.float64),
    }


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def check_block(upstream: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> None:
    fused, upstream = twins(upstream)
    assert_same(
        run_module(fused, inputs, torch.float64, **kwargs), run_module(upstream, inputs, torch.float64, **kwargs)
    )


# the gated block


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
@pytest.mark.parametrize("case", CASES)
def test_block(case: str, immediate: bool) -> None:
    locations, images = CASES[case]
    check_block(of_block(immediate), block_inputs(images), media_locations=locations)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_block_at_every_level(level: int, training: bool) -> None:
    locations, images = CASES["more_tokens_than_images"]
    fused, upstream = twins(of_block().train(training), level=level)
    inputs = block_inputs(images)
    ours = run_module(fused, inputs, torch.float64, media_locations=locations)
    assert_same(ours, run_module(upstream, inputs, torch.float64, media_locations=locations))


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
@pytest.mark.parametrize("counts", [(0, 1), (2, 2), (3, 1)], ids=["a_row_without", "all", "beyond"])
@pytest.mark.parametrize("length", [1, 5])
def test_block_with_cached_media(length: int, counts: tuple[int, int], immediate: bool) -> None:
    """Decode: every new token follows the last image, and the locations are those of the prompt."""
    locations = torch.zeros(2, 7, dtype=torch.bool)
    for row, count in enumerate(counts):
        locations[row, :count] = True
    inputs = block_inputs(2, length=length)
    check_block(of_block(immediate), inputs, media_locations=locations, use_cached_media=True)


def test_block_with_cached_media_and_no_locations_sees_every_image() -> None:
    check_block(of_block(), block_inputs(3, length=2), use_cached_media=True)


@pytest.mark.parametrize("batches", [(3, 1, 3), (3, 3, 1), (3, 1, 1), (1, 3, 3), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
def test_block_broadcasts_a_batch_of_one(batches: tuple[int, int, int], immediate: bool) -> None:
    """Upstream's einsum broadcasts a batch of one text, media or locations over the others."""
    text, media, rows = batches
    locations = torch.zeros(rows, 11, dtype=torch.bool)
    locations[0, [1, 6]] = True
    locations[-1, 3] = True
    check_block(of_block(immediate), block_inputs(2, batch=text, media_batch=media), media_locations=locations)


@pytest.mark.parametrize("jump", [1, 2])
def test_block_takes_integer_locations(jump: int) -> None:
    """Locations are summed, so a 2 skips an image."""
    locations = torch.zeros(2, 11, dtype=torch.long)
    locations[0, 2], locations[0, 5], locations[1, 0] = 1, 1, jump
    check_block(of_block(), block_inputs(3), media_locations=locations)


def test_block_takes_strided_inputs() -> None:
    locations, images = CASES["images_from_the_start"]
    fused, upstream = twins(of_block().double())
    x = torch.randn(11, 2, TEXT_DIM, dtype=torch.float64).transpose(0, 1)
    media = torch.randn(1, TOKENS, images, MEDIA_DIM, dtype=torch.float64).transpose(1, 2).expand(2, -1, -1, -1)
    assert_same(
        {"output": fused(x, media, media_locations=locations).detach()},
        {"output": upstream(x, media, media_locations=locations).detach()},
    )


@pytest.mark.parametrize("trained", ["weights", "media", "text", "to_kv", "gates"])
def test_block_gradients_when_only_some_are_asked_for(trained: str) -> None:
    locations, images = CASES["fewer_tokens_than_images"]
    inputs = block_inputs(images)

    def run(block: nn.Module) -> Results:
        for name, p in block.double().named_parameters():
            p.requires_grad_(trained == "weights" or (trained == "gates" and "gate" in name) or trained in name)
        leaves = {
            "x": inputs["x"].clone().requires_grad_(trained == "text"),
            "media": inputs["media"].clone().requires_grad_(trained == "media"),
        }
        return backward_results(block(*leaves.values(), media_locations=locations), leaves, block)

    fused, upstream = twins(of_block())
    assert_same(run(fused), run(upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
def test_block_precision(dtype: torch.dtype, immediate: bool) -> None:
    locations, images = CASES["more_tokens_than_images"]

    def run(block: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        torch.manual_seed(seed)
        inputs = {name: t.bfloat16().half() for name, t in block_inputs(images).items()}
        return run_module(block, inputs, dtype, media_locations=locations)

    check_precision(lambda seed: of_block(immediate, seed=seed), mllm_fast.fuse, run, dtype)


def test_block_under_autocast() -> None:
    locations, images = CASES["fewer_tokens_than_images"]
    ours, theirs, exact = [], [], []
    for seed in range(6):
        torch.manual_seed(seed)
        inputs = block_inputs(images)
        fused, upstream = twins(of_block(seed=seed))
        exact.append(run_module(copy.deepcopy(upstream), inputs, torch.float32, media_locations=locations))
        with torch.autocast("cpu", torch.bfloat16):
            ours.append(run_module(fused, inputs, torch.float32, media_locations=locations))
            theirs.append(run_module(upstream, inputs, torch.float32, media_locations=locations))
    assert_within_twice(ours, theirs, exact, eps=torch.finfo(torch.bfloat16).eps)


# the resampler


@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (2, 3, 1, 7), (2, 2, 3, 4), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("embeddings", [(None, None), (3, None), (None, 3), (4, 5)], ids=str)
def test_resampler(shape: tuple[int, ...], embeddings: tuple[int | None, int | None]) -> None:
    frames, media = embeddings
    inputs = {"x": torch.randn(*shape, MEDIA_DIM)}
    fused, upstream = twins(of_resampler(max_num_frames=frames, max_num_media=media))
    assert_same(run_module(fused, inputs, torch.float64), run_module(upstream, inputs, torch.float64))


def test_resampler_broadcasts_single_embeddings() -> None:
    """Upstream slices `frame_embs[:F]` and adds, so a table of one entry serves any number of frames or media."""
    inputs = {"x": torch.randn(2, 3, 1, 4, MEDIA_DIM)}
    fused, upstream = twins(of_resampler(max_num_frames=1, max_num_media=1))
    assert_same(run_module(fused, inputs, torch.float64), run_module(upstream, inputs, torch.float64))


@pytest.mark.parametrize(
    "sizes", [{"depth": 1}, {"num_latents": 1}, {"dim_head": 24, "heads": 3}, {"ff_mult": 2}], ids=str
)
def test_resampler_sizes(sizes: dict[str, int]) -> None:
    inputs = {"x": torch.randn(2, 2, 1, 7, MEDIA_DIM)}
    fused, upstream = twins(of_resampler(**sizes))
    assert_same(run_module(fused, inputs, torch.float64), run_module(upstream, inputs, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resampler_precision(dtype: torch.dtype) -> None:
    def run(resampler: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        x = torch.randn(2, 2, 1, 9, MEDIA_DIM, generator=torch.Generator().manual_seed(seed)).bfloat16().half()
        return run_module(resampler, {"x": x}, dtype)

    check_precision(lambda seed: of_resampler(seed=seed), mllm_fast.fuse, run, dtype)


def test_resampler_under_autocast() -> None:
    ours, theirs, exact = [], [], []
    for seed in range(6):
        inputs = {"x": torch.randn(2, 2, 1, 9, MEDIA_DIM)}
        fused, upstream = twins(of_resampler(seed=seed))
        exact.append(run_module(copy.deepcopy(upstream), inputs, torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            ours.append(run_module(fused, inputs, torch.float32))
            theirs.append(run_module(upstream, inputs, torch.float32))
    assert_within_twice(ours, theirs, exact, eps=torch.finfo(torch.bfloat16).eps)


# the whole model


def model_results(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Results:
    """Logits, and the gradient of every parameter but the vision tower's, which upstream runs under no_grad."""
    model.to(dtype).zero_grad()
    logits = model(inputs["vision_x"].to(dtype), inputs["lang_x"], inputs["attention_mask"]).logits
    return backward_results(logits, {}, model)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox", "mpt"])
def test_model(kind: str) -> None:
    fused, upstream = twins(of_model(kind))
    inputs = of_inputs(images=3)
    assert_same(model_results(fused, inputs), model_results(upstream, inputs))


@pytest.mark.parametrize("every", [1, 3])
def test_model_with_blocks_elsewhere(every: int) -> None:
    fused, upstream = twins(of_model(every=every))
    assert_same(model_results(fused, left_padded(of_inputs())), model_results(upstream, left_padded(of_inputs())))


def test_model_bf16() -> None:
    def run(model: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        inputs = of_inputs(seed=seed)
        with torch.no_grad():
            return {
                "logits": model(
                    inputs["vision_x"].bfloat16().to(dtype), inputs["lang_x"], inputs["attention_mask"]
                ).logits
            }

    check_precision(lambda seed: of_model(seed=seed), mllm_fast.fuse, run, torch.bfloat16)


def test_model_loss() -> None:
    fused, upstream = twins(of_model())
    inputs = of_inputs()
    losses = [m(**inputs, labels=inputs["lang_x"]).loss for m in (fused, upstream)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 3, "length_penalty": 2.0}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_generate(kind: str, options: dict[str, Any], padded: bool) -> None:
    """Row 0 of the prompt names two images, row 1 one: the batch has different image counts."""
    fused, upstream = twins(of_model(kind))
    inputs = left_padded(of_inputs()) if padded else of_inputs()
    options = options | {"max_new_tokens": 6, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = (m.generate(**inputs, **options) for m in (fused, upstream))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)


def test_generate_of_one_row_returning_several_sequences() -> None:
    """Upstream broadcasts the one row's media over its samples."""
    fused, upstream = twins(of_model())
    inputs = of_inputs(batch=1)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    assert fused.generate(**inputs, **options).tolist() == upstream.generate(**inputs, **options).tolist()


def test_generate_under_inference_mode() -> None:
    """Inference tensors have no version counter."""
    fused, upstream = twins(of_model())
    with torch.inference_mode():
        for seed in range(2):
            inputs = of_inputs(seed=seed)
            ours, theirs = (m.generate(**inputs, max_new_tokens=5, pad_token_id=0) for m in (fused, upstream))
            assert ours.tolist() == theirs.tolist()
    inputs = of_inputs()
    assert_same(model_results(fused, inputs), model_results(upstream, inputs))


def test_scoring_with_cached_media() -> None:
    """`cache_media` then several forwards without images, as in likelihood evaluation."""
    fused, upstream = twins(of_model())
    inputs = of_inputs()
    results = []
    for model in (fused, upstream):
        with torch.no_grad():
            model.cache_media(inputs["lang_x"], inputs["vision_x"])
            seen = []
            for seed in range(3):
                ids = torch.randint(3, 89, (2, 4), generator=torch.Generator().manual_seed(seed))
                seen.append(model(None, ids, torch.ones_like(ids), clear_conditioned_layers=False).logits)
            model.uncache_media()
            seen.append(model(**of_inputs(seed=5)).logits)
        results.append(torch.cat(seen, 1))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT], ids=str)
@pytest.mark.parametrize("order", ["fuse_then_wrap", "wrap_then_fuse"])
def test_gradient_checkpointing(order: str, implementation: CheckpointImpl) -> None:
    """As open_flamingo's train.py does it, by the attribute `_use_gradient_checkpointing`. Each block runs twice."""

    def wrap(model: nn.Module) -> None:
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, checkpoint_impl=implementation),
            check_fn=lambda m: (
                getattr(m, "_use_gradient_checkpointing", False) and not isinstance(m, CheckpointWrapper)
            ),
        )

    upstream = of_model(checkpointing=True).train()
    upstream.requires_grad_(True)
    fused = copy.deepcopy(upstream)
    for step in (mllm_fast.fuse, wrap) if order == "fuse_then_wrap" else (wrap, mllm_fast.fuse):
        step(fused)
    wrap(upstream)
    wrapped = [sum(isinstance(m, CheckpointWrapper) for m in model.modules()) for model in (fused, upstream)]
    assert wrapped[0] == wrapped[1] > 0
    calls = []
    blocks = [layer.gated_cross_attn_layer for layer in fused.lang_encoder._get_decoder_layers()]
    for block in filter(None, blocks):
        block._checkpoint_wrapped_module.attn.to_out.register_forward_hook(lambda *_: calls.append(1))
    inputs = of_inputs()
    assert_same(model_results(fused, inputs), model_results(upstream, inputs))
    assert len(calls) == 2 * len(of_blocks(upstream))

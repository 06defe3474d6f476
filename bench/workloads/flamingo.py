"""Flamingo-style models at published sizes: gated cross-attention and Perceiver resampler.

Weights and inputs are random and the gates are open (0.7): upstream starts them closed, which would hide any error.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

import mllm_fast

from ..goals import NO_GOALS, Goals
from ..registry import OURS, Case, Workload, register
from .optional import COMPILED, compiled_peer

UPSTREAM = "open_flamingo"
PREPACKED = f"{OURS} prepack"
GRAPHED = f"{OURS} cuda_graphs"
HF = "transformers sdpa"

TOKENS = 64  # per image, after the resampler
GATE = 0.7
# Several copies of small weights are used in turn, so that they come from memory as in a model of many layers.
ROTATED_BYTES = 192 * 2**20
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = (torch.bfloat16, torch.float32)
# A block takes ten seconds or more to compile, and a GPU's whole run has 200 seconds: one number of images each.
COMPILED_IMAGES = 9


def prompt_length(images: int) -> int:
    """Tokens of an in-context prompt: about 32 per image and its caption, and 64 around them."""
    return 32 * images + 64


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Random weights that keep activations near 1 and attention neither flat nor one-hot; open gates."""
    for name, p in module.named_parameters():
        if p.ndim >= 2 and p.shape[0] > 1:
            p.normal_(0, 1 if "latents" in name or "embed" in name else 1.5 / math.sqrt(p.shape[-1]))
        elif "gate" in name or "alpha" in name:
            p.fill_(GATE)
        else:
            p.normal_(1.0 if "weight" in name else 0.0, 0.1)
    return module.eval()


def _open_flamingo() -> Any:
    # Only its factory uses open_clip, to load a vision tower.
    sys.modules.setdefault("open_clip", types.ModuleType("open_clip"))
    from open_flamingo.src import helpers

    return helpers


def _copies(nbytes: int) -> int:
    return max(1, math.ceil(ROTATED_BYTES / nbytes))


def fused(module: nn.Module, peer: str = OURS) -> nn.Module:
    module = copy.deepcopy(module)
    mllm_fast.fuse(module, prepack=peer == PREPACKED, cuda_graphs=peer == GRAPHED)
    return module


def our_peers(device: torch.device, *, graphs: bool = False) -> tuple[str, ...]:
    """As `fuse` does it by default; on a CPU with prepacked weights; on a GPU captured, where a block can be."""
    if device.type == "cpu":
        return OURS, PREPACKED
    return (OURS, GRAPHED) if graphs else (OURS,)


# OpenFlamingo-3B: MPT-1B with a gated block in every layer, ViT-L/14.
DIM, MEDIA_DIM, INNER, FFN = 2048, 1024, 512, 8192
BLOCK_WEIGHTS = 2 * DIM * INNER + 2 * DIM * FFN  # what a step must read: not the media's projection
KV_WEIGHTS = 2 * INNER * MEDIA_DIM


def _blocks(device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    helpers = _open_flamingo()
    torch.manual_seed(0)
    with device:
        for _ in range(_copies((BLOCK_WEIGHTS + KV_WEIGHTS) * dtype.itemsize)):
            yield randomise(helpers.GatedCrossAttentionBlock(dim=DIM, dim_visual=MEDIA_DIM)).to(dtype)


def _image_tokens(images: int, length: int, device: torch.device) -> Tensor:
    """[1, length] bool, True at the image tokens of a prompt: each followed by its caption."""
    locations = torch.zeros(1, length, dtype=torch.bool, device=device)
    locations[:, : 32 * images : 32] = True
    return locations


def build_block_decode(device: torch.device, *, images: int, dtype: torch.dtype, compiled: bool = False) -> Case:
    """One step of generation. The media is the same tensor at every step, as in OpenFlamingo's `generate`."""
    locations = _image_tokens(images, prompt_length(images), device)
    peers: dict[str, Any] = {name: [] for name in (UPSTREAM, *our_peers(device))}

    def step(block: nn.Module, x: Tensor, media: Tensor) -> Tensor:
        return block(x, media, media_locations=locations, use_cached_media=True)

    exact: Callable[[], Tensor] | None = None
    for block in _blocks(device, dtype):
        x = torch.randn(1, 1, DIM, device=device, dtype=dtype)
        media = torch.randn(1, images, TOKENS, MEDIA_DIM, device=device, dtype=dtype)
        peers[UPSTREAM].append(functools.partial(step, block, x, media))
        for peer in our_peers(device):
            peers[peer].append(functools.partial(step, fused(block, peer), x, media))
        exact = exact or functools.partial(_exactly, step, block, (x, media), WIDER[dtype])
    assert exact is not None
    if compiled:
        peers |= compiled_peer(device, functools.partial(_compiled, step, peers[UPSTREAM]))
    return Case(peers, exact)


def _compiled(step: Callable[..., Tensor], calls: list[functools.partial[Tensor]]) -> list[Callable[[], Tensor]]:
    """The same calls of the step compiled: once, for the copies of a block share a graph."""
    run = torch.compile(step, dynamic=False)
    return [functools.partial(run, *call.args) for call in calls]


def _exactly(step: Callable[..., Tensor], module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return step(copy.deepcopy(module).to(dtype), *(t.to(dtype) for t in inputs))


def build_attention_prefill(
    device: torch.device, *, images: int, length: int, dtype: torch.dtype, compiled: bool = False
) -> Case:
    """The attention branch with its gate and residual, over a whole prompt with new images."""
    locations = _image_tokens(images, length, device)
    peers: dict[str, Any] = {name: [] for name in (UPSTREAM, *our_peers(device))}

    def upstream(block: Any, x: Tensor, media: Tensor) -> Tensor:
        media.mul_(1)  # a write: these are new images, and nothing kept from an earlier call may be used
        return block.attn(x, media, media_locations=locations) * block.attn_gate.tanh() + x

    def ours(block: Any, x: Tensor, media: Tensor) -> Tensor:
        from mllm_fast.modules.gated_cross_attention import flamingo_visibility, gated_attention

        media.mul_(1)
        state = block._mllm_fast
        visibility = flamingo_visibility(
            state.shared, state.options, locations, media, length, immediate=block.attn.only_attend_immediate_media
        )
        return gated_attention(block, state.spec, state, x, media, visibility)

    exact: Callable[[], Tensor] | None = None
    for block in _blocks(device, dtype):
        x = torch.randn(1, length, DIM, device=device, dtype=dtype)
        media = torch.randn(1, images, TOKENS, MEDIA_DIM, device=device, dtype=dtype)
        peers[UPSTREAM].append(functools.partial(upstream, block, x, media))
        for peer in our_peers(device):
            peers[peer].append(functools.partial(ours, fused(block, peer), x, media.clone()))
        exact = exact or functools.partial(_exactly, upstream, block, (x, media), WIDER[dtype])
    assert exact is not None
    if compiled:
        peers |= compiled_peer(device, functools.partial(_compiled, upstream, peers[UPSTREAM]))
    return Case(peers, exact)


RESAMPLER_DIM, RESAMPLER_DEPTH, PATCHES, LATENTS = 1024, 6, 256, 64


def build_resampler(device: torch.device, *, images: int, dtype: torch.dtype, compiled: bool = False) -> Case:
    """OpenFlamingo's resampler on the patches of ViT-L/14 at 224 pixels."""
    torch.manual_seed(0)
    with device:
        resampler = randomise(_open_flamingo().PerceiverResampler(dim=RESAMPLER_DIM, depth=RESAMPLER_DEPTH)).to(dtype)
        x = torch.randn(1, images, 1, PATCHES, RESAMPLER_DIM, dtype=dtype)
    peers: dict[str, Any] = {
        UPSTREAM: [functools.partial(resampler, x)],
        **{peer: [functools.partial(fused(resampler, peer), x)] for peer in our_peers(device, graphs=True)},
    }
    if compiled:
        peers |= compiled_peer(device, lambda: [functools.partial(torch.compile(resampler, dynamic=False), x)])
    return Case(peers, functools.partial(_exactly, lambda module, x: module(x), resampler, (x,), WIDER[dtype]))


# IDEFICS-9B: LLaMA-7B with a gated block before every fourth layer, ViT-H/14.
HIDDEN, INTERMEDIATE, VISION = 4096, 11008, 1280
LM_WEIGHTS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE
GATED_WEIGHTS = 2 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE


@functools.lru_cache(maxsize=1)
def _idefics(device: torch.device, dtype: torch.dtype) -> Any:
    """IdeficsModel with one language layer and one gated block, which normalises queries and keys as in the checkpoint.

    A small vocabulary, and a vision tower and resampler that are not run: generation passes the resampled images.
    """
    from transformers import IdeficsConfig, IdeficsModel

    config = IdeficsConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        cross_layer_interval=1,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config={"embed_dim": VISION, "image_size": 14, "num_hidden_layers": 1},
        perceiver_config={"use_resampler": True, "resampler_depth": 1},
    )
    torch.manual_seed(0)
    with device:
        model = IdeficsModel._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return randomise(model)


def build_idefics_decode(device: torch.device, *, images: int, dtype: torch.dtype, compiled: bool = False) -> Case:
    """One generated token through one gated block and one language layer, called as `generate` calls the model."""
    from transformers import DynamicCache

    length = prompt_length(images)
    model = _idefics(device, dtype)
    torch.manual_seed(1)
    heads = model.config.num_attention_heads
    media = torch.randn(1, images, TOKENS, VISION, device=device, dtype=dtype)
    past = [torch.randn(1, heads, length, HIDDEN // heads, device=device, dtype=dtype) for _ in range(2)]
    ids = torch.full((1, 1), 7, device=device)
    seen = torch.zeros(1, 1, images, dtype=torch.long, device=device)
    seen[..., -1] = 1
    started: list[Any] = []  # a profiler cannot tell the size of what it did not see allocated, so these stay alive
    text_mask = torch.ones(1, length + 1, dtype=torch.long, device=device)

    def step(model: Any, media: Tensor, cache: Any) -> Tensor:
        if cache.get_seq_length() > length:
            cache.crop(-1)
        return model(
            input_ids=ids,
            attention_mask=text_mask,
            perceiver_embeddings=media,
            image_attention_mask=seen.clone(),  # `generate` slices a new one at every step
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def new_cache(dtype: torch.dtype) -> Any:
        cache = DynamicCache(config=model.config)
        started.append(cache.update(*(t.to(dtype) for t in past), 0))
        return cache

    def exact() -> Tensor:
        wide = WIDER[dtype]
        return step(copy.deepcopy(model).to(wide), media.to(wide), new_cache(wide))

    peers: dict[str, Any] = {
        HF: [functools.partial(step, model, media, new_cache(dtype))],
        **{peer: [functools.partial(step, fused(model, peer), media, new_cache(dtype))] for peer in our_peers(device)},
    }
    if compiled:  # not the step: the cache grows and shrinks outside of the model
        peers |= compiled_peer(
            device, lambda: [functools.partial(step, torch.compile(model, dynamic=False), media, new_cache(dtype))]
        )
    return Case(peers, exact)


def _add(
    name: str,
    dtype: torch.dtype,
    build: Callable[..., Case],
    shape: dict[str, int],
    *,
    block: str,
    model: str,
    direction: Literal["forward", "backward", "decode"],
    elements: int,
    flops: int,
    goals: Goals = NO_GOALS,
    gpu_goals: Goals = NO_GOALS,
    compiled: bool = False,
) -> None:
    """A workload. The goals are for bf16, and so is the compiled peer, which is then a goal too: not to be slower."""
    goal = dtype == torch.bfloat16
    if compiled and goal:
        build = functools.partial(build, compiled=True)
        gpu_goals = Goals({COMPILED: 1.0}) | gpu_goals
    register(
        Workload(
            name=f"{name}.{SHORT[dtype]}",
            block=block,
            model=model,
            shape=shape,
            dtype=dtype,
            direction=direction,
            build=functools.partial(build, dtype=dtype),
            nbytes=elements * dtype.itemsize,
            flops=flops,
            goals=goals if goal else NO_GOALS,
            gpu_goals=gpu_goals if goal else NO_GOALS,
        )
    )


def _register() -> None:
    for dtype in DTYPES:
        for images in (1, 5, 9, 33):
            _add(
                f"openflamingo_3b.block.decode.{images}_images",
                dtype,
                functools.partial(build_block_decode, images=images),
                {"images": images, "media_tokens": TOKENS, "dim": DIM, "media_dim": MEDIA_DIM, "ffn": FFN},
                block="gated cross-attention block",
                model="OpenFlamingo-3B",
                direction="decode",
                elements=BLOCK_WEIGHTS + 2 * TOKENS * INNER + 2 * DIM,
                flops=2 * BLOCK_WEIGHTS + 4 * TOKENS * INNER,
                goals=Goals({UPSTREAM: {9: 2.0, 33: 4.5}[images]}) if images >= 9 else NO_GOALS,
                gpu_goals=Goals(bandwidth_share=1 / 1.5),  # within 1.5 times of reading the weights once
                compiled=images == COMPILED_IMAGES,
            )
        images, length = 33, 1120
        _add(
            f"openflamingo_3b.attention.prefill.{images}_images",
            dtype,
            functools.partial(build_attention_prefill, images=images, length=length),
            {"tokens": length, "images": images, "media_tokens": TOKENS, "dim": DIM, "media_dim": MEDIA_DIM},
            block="attention part of the gated block",
            model="OpenFlamingo-3B",
            direction="forward",
            elements=2 * DIM * INNER + KV_WEIGHTS + 2 * length * DIM + images * TOKENS * MEDIA_DIM,
            flops=2 * (2 * length * DIM * INNER + images * TOKENS * KV_WEIGHTS) + 4 * length * TOKENS * INNER,
            goals=Goals({UPSTREAM: 5.0}, max_memory_ratio=1 / 8),
            compiled=True,
        )
        for images in (1, 9, 33):
            _add(
                f"idefics_9b.layer_and_block.decode.{images}_images",
                dtype,
                functools.partial(build_idefics_decode, images=images),
                {"images": images, "media_tokens": TOKENS, "tokens": prompt_length(images), "dim": HIDDEN},
                block="one language layer and one gated block",
                model="IDEFICS-9B",
                direction="decode",
                elements=LM_WEIGHTS + GATED_WEIGHTS + 2 * HIDDEN * (TOKENS + prompt_length(images)),
                flops=2 * (LM_WEIGHTS + GATED_WEIGHTS) + 4 * HIDDEN * (TOKENS + prompt_length(images)),
                goals=Goals({HF: {9: 1.5, 33: 3.0}[images]}) if images >= 9 else NO_GOALS,
                compiled=images == COMPILED_IMAGES,
            )
        images, d = 9, RESAMPLER_DIM
        weights = 2 * d * INNER + 2 * d * INNER + 8 * d * d
        _add(
            f"openflamingo.resampler.{images}_images",
            dtype,
            functools.partial(build_resampler, images=images),
            {"images": images, "patches": PATCHES, "latents": LATENTS, "dim": d, "depth": RESAMPLER_DEPTH},
            block="Perceiver resampler",
            model="OpenFlamingo (ViT-L/14)",
            direction="forward",
            elements=RESAMPLER_DEPTH * weights + images * (PATCHES + LATENTS) * d,
            flops=RESAMPLER_DEPTH
            * images
            * (2 * PATCHES * 2 * d * INNER + 2 * LATENTS * weights + 4 * LATENTS * (PATCHES + LATENTS) * INNER),
            goals=Goals({UPSTREAM: 1.2}),
            gpu_goals=Goals({COMPILED: 1.5}),
            compiled=True,
        )


_register()

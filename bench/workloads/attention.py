"""The attention op alone, at the shapes of published models, against the ways there are to compute it with torch.

Keys and values are given: projections, norms and caches are measured with the blocks (`flamingo`). Masks are made before
the clock starts, for every peer in its own form. On a machine without a GPU only the shapes that a CPU serves are
registered, and no peer that has to be compiled takes part.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fast import backend, ops
from mllm_fast.kernels.attention import libraries

from ..goals import NO_GOALS, Goals
from ..registry import OURS, Case, Workload, check, register
from .flamingo import SHORT, TOKENS, WIDER, prompt_length
from .optional import compiles, serves

SDPA = "torch sdpa"
UNREAD = "torch sdpa, hidden keys unread"  # as the library calls it, where it does: what is hidden may be NaN
EAGER = "transformers eager"
COMPILED = "transformers eager, torch.compile"
FLEX = "flex_attention"
XFORMERS = "xformers"
DISPATCHED = f"{OURS}, dispatched"  # by whom the library would let the call run; `OURS` is our kernel on a GPU

# Several copies of the inputs are used in turn, so that they come from memory.
ROTATED_BYTES = 128 * 2**20
MOST_COPIES = 64

# Two matrix products forward; five backward, of which one repeats the forward's first.
BACKWARD_PRODUCTS = 5 / 2


@dataclass(frozen=True)
class Shape:
    """A call of attention; with `images`, row i sees the image before it, and `images` divides the keys.

    `extra` keys are a second source (the latents of a resampler), which the peers have to concatenate. With `padded`, the
    last quarter of the keys is padding.
    """

    queries: int
    keys: int
    heads: int
    key_heads: int
    head_dim: int
    batch: int = 1
    extra: int = 0
    images: int = 0
    padded: bool = False

    @property
    def unpadded(self) -> int:
        """Keys of the first source that are no padding."""
        return 3 * self.keys // 4 if self.padded else self.keys

    @property
    def seen(self) -> int:
        """Keys that a row sees."""
        return (self.keys // self.images if self.images else self.unpadded) + self.extra

    @property
    def flops(self) -> int:
        """Of the forward."""
        return 4 * self.batch * self.queries * self.heads * self.seen * self.head_dim

    @property
    def elements(self) -> tuple[int, int]:
        """(of q, which the output equals; of all keys that somebody sees, which the values equal)."""
        seen = self.unpadded
        if self.images and self.queries == 1:
            seen = self.keys // self.images
        q = self.batch * self.queries * self.heads * self.head_dim
        return q, self.batch * (seen + self.extra) * self.key_heads * self.head_dim


Inputs = tuple[Tensor, ...]  # q, k, v, and with a second source extra_k, extra_v; [batch, length, heads, head_dim]
Attend = Callable[[Inputs], Tensor]


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device, requires_grad: bool) -> Inputs:
    def random(length: int, heads: int) -> Tensor:
        x = torch.randn(shape.batch, length, heads, shape.head_dim, device=device, dtype=dtype)
        return x.requires_grad_(requires_grad)

    sizes = [(shape.queries, shape.heads)] + 2 * [(shape.keys, shape.key_heads)]
    if shape.extra:
        sizes += 2 * [(shape.extra, shape.key_heads)]
    return tuple(random(*size) for size in sizes)


def _last_images(shape: Shape, device: torch.device) -> Tensor:
    """[queries] the image that each row sees: in a prompt of images and captions, the one before it."""
    if shape.queries == 1:
        return torch.full((1,), shape.images - 1, device=device)
    spacing = 32 if shape.queries >= prompt_length(shape.images) - 64 else max(1, shape.queries // shape.images)
    return (torch.arange(shape.queries, device=device) // spacing).clamp(max=shape.images - 1)


def _joined(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Both key sources as one, [batch, heads, length, head_dim]: what every module upstream does."""
    q, k, v, *extra = inputs
    if extra:
        k, v = torch.cat((k, extra[0]), 1), torch.cat((v, extra[1]), 1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _mask(shape: Shape, device: torch.device) -> ops.Mask | None:
    if shape.images:
        image = _last_images(shape, device).unsqueeze(0)
        return ops.Mask(media=ops.MediaRanges(image, image + 1, shape.images, shape.keys // shape.images))
    if shape.padded:
        return ops.Mask(key_padding=_unpadded(shape, device).expand(shape.batch, -1).contiguous())
    return None


def _unpadded(shape: Shape, device: torch.device) -> Tensor:
    return torch.arange(shape.keys, device=device).unsqueeze(0) < shape.unpadded


def _dispatched(shape: Shape, device: torch.device) -> Attend:
    mask = _mask(shape, device)

    def attend(inputs: Inputs) -> Tensor:
        q, k, v, *extra = inputs
        extra_k, extra_v = extra or (None, None)
        return ops.attention(q, k, v, extra_k=extra_k, extra_v=extra_v, mask=mask)

    return attend


def _ours(shape: Shape, device: torch.device) -> Attend:
    attend = _dispatched(shape, device)

    def on_our_kernels(inputs: Inputs) -> Tensor:
        # By itself the library would call whoever was faster the last time.
        with backend("triton"):
            return attend(inputs)

    return on_our_kernels if device.type == "cuda" else attend


def _dense_mask(shape: Shape, device: torch.device) -> Tensor | None:
    if shape.padded:
        return _unpadded(shape, device).expand(shape.queries, -1).view(1, 1, shape.queries, shape.keys)
    if not shape.images:
        return None
    image = torch.arange(shape.keys, device=device) // (shape.keys // shape.images)
    return (_last_images(shape, device).unsqueeze(1) == image).view(1, 1, shape.queries, shape.keys)


def _sdpa(shape: Shape, device: torch.device) -> Attend:
    mask, group = _dense_mask(shape, device), shape.heads // shape.key_heads

    def attend(inputs: Inputs) -> Tensor:
        q, k, v = _joined(inputs)
        if group > 1 and mask is not None:  # as transformers does: with a mask, GQA has no fast path
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        grouped = group > 1 and mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return attend


def _unread(shape: Shape, device: torch.device) -> Attend:
    mask, scale = _mask(shape, device), shape.head_dim**-0.5

    def attend(inputs: Inputs) -> Tensor:
        q, k, v = inputs
        return libraries.sdpa(q, k, v, None, None, mask, scale)

    return attend


def _eager(shape: Shape, dtype: torch.dtype, device: torch.device, compiled: bool = False) -> Attend:
    """What transformers runs without SDPA; the same function in each of its models, but for GQA, which this one has."""
    from transformers.models.mllama.modeling_mllama import eager_attention_forward

    visible = _dense_mask(shape, device)
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, torch.finfo(dtype).min)
    module = types.SimpleNamespace(num_key_value_groups=shape.heads // shape.key_heads, training=False)
    scale = shape.head_dim**-0.5

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = eager_attention_forward(module, q, k, v, mask, scaling=scale)[0]
        return out

    run: Callable[..., Tensor] = torch.compile(core) if compiled else core
    return lambda inputs: run(*_joined(inputs))


def _flex(shape: Shape, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if shape.images:
        seen, tokens = _last_images(shape, device), shape.keys // shape.images

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return seen[i] == j // tokens

        block_mask = create_block_mask(visible, None, None, shape.queries, shape.keys, device=str(device))
    run = torch.compile(flex_attention, dynamic=False)
    grouped = shape.heads != shape.key_heads

    def attend(inputs: Inputs) -> Tensor:
        out: Tensor = run(*_joined(inputs), block_mask=block_mask, enable_gqa=grouped)
        return out.transpose(1, 2)

    return attend


def _xformers(shape: Shape) -> Attend:
    from xformers.ops import fmha

    def attend(inputs: Inputs) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in _joined(inputs))
        if (group := shape.heads // shape.key_heads) > 1:  # five dimensions, the group expanded
            q = q.unflatten(2, (shape.key_heads, group))
            k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))
        out: Tensor = fmha.memory_efficient_attention(q, k, v)
        return out.flatten(2, 3) if group > 1 else out

    return attend


def _peers(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> Iterator[tuple[str, Attend]]:
    yield SDPA, _sdpa(shape, device)
    yield OURS, _ours(shape, device)
    yield EAGER, _eager(shape, dtype, device)
    if shape.padded:
        yield UNREAD, _unread(shape, device)
    if not compiles(device):
        return
    if not shape.images:  # which no library serves
        yield DISPATCHED, _dispatched(shape, device)
    torch.compiler.reset()  # else the compilations of earlier workloads count against the limit for one function
    yield COMPILED, _eager(shape, dtype, device, compiled=True)
    if shape.images:  # whose blocks it can skip
        yield FLEX, _flex(shape, device)
    # With a mask, xformers takes what SDPA takes: a dense one. It has no backward for GQA.
    masked = shape.images or shape.padded
    served = not masked and not (backward and shape.heads != shape.key_heads)
    if served and importlib.util.find_spec("xformers") is not None:
        yield XFORMERS, _xformers(shape)


def _gradients(attend: Attend, inputs: Inputs, grad: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(attend(inputs), inputs, grad)


def build(device: torch.device, *, shape: Shape, dtype: torch.dtype, backward: bool) -> Case:
    """The peers on the same inputs; the unfused one is the measure of how far the others may be off.

    Backward: a call returns dq, which is checked with the rest; that dk and dv are right is checked here, once.
    """
    torch.manual_seed(0)
    q, keys = shape.elements
    copies = min(MOST_COPIES, max(1, math.ceil(ROTATED_BYTES / (2 * (q + keys) * dtype.itemsize))))
    inputs = [_inputs(shape, dtype, device, backward) for _ in range(copies)]
    grads = [torch.randn_like(given[0]) for given in inputs]
    wide = tuple(x.detach().to(WIDER[dtype]).requires_grad_(backward) for x in inputs[0])

    def first(attend: Attend) -> object:
        return _gradients(attend, inputs[0], grads[0]) if backward else attend(inputs[0])

    attends = {
        name: attend
        for name, attend in _peers(shape, dtype, device, backward)
        if name in (SDPA, OURS, DISPATCHED, EAGER) or serves(name, functools.partial(first, attend))
    }
    exactly = _sdpa(shape, device)
    if not backward:
        calls = {name: [functools.partial(attend, given) for given in inputs] for name, attend in attends.items()}
        return Case(calls, functools.partial(exactly, wide), EAGER)

    def query_gradient(attend: Attend, given: Inputs, grad: Tensor) -> Tensor:
        return _gradients(attend, given, grad)[0]

    def key_gradients(attend: Attend, given: Inputs, grad: Tensor) -> Tensor:
        return torch.cat([x.flatten() for x in _gradients(attend, given, grad)[1:]])

    wide_grad = grads[0].to(WIDER[dtype])
    keys_only = {name: [functools.partial(key_gradients, a, inputs[0], grads[0])] for name, a in attends.items()}
    check(Case(keys_only, functools.partial(key_gradients, exactly, wide, wide_grad), EAGER))
    timed = {
        name: [functools.partial(query_gradient, attend, *pair) for pair in zip(inputs, grads, strict=True)]
        for name, attend in attends.items()
    }
    return Case(timed, functools.partial(query_gradient, exactly, wide, wide_grad), EAGER)


def _add(
    name: str,
    model: str,
    shape: Shape,
    direction: Literal["forward", "backward", "decode"],
    *,
    dtype: torch.dtype = torch.bfloat16,
    gpu_goals: Goals = NO_GOALS,
) -> None:
    q, keys = shape.elements
    backward = direction == "backward"
    # Backward reads both inputs and the output again, and its gradient; it writes three gradients.
    elements = 2 * q + 2 * keys + (4 * q + 4 * keys if backward else 0)
    sizes: dict[str, Any] = {k: v for k, v in vars(shape).items() if v}
    register(
        Workload(
            name=f"attention.{name}.{direction}.{SHORT[dtype]}",
            block="attention",
            model=model,
            shape=sizes,
            dtype=dtype,
            direction=direction,
            build=functools.partial(build, shape=shape, dtype=dtype, backward=backward),
            nbytes=elements * dtype.itemsize,
            flops=int(shape.flops * (1 + (BACKWARD_PRODUCTS if backward else 0))),
            gpu_goals=gpu_goals,
        )
    )


# What a library serves faster is left to it.
BEST = Goals({SDPA: 1.0, XFORMERS: 1.0})
MEDIA = Goals({SDPA: 10.0, FLEX: 2.0})
DECODE = Goals(bandwidth_share=0.7)


def _register(gpu: bool) -> None:
    both: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    for direction in both:
        for batch in (1, 8, 64) if gpu else (1, 8):
            _add(
                f"qformer.batch_{batch}",
                "BLIP-2 (ViT-g/14)",
                Shape(32, 257, 12, 12, 64, batch),
                direction,
                gpu_goals=BEST,
            )
        for batch in (8, 64) if gpu else (8,):
            shape = Shape(64, 64, 12, 12, 64, batch, padded=True)
            _add(f"text_padded.batch_{batch}", "BLIP-2 (BERT-base)", shape, direction)
        batch = 9 if gpu else 2
        shape = Shape(64, 256, 8, 8, 64, batch, extra=64)
        _add(f"resampler.{batch}_images", "OpenFlamingo (ViT-L/14)", shape, direction, gpu_goals=BEST)
        batch = 4 if gpu else 1
        shape = Shape(64, 4900, 16, 4, 96, batch, extra=64)
        _add(f"resampler_idefics2.{batch}_images", "Idefics2-8B", shape, direction, gpu_goals=BEST)
        images = 33 if gpu else 9
        length = prompt_length(images)
        shape = Shape(length, images * TOKENS, 8, 8, 64, images=images)
        _add(f"media_openflamingo.{images}_images", "OpenFlamingo-3B", shape, direction, gpu_goals=MEDIA)
        if gpu:
            shape = Shape(length, images * TOKENS, 32, 32, 128, images=images)
            _add(f"media_idefics.{images}_images", "IDEFICS-9B", shape, direction, gpu_goals=MEDIA)
            shape = Shape(4096, images * TOKENS, 8, 8, 64, images=images)
            _add("media_openflamingo.4096_tokens", "OpenFlamingo-3B", shape, direction)
            _add("mllama", "Llama-3.2-11B-Vision", Shape(512, 6404, 32, 8, 128), direction)
    _add("mllama", "Llama-3.2-11B-Vision", Shape(1, 6404, 32, 8, 128), "decode", gpu_goals=DECODE)
    if gpu:
        _add("mllama.batch_8", "Llama-3.2-11B-Vision", Shape(1, 6404, 32, 8, 128, 8), "decode", gpu_goals=DECODE)


_register(torch.cuda.is_available())

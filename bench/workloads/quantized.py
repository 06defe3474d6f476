"""Linear layers over frozen weights in 4 and 8 bits: bitsandbytes' layers, the same layers fused, and a dense one.

A layer is what people have: `Linear4bit` or `Linear8bitLt`, in eval mode where it infers and in train mode where a gradient
goes through it. The dense layer holds the dequantised weight in 16 bits, which is what quantisation is to save.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mllm_fast
from mllm_fast.ops import dequantize

from ..goals import NO_GOALS, Goals
from ..registry import OURS, Case, Workload, register
from .flamingo import ROTATED_BYTES, SHORT

BITSANDBYTES = "bitsandbytes"
DENSE = "torch dense"

DTYPE = torch.bfloat16
BLOCKSIZE = 64
MOST_COPIES = 24

Kind = Literal["nf4", "nf4_nested", "int8"]


@dataclass(frozen=True)
class Shape:
    """`rows` of x, and a weight of `width` x `columns`."""

    rows: int
    width: int
    columns: int

    def weight_bytes(self, kind: Kind) -> int:
        """What a step must read of the weight: codes and scales."""
        elements = self.width * self.columns
        if kind == "int8":
            return elements + 4 * self.width
        blocks = elements // BLOCKSIZE
        return elements // 2 + (blocks + blocks // BLOCKSIZE if kind == "nf4_nested" else 4 * blocks)


def layer(kind: Kind, shape: Shape, device: torch.device) -> nn.Sequential:
    """bitsandbytes' layer with a random weight, in a container, since `fuse` replaces classes in place."""
    import bitsandbytes as bnb

    # It says in every call of LLM.int8 that it computes in fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    weight = (torch.randn(shape.width, shape.columns, device=device) * shape.columns**-0.5).to(DTYPE)
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(shape.columns, shape.width, bias=False, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        nested = kind == "nf4_nested"
        made = bnb.nn.Linear4bit(
            shape.columns, shape.width, bias=False, compute_dtype=DTYPE, quant_type="nf4", compress_statistics=nested
        )
        made.weight = bnb.nn.Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=nested, blocksize=BLOCKSIZE
        )
    return nn.Sequential(made.to(device))


def _fused(module: nn.Sequential) -> nn.Sequential:
    module = copy.deepcopy(module)
    mllm_fast.fuse(module)
    return module


def _forward(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    return run(x)


def _step(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    (dx,) = torch.autograd.grad(run(x), x, grad)
    return dx


def build(device: torch.device, *, kind: Kind, shape: Shape, backward: bool) -> Case:
    """The peers on the same weights and inputs."""
    torch.manual_seed(0)
    copies = min(MOST_COPIES, max(1, math.ceil(ROTATED_BYTES / shape.weight_bytes(kind))))
    call = _step if backward else _forward
    peers: dict[str, list[Callable[[], Tensor]]] = {name: [] for name in (BITSANDBYTES, OURS, DENSE)}
    exact: Callable[[], Tensor] | None = None
    for _ in range(copies):
        x = torch.randn(shape.rows, shape.columns, device=device, dtype=DTYPE, requires_grad=backward)
        grad = torch.randn(shape.rows, shape.width, device=device, dtype=DTYPE)
        theirs = layer(kind, shape, device)
        ours = _fused(theirs).train(backward)
        fused: Any = ours[0]
        weight = dequantize(fused.frozen_weight(), torch.float32)
        dense = functools.partial(F.linear, weight=weight.to(DTYPE))
        for name, run in ((BITSANDBYTES, theirs.train(backward)), (OURS, ours), (DENSE, dense)):
            peers[name].append(functools.partial(call, run, x, grad))
        if exact is None:
            wide = x.detach().float().requires_grad_(backward)
            exact = functools.partial(call, functools.partial(F.linear, weight=weight), wide, grad.float())
    assert exact is not None
    return Case(peers, exact)


def _add(
    kind: Kind,
    shape: Shape,
    model: str,
    backward: bool,
    *,
    goals: Goals = NO_GOALS,
    gpu_goals: Goals = NO_GOALS,
) -> None:
    passes = 2 if backward else 1
    activations = shape.rows * (shape.width + shape.columns) * passes * DTYPE.itemsize
    register(
        Workload(
            name=f"quantized.{kind}.{shape.width}x{shape.columns}.{shape.rows}_rows."
            f"{'backward' if backward else 'forward'}.{SHORT[DTYPE]}",
            block="quantized_linear",
            model=model,
            shape=vars(shape),
            dtype=DTYPE,
            direction="backward" if backward else "forward",
            build=functools.partial(build, kind=kind, shape=shape, backward=backward),
            nbytes=passes * shape.weight_bytes(kind) + activations,
            flops=passes * 2 * shape.rows * shape.width * shape.columns,
            goals=goals,
            gpu_goals=gpu_goals,
        )
    )


LAYERS = (
    (4096, 4096, "LLaMA-7B q_proj"),
    (11008, 4096, "LLaMA-7B up_proj"),
    (4096, 11008, "LLaMA-7B down_proj"),
    (28672, 8192, "LLaMA-2-70B up_proj"),
)


def _register(gpu: bool) -> None:
    if not gpu:
        width, columns, model = LAYERS[0]
        for rows in (1, 16, 256):
            _add("nf4", Shape(rows, width, columns), model, False)
            _add("int8", Shape(rows, width, columns), model, False)
        # The goals of a training step are for few rows, where the weight decides.
        few = Shape(16, width, columns)
        _add("nf4", few, model, True, goals=Goals({BITSANDBYTES: 1.5}, max_memory_ratio=0.5))
        _add("nf4_nested", few, model, True, goals=Goals({BITSANDBYTES: 1.5}, max_memory_ratio=0.5))
        _add("int8", few, model, True, goals=Goals({BITSANDBYTES: 3.0}, max_memory_ratio=0.5))
        for kind in ("nf4", "int8"):
            _add(kind, Shape(256, width, columns), model, True)
        return
    for width, columns, model in LAYERS:
        for rows in (1, 2, 8, 32, 128, 512, 1024):
            # bitsandbytes is good at one row; from two on nothing should be slower.
            goals = NO_GOALS if rows == 1 else Goals({BITSANDBYTES: 1.0})
            _add("nf4", Shape(rows, width, columns), model, False, gpu_goals=goals)
        for rows in (16, 256, 1024):
            _add("nf4", Shape(rows, width, columns), model, True, gpu_goals=Goals({BITSANDBYTES: 1.3}))
    for width, columns, model in LAYERS[:2]:
        for rows in (1, 16, 256):
            _add("int8", Shape(rows, width, columns), model, False)
            _add("nf4_nested", Shape(rows, width, columns), model, False)
        _add("int8", Shape(256, width, columns), model, True)


_register(torch.cuda.is_available())

"""The fused norm, linear and gate ops alone, at the layers of published models, against the modules' own chains of ops.

"torch eager" is what the upstream blocks run: a norm, a linear layer, an activation, a gate and a residual each by itself.
On a machine without a GPU only few shapes are registered, and neither torch.compile nor Liger takes part.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fast import ops

from ..registry import OURS, Case, Workload, check, register
from .flamingo import ROTATED_BYTES, SHORT, WIDER

EAGER = "torch eager"
COMPILED = "torch eager, torch.compile"
LIGER = "liger"
MOST_COPIES = 64
EPS = 1e-6

NormKind = Literal["layer_norm", "rms_norm"]
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer of a block: norm, linear layer, and what comes after them; without `features`, the norm or the gate alone.

    Attributes:
        rows, width: of x.
        features: of the linear layer's output, or 0.
        norm: before the linear layer, or with `post` after the residual is added.
        activation: or None; "swiglu" has a second weight.
        head_dim: of heads that are normalised, or 0.
        gate: a residual is added, the branch times tanh of one gate or of one a feature; "none": times nothing.
        groups: how many equal parts of the rows have weights of their own.
        stacked: how many layers read the same x, each behind a norm of its own.
    """

    rows: int
    width: int
    features: int = 0
    norm: NormKind | None = None
    post: bool = False
    activation: str | None = None
    head_dim: int = 0
    gate: Literal["none", "scalar", "vector"] | None = None
    groups: int = 1
    stacked: int = 1

    @property
    def out(self) -> int:
        """Columns of the result."""
        return self.features * self.stacked if self.features else self.width

    @property
    def weight_elements(self) -> int:
        """Of all weights."""
        return self.out * self.width * self.groups * (2 if self.activation == "swiglu" else 1) if self.features else 0

    @property
    def elements(self) -> int:
        """The least that is read and written: weights, x, the residual and the result."""
        more = self.rows * self.out if self.gate is not None else 0
        return self.weight_elements + self.rows * (self.width + self.out) + more

    @property
    def flops(self) -> int:
        """Of the forward: the products; a few for each element where there are none."""
        products = 2 * self.rows * self.weight_elements // self.groups
        return products or 8 * self.rows * self.width


def draw(layer: Layer, dtype: torch.dtype, device: torch.device, requires_grad: bool = False) -> Inputs:
    """Random inputs and weights, of a size that keeps activations near 1."""
    names: dict[str, tuple[tuple[int, ...], float]] = {"x": ((1, layer.rows, layer.width), 1.0)}
    normed = layer.out if layer.post else layer.width
    for i in range(layer.groups * layer.stacked):
        if layer.features:
            names[f"weight{i}"] = ((layer.features, layer.width), layer.width**-0.5)
            if layer.activation == "swiglu":
                names["gate_weight"] = names["weight0"]
        if layer.norm is not None:
            names[f"gain{i}"] = ((normed,), 1.0)
            if layer.norm == "layer_norm":
                names[f"shift{i}"] = ((normed,), 0.1)
    if layer.head_dim:
        names["head"] = ((layer.head_dim,), 1.0)
    if layer.gate is not None:
        names["residual"] = ((1, layer.rows, layer.out), 1.0)
        if layer.gate != "none":
            names["gate"] = ((layer.out if layer.gate == "vector" else 1,), 1.0)
    return {
        name: (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(requires_grad)
        for name, (shape, scale) in names.items()
    }


def eager(layer: Layer) -> Run:
    """The layer op by op."""

    def norm(x: Tensor, t: Inputs, i: int = 0) -> Tensor:
        if layer.norm is None:
            return x
        if layer.norm == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], t[f"gain{i}"], t[f"shift{i}"], EPS)
        wide = x.double() if x.dtype == torch.float64 else x.float()  # as the RMS norms of transformers do
        return t[f"gain{i}"] * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

    def branch(x: Tensor, t: Inputs) -> Tensor:
        if not layer.features:
            return x if layer.post or layer.gate is not None else norm(x, t)
        outs = []
        for i, rows in enumerate([x] * layer.stacked if layer.groups == 1 else x.chunk(layer.groups, 1)):
            rows = rows if layer.post else norm(rows, t, i)
            y = F.linear(rows, t[f"weight{i}"])
            if layer.activation == "swiglu":
                y = F.silu(F.linear(rows, t["gate_weight"])) * y
            outs.append(F.gelu(y) if layer.activation == "gelu" else y)
        y = outs[0] if len(outs) == 1 else torch.cat(outs, -1 if layer.stacked > 1 else 1)
        if layer.head_dim:
            heads = y.unflatten(-1, (-1, layer.head_dim))
            wide = heads.double() if y.dtype == torch.float64 else heads.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
            y = (t["head"] * wide.to(y.dtype)).flatten(-2)
        return y

    def run(t: Inputs) -> Tensor:
        y = branch(t["x"], t)
        if layer.gate is None:
            return y
        y = t["residual"] + (y if layer.gate == "none" else y * t["gate"].tanh())
        return norm(y, t) if layer.post else y

    return run


def ours(layer: Layer) -> Run:
    """The layer as one op."""

    def norms(t: Inputs) -> list[ops.Norm | None]:
        if layer.norm is None:
            return [None] * layer.groups
        count = layer.groups * layer.stacked
        return [ops.Norm(layer.norm, t[f"gain{i}"], t.get(f"shift{i}"), EPS) for i in range(count)]

    def run(t: Inputs) -> Tensor:
        x, norm = t["x"], norms(t)
        first = norm[0]
        if not layer.features:
            if not layer.post and layer.gate is not None:
                return ops.gated_residual(t["residual"], x, t["gate"])
            residual = t.get("residual")
            if layer.norm == "rms_norm":
                return ops.rms_norm(x, t["gain0"], EPS, residual=residual)
            return ops.layer_norm(x, t["gain0"], t["shift0"], EPS, residual=residual)
        if layer.gate is not None:
            after = first if layer.post else None
            return ops.linear_residual(x, t["weight0"], residual=t["residual"], gate=t.get("gate"), norm=after)
        weights = [t[f"weight{i}"] for i in range(layer.groups * layer.stacked)]
        if layer.groups > 1:
            sizes = [layer.rows // layer.groups] * layer.groups
            joined = ops.grouped_linear(x, weights, sizes=sizes, input_norms=norm, activation=layer.activation)
            assert isinstance(joined, Tensor)
            return joined
        head_norm = ops.Norm("rms_norm", t["head"], None, EPS) if layer.head_dim else None
        gate_weight = t.get("gate_weight")
        return ops.norm_linear(
            x, weights[0], norm=first, activation=layer.activation, gate_weight=gate_weight, head_norm=head_norm
        )

    def run_stacked(stacked: ops.StackedWeight, t: Inputs) -> Tensor:
        outs = ops.stacked_linear(t["x"], stacked, norm=ops.Norm(layer.norm or "layer_norm", eps=EPS))
        whole = outs[0]._base
        return torch.cat(outs, -1) if whole is None else whole.view(1, layer.rows, layer.out)

    if layer.stacked == 1:
        return run
    # The modules keep the stack from call to call.
    stacks: dict[int, ops.StackedWeight] = {}

    def stacked(t: Inputs) -> Tensor:
        count = range(layer.stacked)
        if (found := stacks.get(id(t))) is None:
            found = stacks[id(t)] = ops.stack_weights([t[f"weight{i}"] for i in count], None, norms(t))
        return run_stacked(found, t)

    return stacked


def _liger(layer: Layer) -> Run:
    """Liger's norm, after the residual is added where there is one."""
    from liger_kernel.transformers.functional import liger_layer_norm, liger_rms_norm

    def run(t: Inputs) -> Tensor:
        x = t["x"] if layer.gate is None else t["residual"] + t["x"]
        if layer.norm == "rms_norm":
            out: Tensor = liger_rms_norm(x, t["gain0"], EPS, in_place=False)
            return out
        normed: Tensor = liger_layer_norm(x, t["gain0"], t["shift0"], EPS)
        return normed

    return run


def _peers(layer: Layer, device: torch.device) -> Iterator[tuple[str, Run]]:
    yield EAGER, eager(layer)
    yield OURS, ours(layer)
    if device.type == "cuda":
        torch.compiler.reset()  # else the compilations of earlier workloads count against the limit for one function
        yield COMPILED, torch.compile(eager(layer), dynamic=False)
        if not layer.features and layer.norm is not None and importlib.util.find_spec("liger_kernel") is not None:
            yield LIGER, _liger(layer)


def _gradients(run: Run, t: Inputs, grad: Tensor) -> dict[str, Tensor]:
    return dict(zip(t, torch.autograd.grad(run(t), list(t.values()), grad), strict=True))


def build(device: torch.device, *, layer: Layer, dtype: torch.dtype, backward: bool) -> Case:
    """The peers on the same inputs.

    Backward: a call returns dx, which is checked with the rest; that the other gradients are right is checked here, once.
    """
    torch.manual_seed(0)
    copies = min(MOST_COPIES, max(1, math.ceil(ROTATED_BYTES / (layer.elements * dtype.itemsize))))
    inputs = [draw(layer, dtype, device, backward) for _ in range(copies)]
    wide = {name: t.detach().to(WIDER[dtype]).requires_grad_(backward) for name, t in inputs[0].items()}
    runs, exactly = dict(_peers(layer, device)), eager(layer)
    if not backward:
        calls = {name: [functools.partial(run, given) for given in inputs] for name, run in runs.items()}
        return Case(calls, functools.partial(exactly, wide), EAGER)
    grads = [torch.randn(1, layer.rows, layer.out, device=device, dtype=dtype) for _ in inputs]
    wide_grad = grads[0].to(WIDER[dtype])

    def one(run: Run, name: str, given: Inputs, grad: Tensor) -> Tensor:
        return _gradients(run, given, grad)[name]

    for name in inputs[0]:
        alone = {peer: [functools.partial(one, run, name, inputs[0], grads[0])] for peer, run in runs.items()}
        check(Case(alone, functools.partial(one, exactly, name, wide, wide_grad), EAGER))
    timed = {
        peer: [functools.partial(one, run, "x", *pair) for pair in zip(inputs, grads, strict=True)]
        for peer, run in runs.items()
    }
    return Case(timed, functools.partial(one, exactly, "x", wide, wide_grad), EAGER)


def _add(name: str, model: str, layer: Layer, direction: Literal["forward", "backward", "decode"] = "forward") -> None:
    dtype, backward = torch.bfloat16, direction == "backward"
    register(
        Workload(
            name=f"fused.{name}.{direction}.{SHORT[dtype]}",
            block=name.partition(".")[0],
            model=model,
            shape={key: value for key, value in vars(layer).items() if isinstance(value, int) and value > 1},
            dtype=dtype,
            direction=direction,
            build=functools.partial(build, layer=layer, dtype=dtype, backward=backward),
            # Backward reads everything again and writes as many gradients.
            nbytes=layer.elements * dtype.itemsize * (3 if backward else 1),
            flops=layer.flops * (3 if backward else 1),
        )
    )


OF3B, IDEFICS, QFORMER, RESAMPLER = "OpenFlamingo-3B", "IDEFICS-9B", "BLIP-2 (ViT-g/14)", "OpenFlamingo (ViT-L/14)"
BLIP = "BLIP (ViT-B/16, BERT-base)"


def _register(gpu: bool) -> None:
    prefill, images = (1120, 9) if gpu else (96, 1)
    for rows in (1, prefill):
        direction: Literal["forward", "decode"] = "decode" if rows == 1 else "forward"
        _add(
            f"norm_linear.flamingo_up.{rows}_rows",
            OF3B,
            Layer(rows, 2048, 8192, "layer_norm", activation="gelu"),
            direction,
        )
        _add(f"linear_residual.flamingo_down.{rows}_rows", OF3B, Layer(rows, 8192, 2048, gate="scalar"), direction)
        if gpu:
            _add(f"norm_linear.flamingo_query.{rows}_rows", OF3B, Layer(rows, 2048, 512, "layer_norm"), direction)
            _add(f"linear_residual.flamingo_out.{rows}_rows", OF3B, Layer(rows, 512, 2048, gate="scalar"), direction)
            up = Layer(rows, 4096, 11008, "rms_norm", activation="swiglu")
            _add(f"norm_linear.idefics_up.{rows}_rows", IDEFICS, up, direction)
            _add(
                f"linear_residual.idefics_down.{rows}_rows", IDEFICS, Layer(rows, 11008, 4096, gate="vector"), direction
            )
            heads = Layer(rows, 4096, 4096, "rms_norm", head_dim=128)
            _add(f"norm_linear.idefics_query.{rows}_rows", IDEFICS, heads, direction)
    for batch in (1, 64) if gpu else (1,):
        rows = 32 * batch
        _add(f"norm_linear.qformer_qkv.batch_{batch}", QFORMER, Layer(rows, 768, 2304, "layer_norm"))
        _add(f"norm_linear.qformer_up.batch_{batch}", QFORMER, Layer(rows, 768, 3072, "layer_norm", activation="gelu"))
        _add(
            f"linear_residual.qformer_down.batch_{batch}",
            QFORMER,
            Layer(rows, 3072, 768, "layer_norm", True, gate="none"),
        )
        groups = Layer(2 * rows, 768, 3072, "layer_norm", activation="gelu", groups=2)
        _add(f"grouped_linear.qformer_up.batch_{batch}", QFORMER, groups)
        _add(
            f"layer_norm.qformer_post.batch_{batch}",
            QFORMER,
            Layer(rows, 768, norm="layer_norm", post=True, gate="none"),
        )
    kv = Layer(256 * images, 1024, 1024, "layer_norm", stacked=6)
    _add(f"stacked_linear.resampler_kv.{images}_images", RESAMPLER, kv)
    _add(f"layer_norm.resampler_media.{images}_images", RESAMPLER, Layer(256 * images, 1024, norm="layer_norm"))
    _add(f"rms_norm.idefics.{prefill}_rows", IDEFICS, Layer(prefill, 4096, norm="rms_norm"))
    _add(f"gated_residual.flamingo.{prefill}_rows", OF3B, Layer(prefill, 2048, gate="scalar"))
    _add("linear_residual.blip_down", BLIP, Layer(3, 3072, 768, "layer_norm", True, gate="none"), "decode")
    if gpu:
        rows = 32 * 64
        up = Layer(rows, 768, 3072, "layer_norm", activation="gelu")
        _add("norm_linear.qformer_up.batch_64", QFORMER, up, "backward")
        _add(
            "linear_residual.qformer_down.batch_64",
            QFORMER,
            Layer(rows, 3072, 768, "layer_norm", True, gate="none"),
            "backward",
        )
        _add("linear_residual.flamingo_down.2048_rows", OF3B, Layer(2048, 8192, 2048, gate="scalar"), "backward")
        post = Layer(rows, 768, norm="layer_norm", post=True, gate="none")
        _add("layer_norm.qformer_post.batch_64", QFORMER, post, "backward")
        _add("gated_residual.flamingo.2048_rows", OF3B, Layer(2048, 2048, gate="vector"), "backward")


_register(torch.cuda.is_available())

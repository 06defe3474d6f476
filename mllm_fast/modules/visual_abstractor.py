"""The visual abstractor of mPLUG-Owl: learned queries summarise an image (Ye et al. 2023, arXiv 2304.14178, section 3.1).

    x = norm1(h),  e = normk(image)
    y = x + W_o attention(x W_q, [x; e] W_k, [x; e] W_v)      the residual is the normalised query, not the query
    h = y + W_2 norm(silu(W_1 norm2(y)) * (W_3 norm2(y)))     SwiGLU with a norm inside

The rows of the language model are h W + b, and a learned end row follows them. There are no position embeddings.

Queries and image are two key sources and are not concatenated. The image is normalised once and projected to the keys and
values of all layers in one GEMM, each layer's affine folded into its weights; queries that all images share are projected
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.attention import Mask
from ..kernels.linear import StackedWeight, stack_weights
from ..kernels.norm import Norm
from . import children
from .qformer_projections import LARGEST
from .state import FusedState, Options, needs_graph


@dataclass(frozen=True)
class LayerNames:
    """Dotted paths of the children that play each role in one layer.

    `norm_queries` and `norm_image` are norm1 and normk; `ffn_gate`, `ffn_up` and `ffn_down` are W_1, W_3 and W_2.
    """

    norm_queries: str
    norm_image: str
    query: str
    key: str
    value: str
    out: str
    ffn_norm: str
    ffn_gate: str
    ffn_up: str
    ffn_inner_norm: str
    ffn_down: str


@dataclass(frozen=True)
class AbstractorLayerSpec:
    """What one layer computes: attention of `heads` heads of `head_dim` channels, with the children `names`."""

    heads: int
    head_dim: int
    names: LayerNames


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: the module that holds its children, what it computes, and what it keeps."""

    module: nn.Module
    spec: AbstractorLayerSpec
    state: FusedState = field(repr=False)

    def child(self, role: str) -> Any:
        """The child with this role, a field of `LayerNames`."""
        return children.resolve(self.module, getattr(self.spec.names, role))

    def heads(self, x: Tensor) -> Tensor:
        """[..., heads * head_dim] -> [..., heads, head_dim], a view."""
        return x.unflatten(-1, (self.spec.heads, self.spec.head_dim))


def project_image(layers: Sequence[Layer], state: FusedState, image: Tensor) -> list[Tensor | None]:
    """Keys and values of the image for all layers, in one GEMM behind one norm.

    Args:
        layers: in order.
        state: keeps the stacked and folded weight.
        image: [N, M, D].

    Returns:
        for each layer [N, M, 2 * heads * head_dim], keys then values, a view of one buffer; None for layers that project
        the image themselves: those whose children have to be called (LoRA, quantised, hooked), and all of them at level 0,
        where their norms differ in more than the affine part, or where the buffer would be too large for a CPU (`LARGEST`).
    """
    reads = [_read_image_projection(layer) for layer in layers]
    found = [read for read in reads if read is not None]
    norms = [norm for norm, _, _ in found for _ in range(2)]
    linears = [linear for _, key, value in found for linear in (key, value)]
    alone: list[Tensor | None] = [None] * len(layers)
    if state.options.level < 1 or not found or len({(norm.kind, norm.eps) for norm in norms}) > 1:
        return alone
    size = image.shape[:-1].numel() * sum(linear.weight.shape[0] for linear in linears) * image.element_size()
    graph = needs_graph(image, *(linear.weight for linear in linears))
    if size > LARGEST and image.device.type == "cpu" and not graph:
        return alone
    name = ("image", tuple(read is not None for read in reads))
    plain = Norm(norms[0].kind, None, None, norms[0].eps)
    parts = iter(children.stacked_linear(image, _stacked(state, name, linears, norms, 2), plain, name, state.packs))
    return [None if read is None else next(parts) for read in reads]


def _read_image_projection(layer: Layer) -> tuple[Norm, nn.Linear, nn.Linear] | None:
    """Norm, key and value projection of the image, where a kernel can read them all."""
    norm, key, value = children.read_norm(layer.child("norm_image")), layer.child("key"), layer.child("value")
    if norm is None or not (children.readable_linear(key) and children.readable_linear(value)):
        return None
    return norm, key, value


def run_layer(
    layer: Layer,
    x: Tensor,
    source: Tensor,
    *,
    projected: bool = False,
    image_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """One layer.

    Args:
        x: [N, n, D] queries. A batch of stride 0 is one row that all images share, and is projected once.
        source: the image [N, M, D]; with `projected` its keys and values [N, M, 2 * heads * head_dim] (`project_image`).
        image_mask: [N, M], nonzero where the image is seen; None: everywhere. Queries are always seen.
        dropout_p: on the attention's probabilities.

    Returns:
        [N, n, D].

    Raises:
        ValueError: queries and images that do not pair up, or a mask of another shape.
    """
    images = source.shape[0]
    if x.shape[0] != images:
        raise ValueError(f"queries have shape {tuple(x.shape)}; expected [{images}, n, D] for {images} images")
    if image_mask is not None and image_mask.shape != source.shape[:2]:
        raise ValueError(
            f"the image mask has shape {tuple(image_mask.shape)}; expected {tuple(source.shape[:2])}, as the image has"
        )
    if _one_row(layer, x):
        x = x[:1]
    if projected or _read_image_projection(layer) is not None:
        attended, residual, norm = _attend(layer, x, source, projected, image_mask, dropout_p)
    else:
        attended, residual, norm = _attend_whole(layer, x, source, image_mask, dropout_p)
    out, residual, packs = layer.child("out"), residual.expand(images, -1, -1), layer.state.packs
    if norm is None:
        y = children.linear_residual(attended.flatten(-2), out, residual, packs=packs)
    else:
        y = ops.linear_residual(attended.flatten(-2), out.weight, out.bias, residual=residual, residual_norm=norm)
    up, gate = layer.child("ffn_up"), layer.child("ffn_gate")
    hidden = children.norm_linear(y, layer.child("ffn_norm"), up, activation="swiglu", gate=gate, packs=packs)
    hidden = children.normalize(hidden, layer.child("ffn_inner_norm"))
    return children.linear_residual(hidden, layer.child("ffn_down"), y, packs=packs)


def _one_row(layer: Layer, x: Tensor) -> bool:
    """Whether all rows of x are one row in memory, which a child that has to be called (it may have dropout) is not given."""
    if layer.state.options.level < 1 or x.shape[0] == 1 or x.stride(0) != 0:
        return False
    linears = (layer.child(role) for role in ("query", "key", "value"))
    return children.read_norm(layer.child("norm_queries")) is not None and all(map(children.readable_linear, linears))


Attended = tuple[Tensor, Tensor, Norm | None]


def _attend(
    layer: Layer, x: Tensor, source: Tensor, projected: bool, image_mask: Tensor | None, dropout_p: float
) -> Attended:
    """Attention to queries and image as two sources: [N, n, heads, head_dim], what it is added to, and a norm for that."""
    q, k, v, residual, norm = _project_queries(layer, x)
    if projected:
        image_k, image_v = source.chunk(2, dim=-1)
    else:
        read, linears = children.read_norm(layer.child("norm_image")), [layer.child("key"), layer.child("value")]
        stacked = _stacked(layer.state, "image", linears)
        image_k, image_v = children.stacked_linear(source, stacked, read, "image", layer.state.packs)
    attended = ops.attention(
        layer.heads(q).expand(source.shape[0], -1, -1, -1),
        layer.heads(image_k),
        layer.heads(image_v),
        extra_k=layer.heads(k),
        extra_v=layer.heads(v),
        mask=None if image_mask is None else Mask(key_padding=image_mask.bool()),
        dropout_p=dropout_p,
    )
    return attended, residual, norm


def _project_queries(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Norm | None]:
    """Queries, keys and values of norm1(x); and the residual with the norm that is still to be applied to it."""
    state, norm = layer.state, layer.child("norm_queries")
    linears = [layer.child(role) for role in ("query", "key", "value")]
    if not all(children.readable_linear(linear) for linear in linears):
        x = children.normalize(x, norm)
        q, k, v = (children.norm_linear(x, None, linear, packs=state.packs) for linear in linears)
        return q, k, v, x, None
    read = children.read_norm(norm)
    if read is None or not defers_norm(x) or not children.readable_linear(layer.child("out")):
        x, read = children.normalize(x, norm), None
    stacked = _stacked(state, "queries", linears)
    q, k, v = children.stacked_linear(x, stacked, read, "queries", state.packs)
    return q, k, v, x, read


def defers_norm(x: Tensor) -> bool:
    """Whether norm1 is left to the two GEMMs that read it, instead of a launch of its own.

    On a CPU there are no launches to save, and it would be computed twice.
    """
    return x.device.type != "cpu"


def _attend_whole(layer: Layer, x: Tensor, image: Tensor, image_mask: Tensor | None, dropout_p: float) -> Attended:
    """The same where keys and values have to be called: once, on queries and image together, as upstream does."""
    queries = children.normalize(x, layer.child("norm_queries")).expand(image.shape[0], -1, -1)
    keys = torch.cat((queries, children.normalize(image, layer.child("norm_image"))), dim=1)
    q, k, v = (
        layer.heads(children.norm_linear(of, None, layer.child(role), packs=layer.state.packs))
        for role, of in (("query", queries), ("key", keys), ("value", keys))
    )
    mask = None
    if image_mask is not None:
        seen = image_mask.bool()
        mask = Mask(key_padding=torch.cat((seen.new_ones(queries.shape[:2]), seen), dim=1))
    return ops.attention(q, k, v, mask=mask, dropout_p=dropout_p), queries, None


def _stacked(
    state: FusedState,
    name: object,
    linears: Sequence[nn.Module],
    norms: Sequence[Norm] | None = None,
    together: int = 1,
) -> StackedWeight:
    """The linears' weights as one, with each norm's affine folded in, in outputs of `together` neighbours; kept."""
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    sources = [*weights, *biases, *(t for norm in norms or () for t in (norm.weight, norm.bias))]

    def build() -> StackedWeight:
        whole = stack_weights(weights, None if all(b is None for b in biases) else biases, norms)
        sizes = [sum(whole.sizes[i : i + together]) for i in range(0, len(whole.sizes), together)]
        return StackedWeight(whole.weight, whole.bias, tuple(sizes))

    return state.derived.get(name, sources, build)


class VisualAbstractor(nn.Module):
    """A visual abstractor of our own, for new models.

    Args:
        dim: width of the image features and of the queries.
        out_dim: width of the language model.
        depth: number of layers.
        heads: of the attention; they divide `dim`.
        queries: learned queries; an image becomes one row more.
        ffn_dim: hidden width of the feed-forward networks.
        eps, ffn_eps: of the norms, and of those inside the feed-forward networks.
        dropout: on the attention's probabilities, in training.

    Raises:
        ValueError: the heads do not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        depth: int = 6,
        heads: int = 16,
        queries: int = 64,
        ffn_dim: int = 2816,
        eps: float = 1e-5,
        ffn_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got {heads} and {dim}")
        self.dropout = dropout
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.end = nn.Parameter(torch.randn(out_dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_queries": nn.LayerNorm(dim, eps=eps),
                    "norm_image": nn.LayerNorm(dim, eps=eps),
                    "query": nn.Linear(dim, dim),
                    "key": nn.Linear(dim, dim),
                    "value": nn.Linear(dim, dim),
                    "out": nn.Linear(dim, dim),
                    "ffn_norm": nn.LayerNorm(dim, eps=eps),
                    "ffn_gate": nn.Linear(dim, ffn_dim),
                    "ffn_up": nn.Linear(dim, ffn_dim),
                    "ffn_inner_norm": nn.LayerNorm(ffn_dim, eps=ffn_eps),
                    "ffn_down": nn.Linear(ffn_dim, dim),
                }
            )
            for _ in range(depth)
        )
        self.projection = nn.Linear(dim, out_dim)
        roles = LayerNames.__dataclass_fields__
        self.specs = tuple(
            AbstractorLayerSpec(heads, dim // heads, LayerNames(**{role: f"layers.{i}.{role}" for role in roles}))
            for i in range(depth)
        )
        self._mllm_fast = FusedState(type(self), Options())
        self._layer_states = [FusedState(type(self), Options()) for _ in range(depth)]

    def forward(self, image: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Summarise images.

        Args:
            image: [..., M, dim] features of one image, or of the frames of one video one after another.
            image_mask: [..., M], nonzero where they are seen; None: everywhere.

        Returns:
            [..., queries + 1, out_dim].
        """
        flat = image.reshape(-1, *image.shape[-2:])
        mask = None if image_mask is None else image_mask.reshape(-1, image_mask.shape[-1])
        layers = [Layer(self, *pair) for pair in zip(self.specs, self._layer_states, strict=True)]
        x = self.queries.expand(flat.shape[0], -1, -1)
        dropout_p = self.dropout if self.training else 0.0
        for layer, projected in zip(layers, project_image(layers, self._mllm_fast, flat), strict=True):
            given, known = (flat, False) if projected is None else (projected, True)
            x = run_layer(layer, x, given, projected=known, image_mask=mask, dropout_p=dropout_p)
        rows = children.norm_linear(x, None, self.projection)
        rows = torch.cat((rows, self.end.to(rows.dtype).expand(rows.shape[0], 1, -1)), dim=1)
        return rows.view(*image.shape[:-2], *rows.shape[1:])

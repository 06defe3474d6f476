"""What a Q-Former layer computes, and what a forward pass tells its layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..kernels.attention import Mask
from ..kernels.linear import StackedWeight
from . import children
from .state import FusedState

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Stacks = dict[Hashable, StackedWeight]


@dataclass(frozen=True)
class FfnNames:
    """Dotted paths of the children of one feed-forward network with its post-norm."""

    up: str
    down: str
    norm: str
    dropout: str


@dataclass(frozen=True)
class AttentionNames:
    """Dotted paths of the children of one attention branch with its post-norm.

    `module` holds `attention_dropout`, the dropout on the probabilities.
    """

    module: str
    query: str
    key: str
    value: str
    out: str
    norm: str
    dropout: str


@dataclass(frozen=True)
class QFormerLayerSpec:
    """What one layer computes.

    Attributes:
        heads, head_dim: of both attentions.
        activation: of both feed-forward networks, a name of `ops.norm_linear`.
        attention: self-attention of queries and text.
        cross: attention of the query rows to the image; None where the layer has none.
        query_ffn: network of the query rows.
        text_ffn: network of the text rows; None in a Q-Former that was built without.
    """

    heads: int
    head_dim: int
    activation: str
    attention: AttentionNames
    cross: AttentionNames | None
    query_ffn: FfnNames
    text_ffn: FfnNames | None

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What a forward pass tells its layers. Tensors that may need gradients are arguments of `run_layer` instead.

    Attributes:
        query_length: the first so many rows of a sequence are queries, the rest is text.
        mask: of the self-attention; None: everything is visible.
        image_mask: of the cross-attention; None: everything is visible.
        image_index: [B], the image that each batch row reads; None: images are shared by equally many neighbours.
        projected: whether the image comes as this layer's keys and values instead of features.
        absorbed: whether features are to be read without forming keys and values (`absorbs`).
        past: whether, in place of an image, keys and values come that the self-attention sees before its own.
        rows: how many rows of each sequence to return; None is all of them. Those left out are still keys and values.
        keep: return the self-attention's keys and values too.
        attend: takes the place of the self-attention's core: queries, keys and values [B, S, heads, head_dim] and dropout
            to [B, rows, heads, head_dim]. For keys that are cached, and for sequences without padding.
        sequences: so many sequences' queries lie one after another in each batch row, and read an image each, `image_index`
            [sequences]; their self-attention is for `attend` to know. None: a batch row is a sequence.
        stacks: stacked weights that several passes of one step share; None: each call makes or finds its own.
        defers: whether the layer may hand out `Parts` whose norms are pending, because another layer reads them.
    """

    query_length: int
    mask: Mask | None = None
    image_mask: Mask | None = None
    image_index: Tensor | None = None
    projected: bool = False
    absorbed: bool = False
    past: bool = False
    rows: int | None = None
    keep: bool = False
    attend: Attend | None = None
    sequences: int | None = None
    stacks: Stacks | None = None
    defers: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a Q-Former: the module that holds its children, what it computes, and what it keeps."""

    module: nn.Module
    spec: QFormerLayerSpec
    state: FusedState = field(repr=False)


def dropout_p(block: nn.Module, path: str) -> float:
    """The probability of the dropout module at `path`, 0 in evaluation."""
    dropout = children.resolve(block, path)
    return float(dropout.p) if dropout.training else 0.0


def attention_p(block: nn.Module, names: AttentionNames) -> float:
    """The dropout on the probabilities of an attention branch, 0 in evaluation."""
    attention = children.resolve(block, names.module)
    return float(attention.attention_dropout) if attention.training else 0.0


def drops(layer: Layer) -> bool:
    """Whether any dropout of the layer is active, so that equal rows do not stay equal."""
    block, spec = layer.module, layer.spec
    branches = [names for names in (spec.attention, spec.cross, spec.query_ffn, spec.text_ffn) if names is not None]
    attentions = [names for names in branches if isinstance(names, AttentionNames)]
    return any(dropout_p(block, names.dropout) for names in branches) or any(attention_p(block, a) for a in attentions)

"""The projector of LLaVA and MiniGPT-4, from image features to the width of the language model, and the splice behind it.

    linear:      y = x W^T + b                          (LLaVA, arXiv 2304.08485, section 4.1; MiniGPT-4, arXiv 2304.10592)
    mlp2x_gelu:  y = W_2 gelu(W_1 x + b_1) + b_2        (LLaVA-1.5, arXiv 2310.03744, section 3.3)

The projected rows then replace the embeddings of the image tokens, row by row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from .. import ops
from . import children
from .state import needs_graph


@dataclass(frozen=True)
class ProjectorSpec:
    """What a projector computes.

    Attributes:
        linears: paths of its linear layers, in order.
        activation: between them, a name of `ops.norm_linear`; None: none.
    """

    linears: tuple[str, ...]
    activation: str | None = "gelu"


def project(module: nn.Module, spec: ProjectorSpec, features: Tensor) -> Tensor:
    """Image features [..., D_image] to rows of the language model [..., D]."""
    *inner, last = (children.resolve(module, path) for path in spec.linears)
    for linear in inner:
        features = children.norm_linear(features, None, linear, activation=spec.activation)
    return children.norm_linear(features, None, last)


def splice_rows(embeddings: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """The embeddings with `rows` in the places of the image tokens, in order.

    What upstream does by `masked_scatter`, bitwise; see `ops.splice_rows`. Gradients go to both.

    Args:
        embeddings: [B, L, D].
        places: [B, L] bool, True at exactly N image tokens.
        rows: [N, D], in the dtype of the embeddings.

    Returns:
        [B, L, D].
    """
    return ops.splice_rows(embeddings, rows, ops.image_rows(places))


def text_rows(table: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """What `ops.splice_rows` takes for the embeddings of `ids` [B, L]: the table and the ids, or the looked-up rows.

    The latter where the embedding is not exactly a look-up, or where its weight is trained: its own backward then leaves
    out the padding row.
    """
    plain = type(table) is nn.Embedding and table.max_norm is None and not children.hooked(table)
    if not plain or type(table.weight) is not nn.Parameter or needs_graph(table.weight):
        return table(ids), None
    return table.weight, ids


class Projector(nn.Module):
    """A projector of our own, for new models and for checkpoints without a maintained class.

    Args:
        dim: width of the image features.
        out_dim: width of the language model.
        kind: "linear", or "mlp{n}x_gelu" for n linear layers ("mlp2x_gelu").

    Raises:
        ValueError: for any other kind.
    """

    def __init__(self, dim: int, out_dim: int, kind: str = "mlp2x_gelu") -> None:
        super().__init__()
        found = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
        if kind != "linear" and found is None:
            raise ValueError(f"kind must be 'linear' or 'mlp<n>x_gelu' such as 'mlp2x_gelu', got {kind!r}")
        depth = int(found[1]) if found else 1
        self.layers = nn.ModuleList(nn.Linear(dim if i == 0 else out_dim, out_dim) for i in range(depth))
        self.spec = ProjectorSpec(tuple(f"layers.{i}" for i in range(depth)))

    def forward(self, features: Tensor) -> Tensor:
        """Project features [..., dim] -> [..., out_dim]."""
        return project(self, self.spec, features)

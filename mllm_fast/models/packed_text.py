"""Texts of different lengths without their padding, and the attention of a Q-Former over them.

Everything in a layer but attention works row by row, so rows of many sequences lie in one sequence [1, rows, D]: queries
first, then the tokens of the texts. Only attention puts the rows of a sequence side by side again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..kernels.attention import Mask


@dataclass(frozen=True, eq=False)
class PackedText:
    """Where the tokens of B texts, at most T long each, lie among N packed rows.

    Attributes:
        mask: [B, T] bool, true for tokens.
        places: [N] int64, the place of each packed row in [B * T].
        slots: [B * T] int64, the packed row at each place; 0 for padding.
    """

    mask: Tensor
    places: Tensor
    slots: Tensor = field(repr=False)

    @classmethod
    def of(cls, mask: Tensor) -> PackedText:
        """Pack the tokens of a mask [B, T] position by position: all first tokens, then all second ones.

        The host reads how many there are.
        """
        mask = mask.bool()
        texts, length = mask.shape
        order = mask.t().flatten().nonzero().squeeze(1)
        return cls.at(order % texts * length + order // texts, mask)

    @classmethod
    def right_padded(cls, mask: Tensor) -> PackedText:
        """`of`, for texts whose first token and causal order matter.

        Raises:
            ValueError: a text that does not begin with a token, or has one after padding.
        """
        tokens = mask.bool()
        if bool((~tokens[:, 0]).any() | (tokens[:, 1:] & ~tokens[:, :-1]).any()):
            raise ValueError(
                "attention_mask has padding before a token; pad texts on the right (padding_side='right' in the tokenizer), "
                "at least one token each"
            )
        return cls.of(tokens)

    @classmethod
    def at(cls, places: Tensor, mask: Tensor) -> PackedText:
        """Tokens that are packed in the order of their places."""
        rows = torch.arange(places.shape[0], device=places.device)
        return cls(mask, places, places.new_zeros(mask.numel()).index_copy_(0, places, rows))

    @property
    def texts(self) -> int:
        """B."""
        return self.mask.shape[0]

    @property
    def tokens(self) -> int:
        """N."""
        return self.places.shape[0]

    @property
    def positions(self) -> Tensor:
        """[N], of each packed row in its text."""
        return self.places % self.mask.shape[1]

    def shifted(self) -> PackedText:
        """The tokens but the first of each text, at one position less: the labels of what is before them.

        They must be packed as `of` packs them, and every text must have a first token.
        """
        places = self.places[self.texts :]
        return PackedText.at(places - 1 - places // self.mask.shape[1], self.mask[:, 1:])

    def beside(self, other: PackedText) -> PackedText:
        """These texts and then others, whose rows follow."""
        parts, length = (self, other), max(self.mask.shape[1], other.mask.shape[1])
        mask = torch.cat([F.pad(part.mask, (0, length - part.mask.shape[1])) for part in parts])
        places = [part.places // part.mask.shape[1] * length + part.positions for part in parts]
        return PackedText.at(torch.cat((places[0], places[1] + self.texts * length)), mask)

    def chosen(self, index: Tensor) -> tuple[PackedText, Tensor]:
        """Some of the texts [R], and the packed row [N'] that each of their rows repeats. The host reads N'."""
        chosen = PackedText.of(self.mask[index])
        return chosen, self.slots.view(self.mask.shape)[index].flatten()[chosen.places]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [N, ...]."""
        packed: Tensor = _Pack.apply(x.flatten(0, 1), self)
        return packed

    def pad(self, x: Tensor) -> Tensor:
        """[N, ...] to [B, T, ...], padding some row or other. Nobody may read padding: its gradient is left out."""
        padded: Tensor = _Pad.apply(x, self)
        return padded.unflatten(0, self.mask.shape)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, text: PackedText) -> Tensor:
        ctx.text = text
        return x.index_select(0, text.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padding = ~ctx.text.mask.reshape(-1, *(1,) * (grad.ndim - 1))
        return grad.index_select(0, ctx.text.slots).masked_fill_(padding, 0), None


class _Pad(torch.autograd.Function):
    # A gather in both directions: the gradient of `index_select` would be a scattered sum, slow and on a GPU unordered.
    @staticmethod
    def forward(ctx: Any, x: Tensor, text: PackedText) -> Tensor:
        ctx.text = text
        return x.index_select(0, text.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.text.places), None


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def attend_apart(queries: int, text: PackedText, captions: PackedText | None = None) -> Attend:
    """Self-attention of rows that stand for three passes: `LayerCall.attend` over [queries | captions | texts].

    Queries see the queries of their image. Captions, which have one text an image, see these and what precedes them.
    Texts see themselves.

    Args:
        queries: rows of all images' queries together; 0 where there are none.
        text: packed by `PackedText.of`. If there are fewer queries of the attention than rows, these are the first tokens.
        captions: None: none.
    """
    visible, causal = Mask(key_padding=text.mask), Mask(causal=True)
    sizes = [queries, 0 if captions is None else captions.tokens]

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        (q0, q1, q2), (k0, k1, k2), (v0, v1, v2) = (x[0].split([*sizes, x.shape[1] - sum(sizes)]) for x in (q, k, v))
        outputs: list[Tensor] = []
        if queries:
            q0, k0, v0 = (x.unflatten(0, (text.texts, -1)) for x in (q0, k0, v0))
            outputs.append(ops.attention(q0, k0, v0, dropout_p=dropout_p).flatten(0, 1))
        if captions is not None and captions.tokens:
            q1, k1, v1 = (captions.pad(x) for x in (q1, k1, v1))
            seen = {"extra_k": k0, "extra_v": v0} if queries else {}
            read = ops.attention(q1, k1, v1, **seen, mask=causal, dropout_p=dropout_p)
            outputs.append(captions.pack(read))
        k2, v2 = text.pad(k2), text.pad(v2)
        whole = q2.shape[0] == text.tokens
        q2 = text.pad(q2) if whole else q2.unsqueeze(1)
        read = ops.attention(q2, k2, v2, mask=visible, dropout_p=dropout_p)
        outputs.append(text.pack(read) if whole else read.squeeze(1))
        return torch.cat(outputs).unsqueeze(0)

    return attend


def attend_together(text: PackedText, count: int) -> Attend:
    """Self-attention of [queries | texts], `count` queries a text, where a text and its queries see each other.

    If there are fewer queries of the attention than rows, these are the first.
    """
    rows = text.texts * count
    visible = Mask(key_padding=F.pad(text.mask, (count, 0), value=True))

    def whole(x: Tensor) -> Tensor:
        return torch.cat((x[0, :rows].unflatten(0, (-1, count)), text.pad(x[0, rows:])), dim=1)

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        only_queries = q.shape[1] == rows
        q = q[0].unflatten(0, (-1, count)) if only_queries else whole(q)
        read = ops.attention(q, whole(k), whole(v), mask=visible, dropout_p=dropout_p)
        outputs = [read[:, :count].flatten(0, 1)]
        if not only_queries:
            outputs.append(text.pack(read[:, count:]))
        return torch.cat(outputs).unsqueeze(0)

    return attend

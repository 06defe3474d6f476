"""BLIP-2's first stage by upstream's own modules, every pass by itself: what an unfused `Blip2Stage1` computes.

As LAVIS has it (`Blip2Qformer.forward`), but for generation, which is the joint pass with the mask of UniLM that LAVIS's cache
of the queries stands for. Images are projected again for every pass and every pair; nothing here is fused or shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contrast import Share, contrast, hard_negatives
from .gathering import processes
from .packed_text import PackedText

if TYPE_CHECKING:
    from .blip2_stage1 import Blip2Stage1


def explicit_losses(
    model: Blip2Stage1,
    input_ids: Tensor,
    attention_mask: Tensor,
    image: Tensor,
    negatives: tuple[Tensor, Tensor] | None,
    across_processes: bool,
) -> dict[str, Tensor]:
    """The losses of a step, as `Blip2Stage1.forward` returns them, for one process.

    Args:
        model: its Q-Former is not fused.
        input_ids, attention_mask: [B, T], padded on the right.
        image: [B, M, D_image].
        negatives, across_processes: as in `Blip2Stage1.forward`.

    Raises:
        ValueError: several processes, and what `Blip2Stage1.forward` raises.
    """
    if across_processes and processes()[1] > 1:
        raise ValueError("an unfused first stage computes with one process's pairs only; call mllm_fast.fuse(model)")
    texts = PackedText.right_padded(attention_mask)
    check_pairs(image, texts)
    Share.of(texts.texts, input_ids.shape[1], texts.tokens, input_ids.device, across=False)
    r, pairs = model.retrieval, len(input_ids)
    image = image.to(r.qformer.layernorm.weight.dtype)
    queries = r.qformer(query_embeds=r.query_tokens.expand(pairs, -1, -1), encoder_hidden_states=image)
    words = r.embeddings(input_ids=input_ids)
    text = r.qformer(query_embeds=words, query_length=0, attention_mask=attention_mask).last_hidden_state
    scores = tuple(s / model.temperature for s in model._similarities(queries.last_hidden_state, text[:, 0]))
    itc = contrast((scores[0], scores[1]), 0, model.label_smoothing)
    wrong_image, wrong_text = hard_negatives((scores[0], scores[1]), 0) if negatives is None else negatives
    itm = _matching_loss(
        r,
        torch.cat((input_ids, input_ids, input_ids[wrong_text])),
        torch.cat((attention_mask, attention_mask, attention_mask[wrong_text])),
        torch.cat((image, image[wrong_image], image)),
        torch.cat((torch.ones(pairs), torch.zeros(2 * pairs))).long().to(image.device),
    )
    ids = torch.cat((torch.full_like(input_ids[:, :1], model.bos_token_id), input_ids[:, 1:]), dim=1)
    labels = ids.masked_fill(attention_mask == 0, -100)[:, 1:].flatten()
    rows = model.lm_head(_joint_text(r, ids, image)[:, :-1], r.embeddings.word_embeddings.weight)
    itg = F.cross_entropy(rows.flatten(0, 1), labels, label_smoothing=model.label_smoothing)
    return {"loss": itc + itm + itg, "itc": itc, "itm": itm, "itg": itg}


def check_pairs(features: Tensor, text: PackedText) -> None:
    """Raise ValueError unless there are as many images [I, M, D] as texts."""
    if features.shape[0] != text.texts:
        raise ValueError(f"got {features.shape[0]} images and {text.texts} texts; a step needs one text for each image")


def check_text(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError unless the mask has the shape of the tokens."""
    if attention_mask is None or attention_mask.shape != input_ids.shape:
        given = "missing" if attention_mask is None else f"of shape {tuple(attention_mask.shape)}"
        raise ValueError(
            f"attention_mask is {given}; expected {tuple(input_ids.shape)} as input_ids has, 1 for a token and 0 for padding"
        )


def _matching_loss(r: nn.Module, ids: Tensor, mask: Tensor, image: Tensor, right: Tensor) -> Tensor:
    """Cross entropy of pairs [N] that are seen together, queries and text both ways."""
    queries = r.query_tokens.expand(len(ids), -1, -1)
    count = queries.shape[1]
    hidden = r.qformer(
        query_embeds=r.embeddings(input_ids=ids, query_embeds=queries),
        query_length=count,
        attention_mask=torch.cat((mask.new_ones(len(ids), count), mask), dim=1),
        encoder_hidden_states=image,
    ).last_hidden_state
    return F.cross_entropy(r.itm_head(hidden[:, :count]).mean(dim=1), right)


def _joint_text(r: nn.Module, ids: Tensor, image: Tensor) -> Tensor:
    """Text rows [B, T, D] that see the queries and the text up to them; queries see queries."""
    queries = r.query_tokens.expand(len(ids), -1, -1)
    count = queries.shape[1]
    x = r.qformer.dropout(r.qformer.layernorm(r.embeddings(input_ids=ids, query_embeds=queries)))
    rows = torch.arange(x.shape[1], device=x.device)
    visible = (rows <= rows[:, None]) & (rows[:, None] >= count) | (rows < count)
    # Added to the scores, which every implementation of attention takes; a mask of flags, eager attention does not.
    mask = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)
    for layer in r.qformer.encoder.layer:
        x = layer(x, mask.expand(len(ids), 1, -1, -1), image, query_length=count)
    text: Tensor = x[:, count:]
    return text

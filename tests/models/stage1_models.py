"""A tiny BLIP-2 of the first stage, pairs for it, and its losses from upstream's modules, every pass by itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2ForImageTextRetrieval

from mllm_fast.models.blip2_stage1 import Blip2Stage1
from tests.families.builders import randomise
from tests.families.qformers import QUERIES, draw, retrieval

DEC, SEP, PAIRS, LENGTH, PATCHES, LAYERS = 58, 57, 3, 6, 5, 5
NEGATIVES = (torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]))


def stage1(seed: int = 0, **qformer: Any) -> tuple[Blip2Stage1, Blip2ForImageTextRetrieval]:
    """The model, and upstream's with the same weights."""
    upstream = retrieval(seed, **qformer)
    model = Blip2Stage1(copy.deepcopy(upstream), bos_token_id=DEC, eos_token_id=SEP)
    randomise(model.lm_head, seed + 1)
    return model.eval(), upstream


def batch(seed: int = 0) -> dict[str, Tensor]:
    drawn = draw(seed, PAIRS)
    pixels = torch.randn(PAIRS, 3, 28, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"input_ids": drawn["ids"], "attention_mask": drawn["text_mask"], "pixel_values": pixels}


class Reference(nn.Module):
    """Stage 1 the way LAVIS computes it, from upstream's modules: every pass by itself, images copied for every pair.

    ITG is the explicit joint pass with a dense UniLM mask: queries see queries, text sees queries and earlier text.
    """

    def __init__(self, upstream: Blip2ForImageTextRetrieval, model: Blip2Stage1) -> None:
        super().__init__()
        self.retrieval = upstream
        self.lm_head = copy.deepcopy(model.lm_head)
        self.temperature = copy.deepcopy(model.temperature)
        self.smoothing = model.label_smoothing

    def words(self) -> Tensor:
        return self.retrieval.embeddings.word_embeddings.weight

    def joint(self, ids: Tensor, image: Tensor) -> Tensor:
        """Scores of the token after each of `ids`."""
        r = self.retrieval
        x = r.embeddings(input_ids=ids, query_embeds=r.query_tokens.expand(len(ids), -1, -1))
        x = r.qformer.dropout(r.qformer.layernorm(x))
        rows = torch.arange(x.shape[1])
        visible = (rows <= rows[:, None]) & (rows[:, None] >= QUERIES) | (rows < QUERIES)
        visible = visible.expand(len(ids), 1, -1, -1)
        for layer in r.qformer.encoder.layer:
            x = layer(x, visible, image, query_length=QUERIES)
        hidden = x[:, QUERIES:]
        head = self.lm_head
        return F.linear(head.norm(F.gelu(head.dense(hidden))), self.words(), head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        r, b = self.retrieval, len(input_ids)
        image = r.vision_model(pixel_values).last_hidden_state
        queries = r.query_tokens.expand(b, -1, -1)
        features = r.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        text = r.qformer(
            query_embeds=r.embeddings(input_ids=input_ids), query_length=0, attention_mask=attention_mask
        ).last_hidden_state
        features = F.normalize(r.vision_projection(features), dim=-1)
        text = F.normalize(r.text_projection(text[:, 0]), dim=-1)
        i2t = torch.einsum("iqe,te->itq", features, text).max(-1).values / self.temperature
        t2i = torch.einsum("te,iqe->tiq", text, features).max(-1).values / self.temperature
        target = torch.arange(b)
        losses = [F.cross_entropy(s, target, label_smoothing=self.smoothing) for s in (i2t, t2i)]
        itc = (losses[0] + losses[1]) / 2
        wrong_image, wrong_text = NEGATIVES
        ids = torch.cat((input_ids, input_ids, input_ids[wrong_text]))
        mask = torch.cat((attention_mask, attention_mask, attention_mask[wrong_text]))
        hidden = r.qformer(
            query_embeds=r.embeddings(input_ids=ids, query_embeds=r.query_tokens.expand(3 * b, -1, -1)),
            query_length=QUERIES,
            attention_mask=torch.cat((torch.ones(3 * b, QUERIES, dtype=torch.long), mask), 1),
            encoder_hidden_states=torch.cat((image, image[wrong_image], image)),
        ).last_hidden_state[:, :QUERIES]
        itm = F.cross_entropy(r.itm_head(hidden).mean(1), torch.tensor([1] * b + [0] * 2 * b))
        decoder_ids = input_ids.clone()
        decoder_ids[:, 0] = DEC
        labels = decoder_ids.masked_fill(attention_mask == 0, -100)
        scores = self.joint(decoder_ids, image)[:, :-1]
        itg = F.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=self.smoothing)
        return {"loss": itc + itm + itg, "itc": itc, "itm": itm, "itg": itg}


def results(model: nn.Module, dtype: torch.dtype, seed: int = 0, **more: Any) -> dict[str, Tensor]:
    """Losses, and the gradient of their sum for every parameter."""
    model.zero_grad(set_to_none=True)
    given = batch(seed)
    losses = model(**given | {"pixel_values": given["pixel_values"].to(dtype)}, **more)
    losses["loss"].backward()
    found = {name: value.detach() for name, value in losses.items()}
    return found | {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}

"""The Q-Former and BLIP's captioning decoder at published sizes, against transformers.

Weights and inputs are random. The vision towers are not run: their features are inputs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..goals import NO_GOALS, Goals
from ..registry import OURS, Case, Workload, register
from .flamingo import DTYPES, HF, SHORT, WIDER, fused, our_peers
from .optional import COMPILED, compiled_peer

EAGER = "transformers eager"  # all there is for BLIP
SEPARATE = "each objective by itself"  # as LAVIS computes them, with transformers' modules

QUERIES, TEXT, DIM, FFN, LAYERS, PATCHES, VISION = 32, 32, 768, 3072, 12, 257, 1408


def _wider(model: nn.Module, dtype: torch.dtype) -> Any:
    return copy.deepcopy(model).to(WIDER[dtype])


def _qformer(device: torch.device, dtype: torch.dtype, *, text: bool, **sizes: int) -> Any:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    torch.manual_seed(0)
    with device:
        model = Blip2QFormerModel._from_config(Blip2QFormerConfig(use_qformer_text_input=text, **sizes), dtype=dtype)
    return model.eval()


def build_qformer(device: torch.device, *, batch: int, dtype: torch.dtype, compiled: bool = False) -> Case:
    """32 queries read ViT-g's features of each image."""
    model = _qformer(device, dtype, text=False)
    image = torch.randn(batch, PATCHES, VISION, device=device, dtype=dtype)
    queries = torch.randn(1, QUERIES, DIM, device=device, dtype=dtype)

    def call(model: Any, queries: Tensor, image: Tensor) -> Tensor:
        return model(query_embeds=queries.expand(batch, -1, -1), encoder_hidden_states=image).last_hidden_state

    peers: dict[str, Any] = {HF: [functools.partial(call, model, queries, image)]}
    for peer in our_peers(device, graphs=True):
        peers[peer] = [functools.partial(call, fused(model, peer), queries, image)]
    if compiled:
        peers |= compiled_peer(
            device, lambda: [functools.partial(call, torch.compile(model, dynamic=False), queries, image)]
        )
    wide = WIDER[dtype]
    return Case(peers, lambda: call(_wider(model, dtype), queries.to(wide), image.to(wide)))


def build_matching(device: torch.device, *, texts: int, dtype: torch.dtype) -> Case:
    """Image-text matching of one image with many texts: upstream gets a copy of the image for each text."""
    model = _qformer(device, dtype, text=True)
    image = torch.randn(1, PATCHES, VISION, device=device, dtype=dtype)
    rows = torch.randn(texts, QUERIES + TEXT, DIM, device=device, dtype=dtype)
    mask = torch.ones(texts, QUERIES + TEXT, dtype=torch.long, device=device)
    for i in range(texts):
        mask[i, QUERIES + 8 + i :] = 0

    def call(model: Any, rows: Tensor, image: Tensor) -> Tensor:
        out = model(query_embeds=rows, query_length=QUERIES, attention_mask=mask, encoder_hidden_states=image)
        return out.last_hidden_state[:, :QUERIES]

    copies = image.expand(texts, -1, -1).contiguous()
    peers = {HF: [functools.partial(call, model, rows, copies)]}
    peers |= {peer: [functools.partial(call, fused(model, peer), rows, image)] for peer in our_peers(device)}
    wide = WIDER[dtype]
    return Case(peers, lambda: call(_wider(model, dtype), rows.to(wide), copies.to(wide)))


def _decoder(device: torch.device, dtype: torch.dtype, **sizes: int) -> Any:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    torch.manual_seed(0)
    config = BlipTextConfig(num_attention_heads=12, encoder_hidden_size=DIM, is_decoder=True, **sizes)
    with device:
        model = BlipTextLMHeadModel._from_config(config, dtype=dtype)
    return model.eval()


def build_captioning(device: torch.device, *, beams: int, dtype: torch.dtype, compiled: bool = False) -> Case:
    """One generated token of BLIP captioning with beams: the decoder's step, and the cache put into the beams' order."""
    model = _decoder(device, dtype)
    image = torch.randn(1, 577, DIM, device=device, dtype=dtype)
    prompt = torch.full((beams, 4), 7, device=device)
    order = torch.zeros(beams, dtype=torch.long, device=device)

    def start(model: Any, image: Tensor) -> Any:
        with torch.no_grad():
            return model(prompt, encoder_hidden_states=image, use_cache=True, is_decoder=True).past_key_values

    def step(model: Any, image: Tensor, cache: Any) -> Tensor:
        logits = model(
            prompt[:, :1], encoder_hidden_states=image, past_key_values=cache, use_cache=True, is_decoder=True
        ).logits
        cache.reorder_cache(order)
        cache.self_attention_cache.crop(-1)
        return logits

    copies = image.expand(beams, -1, -1).contiguous()
    peers: dict[str, Any] = {EAGER: [functools.partial(step, model, copies, start(model, copies))]}
    for peer in our_peers(device):
        ours = fused(model, peer)
        peers[peer] = [functools.partial(step, ours, image, start(ours, image))]
    if compiled:  # not the step: the cache is put in order and cut outside of the model
        peers |= compiled_peer(
            device,
            lambda: [functools.partial(step, torch.compile(model, dynamic=False), copies, start(model, copies))],
        )

    def exact() -> Tensor:
        wide, features = _wider(model, dtype), copies.to(WIDER[dtype])
        return step(wide, features, start(wide, features))

    return Case(peers, exact)


def caption_lengths(batch: int) -> list[int]:
    """Tokens of each caption; all are padded to `TEXT`, as LAVIS pads them."""
    return [8 + 6 * (i % 4) for i in range(batch)]


def build_stage1(device: torch.device, *, batch: int, dtype: torch.dtype) -> Case:
    """A training step of BLIP-2's first stage: contrast, matching and generation, forward and backward, no dropout."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, OPTConfig

    from mllm_fast.models.blip2_stage1 import Blip2Stage1

    torch.manual_seed(0)
    config = Blip2Config(
        vision_config={"num_hidden_layers": 1},
        qformer_config={
            "use_qformer_text_input": True,
            "vocab_size": 30523,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=OPTConfig(
            vocab_size=100,
            hidden_size=64,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=64,
        ),
    )
    with device:
        upstream = Blip2ForImageTextRetrieval(config)
        nn.init.normal_(upstream.query_tokens, std=0.02)
        stage = Blip2Stage1(copy.deepcopy(upstream), bos_token_id=30522, eos_token_id=102).to(dtype).train()
    separate = SeparateObjectives(upstream.to(dtype), copy.deepcopy(stage.lm_head)).train()
    for model in (separate.model, stage.retrieval):
        model.vision_model.requires_grad_(False)
    features = torch.randn(batch, PATCHES, VISION, device=device, dtype=dtype)
    ids = torch.randint(1000, 30000, (batch, TEXT), device=device)
    mask = (torch.arange(TEXT) < torch.tensor(caption_lengths(batch))[:, None]).long().to(device)
    shifted = torch.arange(batch, device=device).roll(1), torch.arange(batch, device=device).roll(-1)

    def ours() -> Tensor:
        stage.zero_grad(set_to_none=False)
        with torch.enable_grad():
            loss = stage(ids, mask, features=features, negatives=shifted)["loss"]
            loss.backward()
        return stage.retrieval.query_tokens.grad.clone()

    def theirs(step: SeparateObjectives, features: Tensor) -> Tensor:
        step.zero_grad(set_to_none=False)
        with torch.enable_grad():
            step(ids, mask, features, shifted).backward()
        return step.model.query_tokens.grad.clone()

    peers: dict[str, list[Callable[[], Tensor]]] = {SEPARATE: [functools.partial(theirs, separate, features)]}
    peers[OURS] = [ours]
    return Case(peers, lambda: theirs(_wider(separate, dtype), features.to(WIDER[dtype])))


class SeparateObjectives(nn.Module):
    """The three losses over transformers' modules, each with its own pass over the image as LAVIS computes them."""

    def __init__(self, model: Any, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.temperature = nn.Parameter(torch.tensor(0.07, dtype=next(model.parameters()).dtype))

    def forward(self, ids: Tensor, mask: Tensor, features: Tensor, negatives: tuple[Tensor, Tensor]) -> Tensor:
        m, q, batch = self.model, self.model.qformer, len(ids)
        kept: list[Tensor] = []
        projections = [
            p for layer in q.encoder.layer for p in (layer.attention.attention.key, layer.attention.attention.value)
        ]
        hooks = [p.register_forward_hook(lambda module, args, out: kept.append(out)) for p in projections]
        queries = m.query_tokens.expand(batch, -1, -1)
        seen = q(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        for hook in hooks:
            hook.remove()
        read = q(query_embeds=m.embeddings(input_ids=ids), query_length=0, attention_mask=mask).last_hidden_state
        image = F.normalize(m.vision_projection(seen), dim=-1)
        text = F.normalize(m.text_projection(read[:, 0]), dim=-1)
        scores = (image.unsqueeze(1) @ text.unsqueeze(-1)).squeeze(-1).amax(dim=-1) / self.temperature
        same = torch.arange(batch, device=ids.device)
        itc = sum(F.cross_entropy(s, same, label_smoothing=0.1) for s in (scores, scores.t())) / 2

        images = torch.cat((features, features[negatives[0]], features))
        pairs, pair_mask = torch.cat((ids, ids, ids[negatives[1]])), torch.cat((mask, mask, mask[negatives[1]]))
        matched = q(
            query_embeds=m.embeddings(input_ids=pairs, query_embeds=m.query_tokens.expand(3 * batch, -1, -1)),
            query_length=QUERIES,
            attention_mask=torch.cat((pair_mask.new_ones(3 * batch, QUERIES), pair_mask), dim=1),
            encoder_hidden_states=images,
        ).last_hidden_state[:, :QUERIES]
        labels = torch.tensor([1] * batch + [0] * 2 * batch, device=ids.device)
        itm = F.cross_entropy(m.itm_head(matched).mean(dim=1), labels)
        return itc + itm + self._generation(ids, mask, kept)

    def _generation(self, ids: Tensor, mask: Tensor, kept: list[Tensor]) -> Tensor:
        """Text after the queries' keys and values of the contrast pass, causally."""
        m, q, batch = self.model, self.model.qformer, len(ids)
        ids = torch.cat((torch.full_like(ids[:, :1], 30522), ids[:, 1:]), dim=1)
        x = q.dropout(q.layernorm(m.embeddings(input_ids=ids)))
        causal = mask.new_ones(TEXT, TEXT).tril().bool()
        causal = torch.cat((causal.new_ones(TEXT, QUERIES), causal), dim=1)
        visible = torch.cat((mask.new_ones(batch, QUERIES), mask), dim=1).bool()
        for i, layer in enumerate(q.encoder.layer):
            attention = layer.attention.attention
            parts = attention.query(x), attention.key(x), attention.value(x), *kept[2 * i : 2 * i + 2]
            queries, k, v, old_k, old_v = (y.unflatten(-1, (-1, 64)).transpose(1, 2) for y in parts)
            attended = F.scaled_dot_product_attention(
                queries, torch.cat((old_k, k), 2), torch.cat((old_v, v), 2), causal & visible[:, None, None]
            )
            x = layer.feed_forward_chunk(layer.attention.output(attended.transpose(1, 2).flatten(2), x))
        scores = self.head(x, m.embeddings.word_embeddings.weight)
        targets = ids.masked_fill(mask == 0, -100)
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), label_smoothing=0.1)


def stage1_macs(batch: int) -> int:
    """Of a forward pass that projects each image once and computes no padding: 4 B query rows, 5 text rows a token."""
    return batch * (IMAGE_MACS + 4 * QUERY_MACS) + 5 * sum(caption_lengths(batch)) * TEXT_MACS // TEXT


CROSS = LAYERS // 2
SELF_WEIGHTS, FFN_WEIGHTS, KV_WEIGHTS = 4 * DIM * DIM, 2 * DIM * FFN, 2 * VISION * DIM
QUERY_MACS = QUERIES * (LAYERS * (SELF_WEIGHTS + FFN_WEIGHTS) + CROSS * 2 * DIM * DIM)
IMAGE_MACS = PATCHES * CROSS * KV_WEIGHTS
TEXT_MACS = TEXT * LAYERS * (SELF_WEIGHTS + FFN_WEIGHTS)
QFORMER_WEIGHTS = LAYERS * (SELF_WEIGHTS + FFN_WEIGHTS) + CROSS * (2 * DIM * DIM + KV_WEIGHTS)
DECODER_WEIGHTS = LAYERS * (SELF_WEIGHTS + FFN_WEIGHTS + 2 * DIM * DIM) + DIM * 30524


# Weights alone take 0.05 ms of an H200's bandwidth.
QFORMER_GPU = {1: Goals({HF: 10.0, COMPILED: 1.0}, max_ms=0.2), 64: Goals({COMPILED: 1.3})}


def _register(gpu: bool) -> None:
    for dtype in DTYPES:
        common: dict[str, Any] = {"dtype": dtype}
        # Twelve layers take 20 seconds or so to compile, and a GPU's whole run has 200: only what has a goal or stands for
        # a block is compiled. Matching is the Q-Former again, and a step of stage 1 is three of it with a backward each.
        compiled = dtype == torch.bfloat16
        for batch in (1, 8, 64) if gpu and compiled else (1, 8):
            goals = QFORMER_GPU.get(batch, NO_GOALS) if compiled else NO_GOALS
            register(
                Workload(
                    name=f"blip2.qformer.forward.batch_{batch}.{SHORT[dtype]}",
                    block="Q-Former",
                    model="BLIP-2",
                    shape={"batch": batch, "queries": QUERIES, "patches": PATCHES, "dim": DIM, "vision_dim": VISION},
                    direction="forward",
                    build=functools.partial(build_qformer, batch=batch, dtype=dtype, compiled=bool(goals)),
                    nbytes=(QFORMER_WEIGHTS + batch * PATCHES * VISION) * dtype.itemsize,
                    flops=2 * batch * (QUERY_MACS + IMAGE_MACS),
                    goals=Goals({HF: 1.15}),
                    gpu_goals=goals,
                    **common,
                )
            )
        register(
            Workload(
                name=f"blip2.matching.16_texts.{SHORT[dtype]}",
                block="Q-Former, one image with 16 texts",
                model="BLIP-2",
                shape={"texts": 16, "tokens": TEXT, "queries": QUERIES, "patches": PATCHES, "dim": DIM},
                direction="forward",
                build=functools.partial(build_matching, texts=16, dtype=dtype),
                nbytes=(QFORMER_WEIGHTS + LAYERS * FFN_WEIGHTS + PATCHES * VISION) * dtype.itemsize,
                flops=2 * (16 * (QUERY_MACS + TEXT_MACS) + IMAGE_MACS),
                goals=Goals({HF: 1.4}),
                **common,
            )
        )
        register(
            Workload(
                name=f"blip.captioning.decode.3_beams.{SHORT[dtype]}",
                block="captioning decoder, 3 beams",
                model="BLIP (ViT-B/384)",
                shape={"beams": 3, "patches": 577, "dim": DIM, "layers": LAYERS},
                direction="decode",
                build=functools.partial(build_captioning, beams=3, dtype=dtype, compiled=compiled),
                nbytes=(DECODER_WEIGHTS + LAYERS * 2 * 577 * DIM) * dtype.itemsize,
                flops=2 * 3 * DECODER_WEIGHTS,
                goals=Goals({EAGER: 1.2}),
                gpu_goals=Goals({COMPILED: 1.0}) if compiled else NO_GOALS,
                **common,
            )
        )
        for batch in (4, 8):
            register(
                Workload(
                    name=f"blip2.stage1.step.batch_{batch}.{SHORT[dtype]}",
                    block="first stage: contrast, matching, generation",
                    model="BLIP-2",
                    shape={"batch": batch, "tokens": TEXT, "queries": QUERIES, "patches": PATCHES, "dim": DIM},
                    direction="backward",
                    build=functools.partial(build_stage1, batch=batch, dtype=dtype),
                    nbytes=(QFORMER_WEIGHTS + LAYERS * FFN_WEIGHTS) * 3 * dtype.itemsize,
                    flops=3 * 2 * stage1_macs(batch),
                    goals=Goals({SEPARATE: 1.25}),
                    **common,
                )
            )


_register(torch.cuda.is_available())

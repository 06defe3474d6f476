"""BLIP-2's first stage: one Q-Former, three objectives (arXiv 2301.12597, section 3.2).

Contrast (ITC) compares queries that saw the image with text that did not; matching (ITM) classifies pairs, seen together;
generation (ITG) predicts a caption from the queries. The objectives differ only in who sees whom, so they share work: the
image's keys and values are projected once for all of them and for every pair that reads the image, and generation reads
the queries' keys and values that contrast made, because queries never see the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2ForImageTextRetrieval

from .. import ops
from ..families import state_of
from ..families._qformer_style import embed, layers_of, run_layers
from ..fusion import fuse
from ..kernels.attention import Mask
from ..modules import children
from ..modules.qformer_projections import absorbs, project_images
from ..modules.qformer_spec import LayerCall, Stacks
from ..modules.rows import Parts
from .text_decoder import decode_text

IGNORED = -100


class LanguageModelHead(nn.Module):
    """BERT's head over text rows: LN(gelu(dense(x))) W^T + b, where W is the word embedding."""

    def __init__(self, dim: int, vocabulary: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """x [..., D] and word embeddings [V, D] to scores [..., V]."""
        x = children.norm_linear(x, None, self.dense, activation="gelu")
        return ops.norm_linear(children.normalize(x, self.norm), words, self.bias)


@dataclass(eq=False)
class Images:
    """Unique images, ready for any number of passes.

    Attributes:
        features: [I, M, D_image].
        keys_values: for each layer the projections [I, M, 2 D], or None where the layer makes its own.
        absorbed: the queries are all that will read them, and do so without keys and values.
        stacks: stacked weights that the passes of one step share.
    """

    features: Tensor
    keys_values: Sequence[Tensor | None]
    absorbed: bool
    stacks: Stacks | None


class Blip2Stage1(nn.Module):
    """A `Blip2ForImageTextRetrieval` with a language-model head, for training with all three objectives.

    Args:
        retrieval: holds vision model, Q-Former, embeddings and heads, and is fused in place. The Q-Former needs text input.
        bos_token_id: [DEC], which stands for the first token of a text that is to be generated.
        eos_token_id: [SEP], which ends one.
        temperature: of the contrast, learned.
        label_smoothing: of contrast and generation.

    Shapes: I images of M tokens, B texts of T tokens (padded on the right), Lq queries.

    Raises:
        ValueError: a Q-Former without text input, or ids beyond its vocabulary.
    """

    def __init__(
        self,
        retrieval: Blip2ForImageTextRetrieval,
        *,
        bos_token_id: int,
        eos_token_id: int,
        temperature: float = 0.07,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        config = retrieval.config.qformer_config
        if not config.use_qformer_text_input:
            raise ValueError("stage 1 reads text: build the Q-Former with use_qformer_text_input=True in its config")
        if max(bos_token_id, eos_token_id) >= config.vocab_size:
            raise ValueError(
                f"bos_token_id is {bos_token_id} and eos_token_id {eos_token_id}, but the Q-Former's vocabulary has "
                f"{config.vocab_size} words; give [DEC] a row of its own (BERT's 30522 plus one)"
            )
        if state_of(retrieval.qformer) is None:
            fuse(retrieval)
        self.retrieval = retrieval
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, config.layer_norm_eps)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.label_smoothing = label_smoothing

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Features [I, M, D_image] of images [I, C, H, W]: keep them where images are seen again."""
        features: Tensor = self.retrieval.vision_model(pixel_values=pixel_values).last_hidden_state
        return features

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        *,
        features: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a training step; text b describes image b.

        Args:
            input_ids: [B, T], beginning with [CLS] and padded on the right.
            attention_mask: [B, T], 1 for a token and 0 for padding.
            pixel_values: [B, C, H, W], or `features` [B, M, D_image] in their place.
            negatives: for each text a wrong image, and for each image a wrong text, [B] int64 each; default: drawn by
                similarity, as section 3.2 of the paper has it.

        Returns:
            "loss", the sum of "itc", "itm" and "itg".

        Raises:
            ValueError: a missing or misshapen mask, other than one text an image, or fewer than two pairs.
        """
        self._check_text(input_ids, attention_mask)
        # A checkpointed layer makes its weights anew in backward, and must not meet those of the forward pass.
        checkpointed = any(layer.gradient_checkpointing for layer in self.retrieval.qformer.encoder.layer)
        images = self._images(pixel_values, features, None if checkpointed and self.training else Stacks())
        text = _right_padded(attention_mask)
        share = self._share(images, input_ids, text)
        words = self._look_up(input_ids, text, start=True)
        queries, captions, first = self._separate_passes(images, words, text)
        to_text, to_image = self._similarities(queries, first)
        itc = self._contrast(to_text, to_image, share.start)
        if negatives is None:
            negatives = self._draw_negatives(to_text.detach(), to_image.detach(), share.start)
        itm = self._match_with(images, words[:-1], text, input_ids, negatives, share)
        labels = input_ids.flatten().index_select(0, text.places[text.texts :])
        itg = self._caption_loss(captions, labels, share)
        return {"loss": itc + itm + itg, "itc": itc, "itm": itm, "itg": itg}

    def similarity(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        *,
        features: Tensor | None = None,
    ) -> Tensor:
        """Cosine similarity [I, B] of every image with every text, by the best query (`use_image_text_matching_head=False`)."""
        self._check_text(input_ids, attention_mask)
        images = self._images(pixel_values, features, once=True)
        words = self.retrieval.embeddings(input_ids=input_ids)
        return self._similarity(self._query_pass(images)[0], self._text_pass(words, attention_mask, None))

    def match(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        *,
        features: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Matching scores [B, 2] (no, yes) of texts with images, each of which is projected once.

        Args:
            input_ids, attention_mask: [B, T].
            pixel_values: [I, C, H, W], or `features` [I, M, D_image].
            image_index: [B], the image of each text; default: text b has image b // (B / I).
        """
        self._check_text(input_ids, attention_mask)
        images = self._images(pixel_values, features)
        return self._match(images, self.retrieval.embeddings(input_ids=input_ids), attention_mask, image_index)

    @torch.no_grad()
    def generate_text(
        self,
        pixel_values: Tensor | None = None,
        *,
        features: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Caption images: greedy, beams, sampling, whatever transformers' `generate` offers.

        The image is read once, by the queries; each step reads their keys and values, one copy however many beams.

        Args:
            pixel_values: [I, C, H, W], or `features` [I, M, D_image].
            prompt_ids: [I, P] tokens to continue, without padding and without [DEC], which comes first.
            **generate_kwargs: `max_new_tokens`, `num_beams`, ...

        Returns:
            what `generate` returns: ids [I * sequences, 1 + P + new], [DEC] first.
        """
        images = self._images(pixel_values, features, once=True)
        _, past = self._query_pass(images, keep=True)
        start = torch.full((images.features.shape[0], 1), self.bos_token_id, device=images.features.device)
        if prompt_ids is not None:
            if prompt_ids.ndim != 2 or prompt_ids.shape[0] != start.shape[0]:
                raise ValueError(
                    f"prompt_ids has shape {tuple(prompt_ids.shape)}; expected [{start.shape[0]}, P], a prompt an image"
                )
            start = torch.cat((start, prompt_ids.to(start.device)), dim=1)
        return decode_text(self, past, start, **generate_kwargs)

    # The passes. Each embeds its rows, runs all layers, and computes of the last one only the rows that are read.

    def _images(
        self,
        pixel_values: Tensor | None,
        features: Tensor | None,
        stacks: Stacks | None = None,
        *,
        once: bool = False,
    ) -> Images:
        """Features and what is projected of them; `once`: a single query pass is all that will read the images."""
        if (pixel_values is None) == (features is None):
            raise ValueError("pass either pixel_values or features, the images' features from encode_images")
        if features is None:
            assert pixel_values is not None
            features = self.encode_images(pixel_values)
        qformer = self.retrieval.qformer
        layers, features = layers_of(qformer), features.to(qformer.layernorm.weight.dtype)
        queries = self._queries(features.shape[0])
        if once and absorbs(layers, queries, features, queries.shape[1]):
            return Images(features, [None] * len(layers), True, stacks)
        return Images(features, project_images(layers, qformer._mllm_fast, features, stacks), False, stacks)

    def _embed(self, x: Tensor) -> Tensor | Parts:
        qformer = self.retrieval.qformer
        return embed(qformer, x, qformer.layernorm, qformer.dropout)

    def _queries(self, rows: int) -> Tensor:
        queries: Tensor = self.retrieval.query_tokens.expand(rows, -1, -1)
        return queries

    def _query_pass(self, images: Images, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Queries that read their image [I, Lq, D], and the keys and values of their self-attention."""
        queries = self._queries(images.features.shape[0])
        x = self._embed(queries)
        call = LayerCall(queries.shape[1], absorbed=images.absorbed, keep=keep, stacks=images.stacks)
        return run_layers(self.retrieval.qformer, x, images.features, images.keys_values, call)

    def _words(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of texts [B, T, D], and of [DEC] in the place of their first token [B, 1, D]: one look-up a step."""
        rows, length = input_ids.shape
        ids = torch.cat((input_ids, input_ids.new_full((rows, 1), self.bos_token_id)), dim=1)
        positions = torch.arange(length + 1, device=input_ids.device).fmod(length).unsqueeze(0)
        words = self.retrieval.embeddings(input_ids=ids, position_ids=positions)
        return words[:, :-1], words[:, -1:]

    def _text_pass(self, words: Tensor, attention_mask: Tensor, stacks: Stacks | None) -> Tensor:
        """The first row [B, D] of embedded texts [B, T, D] that see no image."""
        x = self._embed(words)
        call = LayerCall(0, Mask(key_padding=attention_mask.bool()), stacks=stacks)
        none = [None] * len(self.retrieval.qformer.encoder.layer)
        return run_layers(self.retrieval.qformer, x, None, none, call, rows=1)[0][:, 0]

    def _match(self, images: Images, words: Tensor, attention_mask: Tensor, image_index: Tensor | None) -> Tensor:
        """Matching scores [B, 2]: queries and text see each other, and the queries their image."""
        queries = self._queries(words.shape[0])
        count = queries.shape[1]
        x = self._embed(torch.cat((queries.to(words.dtype), words), dim=1))
        visible = F.pad(attention_mask.bool(), (count, 0), value=True)
        call = LayerCall(count, Mask(key_padding=visible), image_index=image_index, stacks=images.stacks)
        hidden, _ = run_layers(self.retrieval.qformer, x, images.features, images.keys_values, call, rows=count)
        head = self.retrieval.itm_head
        return head(hidden.to(head.weight.dtype)).mean(dim=1)

    def _generation_pass(self, past: Sequence[Tensor], words: Tensor, stacks: Stacks | None = None) -> Tensor:
        """Causal text [B, T, D], embedded, that sees the queries' keys and values, for each layer [B, Lq, 2 D]."""
        x = self._embed(words)
        call = LayerCall(0, Mask(causal=True), past=True, stacks=stacks)
        return run_layers(self.retrieval.qformer, x, None, past, call)[0]

    # The objectives.

    def _similarity(self, queries: Tensor, text: Tensor) -> Tensor:
        """Cosine of every image's best query and every text, [I, B]."""
        project = self.retrieval.vision_projection, self.retrieval.text_projection
        image = F.normalize(project[0](queries.to(project[0].weight.dtype)), dim=-1)
        text = F.normalize(project[1](text.to(project[1].weight.dtype)), dim=-1)
        return (image @ text.t()).amax(dim=1)

    def _contrast(self, similarity: Tensor) -> Tensor:
        scores = similarity / self.temperature
        target = torch.arange(scores.shape[0], device=scores.device)
        losses = [F.cross_entropy(s, target, label_smoothing=self.label_smoothing) for s in (scores, scores.t())]
        return (losses[0] + losses[1]) / 2

    def _draw_negatives(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """For each text a wrong image, for each image a wrong text, [B] each: the more alike, the likelier."""
        scores = (similarity / self.temperature.detach()).float()
        scores = scores.masked_fill(torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device), -10000.0)
        image, text = (torch.multinomial(F.softmax(s, dim=1), 1).squeeze(1) for s in (scores.t(), scores))
        return image, text

    def _match_with(
        self, images: Images, words: Tensor, attention_mask: Tensor, negatives: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Cross entropy over (image, text), (wrong image, text) and (image, wrong text)."""
        own = torch.arange(words.shape[0], device=words.device)
        wrong_image, wrong_text = negatives
        image_index, text_index = torch.cat((own, wrong_image, own)), torch.cat((own, own, wrong_text))
        # Neighbours whose texts are equally long have one mask, and the reference attention takes them together.
        order = attention_mask.sum(dim=1)[text_index].argsort(stable=True)
        image_index, text_index = image_index[order], text_index[order]
        scores = self._match(images, words[text_index], attention_mask[text_index], image_index)
        return F.cross_entropy(scores, (image_index == text_index).long())

    def _generate_loss(self, past: Sequence[Tensor], words: Tensor, labels: Tensor, stacks: Stacks | None) -> Tensor:
        """Cross entropy of the labels [B, T], over the rows of words [B, T, D] that have one."""
        hidden = self._generation_pass(past, words, stacks)
        supervised = labels != IGNORED
        scores = self.lm_head(hidden[supervised], self.retrieval.embeddings.word_embeddings.weight)
        return F.cross_entropy(scores, labels[supervised], label_smoothing=self.label_smoothing)

    def _check_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if attention_mask is None or attention_mask.shape != input_ids.shape:
            given = "missing" if attention_mask is None else f"of shape {tuple(attention_mask.shape)}"
            raise ValueError(
                f"attention_mask is {given}; expected {tuple(input_ids.shape)} as input_ids has, 1 for a token and 0 for "
                "padding"
            )

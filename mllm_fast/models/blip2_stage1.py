"""BLIP-2's first stage: one Q-Former, three objectives (arXiv 2301.12597, section 3.2).

Contrast (ITC) compares queries that saw the image with text that did not; matching (ITM) classifies pairs, seen together;
generation (ITG) predicts a caption from the queries. The objectives differ only in who sees whom, so they share work: the
image's keys and values are projected once for all of them and for every pair that reads the image; generation reads the
queries' keys and values that contrast made, because queries never see the text; so contrast and generation go through the
layers together, and a step is two passes; and no row of padding is computed.
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
from ..modules import children
from ..modules.qformer_projections import absorbs, project_images
from ..modules.qformer_spec import LayerCall, Stacks
from ..modules.rows import Parts
from .contrast import Share, contrast, hard_negatives, similarities
from .gathering import gathered
from .packed_text import PackedText, attend_apart, attend_together
from .stage1_passes import check_pairs, check_text, explicit_losses
from .text_decoder import decode_text


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
            Unfused, `forward` runs upstream's modules, every pass by itself; the other methods need the drop-ins.
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
        across_processes: bool = True,
    ) -> dict[str, Tensor]:
        """The losses of a training step; text b describes image b.

        Under `torch.distributed`, contrast and negatives reach over the pairs of all processes, and the mean of the losses
        (and of the gradients, as `DistributedDataParallel` takes it) is what one process would get for all pairs.

        Args:
            input_ids: [B, T], beginning with [CLS] and padded on the right.
            attention_mask: [B, T], 1 for a token and 0 for padding.
            pixel_values: [B, C, H, W], or `features` [B, M, D_image] in their place.
            negatives: for each text a wrong image, and for each image a wrong text, [B] int64 each; default: drawn by
                similarity, as section 3.2 of the paper has it. With several processes these count through the pairs of all.
            across_processes: whether to make use of the other processes; if so, all have to call this, with equally many
                pairs. Texts may be padded to different lengths.

        Returns:
            "loss", the sum of "itc", "itm" and "itg".

        Raises:
            ValueError: a missing or misshapen mask, padding elsewhere than on the right, other than one text an image,
                fewer than two pairs, or a different number in another process.
        """
        check_text(input_ids, attention_mask)
        if state_of(self.retrieval.qformer) is None:
            features = self._features(pixel_values, features)
            return explicit_losses(self, input_ids, attention_mask, features, negatives, across_processes)
        # A checkpointed layer makes its weights anew in backward, and must not meet those of the forward pass.
        checkpointed = any(layer.gradient_checkpointing for layer in self.retrieval.qformer.encoder.layer)
        images = self._images(pixel_values, features, None if checkpointed and self.training else Stacks())
        text = PackedText.right_padded(attention_mask)
        check_pairs(images.features, text)
        predicted = text.tokens - text.texts
        share = Share.of(text.texts, input_ids.shape[1], predicted, input_ids.device, across_processes)
        words = self._look_up(input_ids, text, start=True)
        queries, captions, first = self._separate_passes(images, words, text)
        to_text, to_image = self._similarities(queries, first, share.processes > 1)
        scores = to_text / self.temperature, to_image / self.temperature
        itc = contrast(scores, share.start, self.label_smoothing)
        if negatives is None:
            negatives = hard_negatives(scores, share.start)
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
        check_text(input_ids, attention_mask)
        images = self._images(pixel_values, features, once=True)
        text = PackedText.right_padded(attention_mask)
        return self._similarities(self._query_pass(images)[0], self._text_pass(self._look_up(input_ids, text), text))[0]

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
        check_text(input_ids, attention_mask)
        images, text = self._images(pixel_values, features), PackedText.of(attention_mask)
        return self._match(images, self._look_up(input_ids, text), text, image_index)

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
        features, qformer = self._features(pixel_values, features), self.retrieval.qformer
        if state_of(qformer) is None:
            raise ValueError(
                "the Q-Former was unfused; only a step's losses are computed without mllm_fast.fuse(model)"
            )
        layers, features = layers_of(qformer), features.to(qformer.layernorm.weight.dtype)
        queries = self._queries(features.shape[0])
        if once and absorbs(layers, queries, features, queries.shape[1]):
            return Images(features, [None] * len(layers), True, stacks)
        return Images(features, project_images(layers, qformer._mllm_fast, features, stacks), False, stacks)

    def _features(self, pixel_values: Tensor | None, features: Tensor | None) -> Tensor:
        if (pixel_values is None) == (features is None):
            raise ValueError("pass either pixel_values or features, the images' features from encode_images")
        if features is not None:
            return features
        assert pixel_values is not None
        return self.encode_images(pixel_values)

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

    def _look_up(self, input_ids: Tensor, text: PackedText, start: bool = False) -> Tensor:
        """Embeddings of the tokens [N, D]; with `start` also of [DEC] as a first token, [N + 1, D]."""
        ids, positions = input_ids.flatten().index_select(0, text.places), text.positions
        if start:
            ids, positions = F.pad(ids, (0, 1), value=self.bos_token_id), F.pad(positions, (0, 1))
        words: Tensor = self.retrieval.embeddings(input_ids=ids[None], position_ids=positions[None])[0]
        return words

    def _separate_passes(self, images: Images, words: Tensor, text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        """Contrast and generation layer by layer together, because generation reads what the queries of contrast are.

        Args:
            words: embeddings of the tokens and of [DEC], [N + 1, D].

        Returns:
            queries that read their image [I, Lq, D]; causal text that sees the queries of its image, [N - B, D], a row for
            each token but the first, which it predicts; and the first row [B, D] of texts that see no image.
        """
        captions, texts = text.shifted(), text.texts
        # The token before each that is predicted: [DEC], which is the last of the words, stands before the second one.
        before = F.pad(text.slots.view(text.mask.shape)[:, 1:-1], (1, 0), value=text.tokens)
        before = before.flatten().index_select(0, captions.places)
        queries = self._queries(texts).to(words.dtype).flatten(0, 1)
        x = self._embed(torch.cat((queries, words.index_select(0, before), words[:-1])).unsqueeze(0))
        rows = queries.shape[0]
        attend = attend_apart(rows, text, captions)
        call = LayerCall(rows, attend=attend, sequences=texts, stacks=images.stacks)
        count = rows + captions.tokens + texts
        hidden, _ = run_layers(self.retrieval.qformer, x, images.features, images.keys_values, call, rows=count)
        queries, caption_rows, first = hidden[0].split((rows, captions.tokens, texts))
        return queries.unflatten(0, (texts, -1)), caption_rows, first

    def _text_pass(self, words: Tensor, text: PackedText) -> Tensor:
        """The first row [B, D] of texts that see no image, from their embedded tokens [N, D]."""
        call = LayerCall(0, attend=attend_apart(0, text))
        none = [None] * len(self.retrieval.qformer.encoder.layer)
        x = self._embed(words.unsqueeze(0))
        return run_layers(self.retrieval.qformer, x, None, none, call, rows=text.texts)[0][0]

    def _match(self, images: Images, words: Tensor, text: PackedText, image_index: Tensor | None) -> Tensor:
        """Matching scores [B, 2]: queries and text see each other, and the queries their image."""
        queries = self._queries(text.texts)
        count, rows = queries.shape[1], text.texts * queries.shape[1]
        x = self._embed(torch.cat((queries.to(words.dtype).flatten(0, 1), words)).unsqueeze(0))
        attend = attend_together(text, count)
        call = LayerCall(rows, image_index=image_index, attend=attend, sequences=text.texts, stacks=images.stacks)
        hidden, _ = run_layers(self.retrieval.qformer, x, images.features, images.keys_values, call, rows=rows)
        head = self.retrieval.itm_head
        return head(hidden[0].unflatten(0, (-1, count)).to(head.weight.dtype)).mean(dim=1)

    # The objectives.

    def _similarities(self, queries: Tensor, text: Tensor, across: bool = False) -> tuple[Tensor, Tensor]:
        """`similarities` of queries [I, Lq, D] and texts [B, D], projected."""
        project = self.retrieval.vision_projection, self.retrieval.text_projection
        image = F.normalize(project[0](queries.to(project[0].weight.dtype)), dim=-1)
        text = F.normalize(project[1](text.to(project[1].weight.dtype)), dim=-1)
        return similarities(image, text, across)

    def _match_with(
        self,
        images: Images,
        words: Tensor,
        text: PackedText,
        input_ids: Tensor,
        negatives: tuple[Tensor, Tensor],
        share: Share,
    ) -> Tensor:
        """Cross entropy over (image, text), (wrong image, text) and (image, wrong text)."""
        own = torch.arange(text.texts, device=words.device)
        wrong_image, wrong_text = negatives
        everybody = own + share.start
        right = torch.cat((everybody, wrong_image, everybody)) == torch.cat((everybody, everybody, wrong_text))
        if share.processes > 1:
            images, wrong_image = self._with_others_images(images, wrong_image, share)
            words, text, wrong_text = self._with_others_texts(words, text, input_ids, wrong_text, share)
        image_index, text_index = torch.cat((own, wrong_image, own)), torch.cat((own, own, wrong_text))
        # Neighbours whose texts are equally long have one mask, and the reference attention takes them together.
        order = text.mask.sum(dim=1)[text_index].argsort(stable=True)
        chosen, rows = text.chosen(text_index[order])
        scores = self._match(images, words.index_select(0, rows), chosen, image_index[order])
        return F.cross_entropy(scores, right[order].long())

    def _with_others_images(self, images: Images, wrong: Tensor, share: Share) -> tuple[Images, Tensor]:
        """These images and after them those of other processes that are among `wrong` [B], and where `wrong` then are."""
        features = gathered(images.features)
        foreign = wrong[(wrong < share.start) | (wrong >= share.start + share.pairs)].unique()
        if not foreign.shape[0] and features.requires_grad:
            # Backward, too, is a collective: each process has to come by.
            foreign = wrong.new_tensor([(share.start + share.pairs) % features.shape[0]])
        place = torch.searchsorted(foreign, wrong) + share.pairs
        place = torch.where(torch.isin(wrong, foreign), place, wrong - share.start)
        if not foreign.shape[0]:
            return images, place
        others = self._images(None, features.index_select(0, foreign), images.stacks)
        keys_values = [
            None if a is None or b is None else torch.cat((a, b))
            for a, b in zip(images.keys_values, others.keys_values, strict=True)
        ]
        return Images(torch.cat((images.features, others.features)), keys_values, False, images.stacks), place

    def _with_others_texts(
        self, words: Tensor, text: PackedText, input_ids: Tensor, wrong: Tensor, share: Share
    ) -> tuple[Tensor, PackedText, Tensor]:
        """The words, these texts and after them those of all processes that are `wrong` [B], and where `wrong` then are."""
        both = torch.stack((input_ids, text.mask.to(input_ids.dtype)), dim=1)
        ids, mask = gathered(F.pad(both, (0, share.length - input_ids.shape[1])))[wrong].unbind(1)
        others = PackedText.of(mask)
        place = torch.arange(text.texts, text.texts + others.texts, device=wrong.device)
        return torch.cat((words, self._look_up(ids, others))), text.beside(others), place

    def _caption_loss(self, rows: Tensor, labels: Tensor, share: Share) -> Tensor:
        """Cross entropy of the labels [N] for the rows [N, D], averaged over the tokens of all processes."""
        scores = self.lm_head(rows, self.retrieval.embeddings.word_embeddings.weight)
        if share.processes == 1:
            return F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)
        total = F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing, reduction="sum")
        return total * (share.processes / share.supervised)

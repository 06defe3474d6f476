"""BLIP's pretraining: a mixture of encoder and decoder with three objectives (arXiv 2201.12086, section 3.2).

Contrast (ITC) compares the image's and the text's first row, against queues of features from momentum encoders; matching
(ITM) classifies pairs, the hard negatives among them, with the image-grounded encoder; language modelling (LM) predicts the
caption with the image-grounded decoder. The two text models share everything but their self-attention. `BLIP_Pretrain` of
salesforce/BLIP is the original; transformers has none.

All 3 B pairs of the matching read the B images by index, so the keys and values of an image are projected once for them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipConfig
from transformers.models.blip.modeling_blip import BlipForConditionalGeneration, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from ..fusion import fuse
from .gathering import gathered
from .original_checkpoint import KeyMap, load_strictly, read_checkpoint

# The original keeps the learned temperature within these.
TEMPERATURES = (0.001, 0.5)

_VISION = tuple(
    (rf"^visual_encoder(_m)?\.{ours}", rf"vision_model\1.{theirs}")
    for ours, theirs in (
        (r"cls_token$", "embeddings.class_embedding"),
        (r"pos_embed$", "embeddings.position_embedding"),
        (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\2.layer_norm\3."),
        (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\2.self_attn.projection."),
        (r"blocks\.(\d+)\.attn\.", r"encoder.layers.\2.self_attn."),
        (r"blocks\.(\d+)\.", r"encoder.layers.\2."),
        (r"norm\.", "post_layernorm."),
    )
)
_NAMES = KeyMap.of(
    *_VISION,
    (r"^vision_proj", "vision_projection"),
    (r"^text_proj", "text_projection"),
    (r"^temp$", "temperature"),
    dropped=r"position_ids$",
)


class BlipPretraining(nn.Module):
    """Vision model, shared text models, heads, momentum copies and queues.

    Args:
        config: of the vision and the text model; `image_text_hidden_size` is the width of the contrast.
        encoder_token_id: [ENC], which stands for the first token of a text that is to be matched.
        bos_token_id: [DEC], which stands for the first token of a text that is to be generated.
        queue_size: how many features of earlier batches serve as negatives.
        momentum: of the momentum encoders.
        temperature: of the contrast, learned, kept within `TEMPERATURES`.
        label_smoothing: of language modelling.
        fused: whether to put the drop-ins in.

    Shapes: B images, B texts of T tokens (padded on the right), d = `image_text_hidden_size`, K = `queue_size`.

    Raises:
        ValueError: ids beyond the vocabulary.
    """

    image_queue: Tensor
    text_queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        config: BlipConfig,
        *,
        encoder_token_id: int,
        bos_token_id: int,
        queue_size: int = 57600,
        momentum: float = 0.995,
        temperature: float = 0.07,
        label_smoothing: float = 0.1,
        fused: bool = True,
    ) -> None:
        super().__init__()
        text, width = config.text_config, config.image_text_hidden_size
        if max(encoder_token_id, bos_token_id) >= text.vocab_size:
            raise ValueError(
                f"encoder_token_id is {encoder_token_id} and bos_token_id {bos_token_id}, but the text model's vocabulary "
                f"has {text.vocab_size} words; give [ENC] and [DEC] rows of their own (BERT's 30522 plus two)"
            )
        self.config = config
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(text)
        self._share()
        self.vision_projection = nn.Linear(config.vision_config.hidden_size, width)
        self.text_projection = nn.Linear(text.hidden_size, width)
        self.itm_head = nn.Linear(text.hidden_size, 2)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        for name in ("vision_model", "text_encoder", "vision_projection", "text_projection"):
            self.add_module(f"{name}_m", copy.deepcopy(getattr(self, name)).requires_grad_(False))
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(width, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.encoder_token_id, self.bos_token_id = encoder_token_id, bos_token_id
        self.momentum, self.label_smoothing = momentum, label_smoothing
        if fused:
            fuse(self)

    def _share(self) -> None:
        """Let the decoder have the encoder's embeddings, cross-attention and feed-forward networks."""
        ours, theirs = self.text_encoder, self.text_decoder.bert
        theirs.embeddings = ours.embeddings
        for mine, other in zip(ours.encoder.layer, theirs.encoder.layer, strict=True):
            other.crossattention, other.intermediate, other.output = mine.crossattention, mine.intermediate, mine.output
        head = self.text_decoder.cls.predictions
        head.decoder.weight, head.decoder.bias = ours.embeddings.word_embeddings.weight, head.bias

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        *,
        alpha: float = 0.4,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a training step; text b describes image b. Updates momentum encoders and queues in training.

        Args:
            input_ids: [B, T], beginning with [CLS] and padded on the right.
            attention_mask: [B, T], 1 for a token and 0 for padding.
            pixel_values: [B, C, H, W].
            alpha: share of the momentum encoders' opinion in the contrast's targets.
            negatives: for each text a wrong image, and for each image a wrong text, [B] int64 each; default: drawn by
                similarity.

        Returns:
            "loss", the sum of "itc", "itm" and "lm".

        Raises:
            ValueError: other than one text an image, fewer than two pairs, or more pairs than the queue holds.
        """
        pairs = input_ids.shape[0]
        if pixel_values.shape[0] != pairs or pairs < 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"got {pixel_values.shape[0]} images, texts {tuple(input_ids.shape)} and a mask "
                f"{tuple(attention_mask.shape)}; a step needs one text for each image, at least two pairs, and a mask of "
                "the texts' shape"
            )
        with torch.no_grad():
            self.temperature.clamp_(*TEMPERATURES)
        image = self.vision_model(pixel_values=pixel_values).last_hidden_state
        image_feature = self._feature(self.vision_projection, image)
        text_feature = self._feature(self.text_projection, self._text(self.text_encoder, input_ids, attention_mask))
        itc, to_text, to_image = self._contrast(
            image_feature, text_feature, pixel_values, input_ids, attention_mask, alpha
        )
        if negatives is None:
            negatives = _drawn(to_image), _drawn(to_text)
        itm = self._match(image, input_ids, attention_mask, negatives)
        lm = self._language_model(image, input_ids, attention_mask)
        return {"loss": itc + itm + lm, "itc": itc, "itm": itm, "lm": lm}

    @torch.no_grad()
    def momentum_update(self) -> None:
        """Move the momentum encoders towards the trained ones."""
        for name in ("vision_model", "text_encoder", "vision_projection", "text_projection"):
            ours, theirs = self.get_submodule(name), self.get_submodule(f"{name}_m")
            for trained, kept in zip(ours.parameters(), theirs.parameters(), strict=True):
                kept.lerp_(trained, 1.0 - self.momentum)

    def _text(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden

    def _feature(self, projection: nn.Module, hidden: Tensor) -> Tensor:
        return F.normalize(projection(hidden[:, 0]), dim=-1)

    def _contrast(
        self,
        image: Tensor,
        text: Tensor,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        alpha: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, similarities image to text [B, B], text to image [B, B]); these two without a gradient."""
        pairs = image.shape[0]
        with torch.no_grad():
            if self.training:
                self.momentum_update()
            hidden = self.vision_model_m(pixel_values=pixel_values).last_hidden_state
            image_m = self._feature(self.vision_projection_m, hidden)
            text_m = self._feature(self.text_projection_m, self._text(self.text_encoder_m, input_ids, attention_mask))
            images, texts = (
                torch.cat((new.t(), queue.clone().to(new.dtype)), dim=1)
                for new, queue in ((image_m, self.image_queue), (text_m, self.text_queue))
            )
            own = torch.eye(pairs, images.shape[1], dtype=image.dtype, device=image.device)
            targets = [
                alpha * F.softmax(feature @ others / self.temperature, dim=1) + (1 - alpha) * own
                for feature, others in ((image_m, texts), (text_m, images))
            ]
        scores = [image @ texts / self.temperature, text @ images / self.temperature]
        losses = [F.cross_entropy(score, target) for score, target in zip(scores, targets, strict=True)]
        if self.training:
            self._enqueue(image_m, text_m)
        to_text, to_image = (score.detach()[:, :pairs] for score in scores)
        return (losses[0] + losses[1]) / 2, to_text, to_image

    @torch.no_grad()
    def _enqueue(self, image: Tensor, text: Tensor) -> None:
        """Put the features of all processes into the queues, over the oldest ones."""
        image, text = gathered(image), gathered(text)
        count, size = image.shape[0], self.image_queue.shape[1]
        if count > size:
            raise ValueError(
                f"a step of {count} pairs does not fit into queues of {size}; build with a larger queue_size"
            )
        places = (self.queue_ptr + torch.arange(count, device=image.device)) % size
        self.image_queue[:, places] = image.t().to(self.image_queue.dtype)
        self.text_queue[:, places] = text.t().to(self.text_queue.dtype)
        self.queue_ptr.copy_((self.queue_ptr + count) % size)

    def _match(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, negatives: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Cross entropy over (image, text), (wrong image, text) and (image, wrong text), in one pass of 3 B rows."""
        own = torch.arange(input_ids.shape[0], device=input_ids.device)
        wrong_image, wrong_text = negatives
        image_index, text_index = torch.cat((own, wrong_image, own)), torch.cat((own, own, wrong_text))
        ids = input_ids.clone()
        ids[:, 0] = self.encoder_token_id
        hidden = self._grounded(self.text_encoder, ids[text_index], attention_mask[text_index], image, image_index)
        scores = self.itm_head(hidden[:, 0])
        return F.cross_entropy(scores, (image_index == text_index).long())

    def _grounded(
        self, model: nn.Module, ids: Tensor, mask: Tensor, image: Tensor, index: Tensor | None, **kwargs: bool
    ) -> Tensor:
        from ..families import state_of

        if index is not None and state_of(model) is None:
            image, index = image[index], None
        extra = {} if index is None else {"image_index": index}
        out = model(input_ids=ids, attention_mask=mask, encoder_hidden_states=image, **extra, **kwargs)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _language_model(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids = input_ids.clone()
        ids[:, 0] = self.bos_token_id
        hidden = self._grounded(
            self.text_decoder.bert, ids, attention_mask, image, None, is_decoder=True, use_cache=False
        )
        # Only rows whose next token is predicted meet the vocabulary. The host reads once how many there are.
        index = attention_mask[:, 1:].flatten().nonzero().squeeze(1)
        rows = hidden[:, :-1].flatten(0, 1).index_select(0, index)
        labels = ids[:, 1:].flatten().index_select(0, index)
        return F.cross_entropy(self.text_decoder.cls(rows), labels, label_smoothing=self.label_smoothing)

    def captioner(self) -> BlipForConditionalGeneration:
        """transformers' captioning model of the vision model and the decoder: to `generate`, and to `save_pretrained`.

        Its parameters are these, not copies; its mode is this one's.
        """
        config = copy.deepcopy(self.config)
        config.text_config.bos_token_id = self.bos_token_id
        with torch.device("meta"):
            model = BlipForConditionalGeneration(config)
        model.vision_model, model.text_decoder = self.vision_model, self.text_decoder
        model.training = self.training
        return model

    def load_original(self, path: str | Path) -> None:
        """Load a checkpoint of the original (`model_base.pth`), all of it or nothing.

        Args:
            path: the file; its tensors stand under "model".

        Raises:
            FileNotFoundError: there is none.
            CheckpointMismatchError: names or shapes differ; all are listed.
        """
        load_strictly(self, _NAMES.rename(read_checkpoint(path)), str(path))


def _drawn(similarity: Tensor) -> Tensor:
    """For each row of [B, B] another column, the more alike, the likelier."""
    weights = F.softmax(similarity.float(), dim=1) + 1e-4
    weights = weights.masked_fill(torch.eye(len(weights), dtype=torch.bool, device=weights.device), 0.0)
    return torch.multinomial(weights, 1).squeeze(1)

"""Generation by BLIP-2's Q-Former: transformers' `generate` over keys and values that the queries left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import ops
from ..families._qformer_style import embed, layers_of, run_layers
from ..kernels.attention import Mask
from ..modules.qformer_projections import keys_values
from ..modules.qformer_spec import LayerCall

if TYPE_CHECKING:
    from .blip2_stage1 import Blip2Stage1


def decode_text(model: Blip2Stage1, past: Sequence[Tensor], input_ids: Tensor, **generate_kwargs: Any) -> Any:
    """Continue `input_ids`.

    Args:
        past: the queries' keys and values, for each layer [I, Lq, 2 D].
        input_ids: [I, P], [DEC] first.
        **generate_kwargs: of transformers' `generate`.

    Returns:
        what `generate` returns, ids [I * sequences, P + new].
    """
    return _TextDecoder(model, past).generate(input_ids=input_ids, **generate_kwargs)


class _Config(PreTrainedConfig):
    model_type = "mllm_fast_text_decoder"


class _TextDecoder(PreTrainedModel, GenerationMixin):
    """One generation: what transformers' `generate` calls. It owns no parameters."""

    config_class = _Config
    main_input_name = "input_ids"

    def __init__(self, model: Blip2Stage1, past: Sequence[Tensor]) -> None:
        config = model.retrieval.config.qformer_config
        super().__init__(
            _Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
            )
        )
        ids = {"bos_token_id": model.bos_token_id, "eos_token_id": model.eos_token_id}
        self.generation_config = GenerationConfig(**ids, pad_token_id=config.pad_token_id)
        # In a tuple, so that the model is no child: it would be moved, counted and saved as one.
        self._whole = (model, tuple(past))

    @property
    def device(self) -> torch.device:
        """Where the queries' keys and values are."""
        return self._whole[1][0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the queries' keys and values."""
        return self._whole[1][0].dtype

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> CausalLMOutputWithPast:
        """Scores of the token after `input_ids` [B, T], which follow those in the cache."""
        model, past = self._whole
        retrieval, qformer = model.retrieval, model.retrieval.qformer
        cache = DynamicCache() if past_key_values is None else past_key_values
        start, length = cache.get_seq_length(), input_ids.shape[1]
        positions = torch.arange(start, start + length, device=input_ids.device).unsqueeze(0)
        x = retrieval.embeddings(input_ids=input_ids, position_ids=positions)
        x = embed(qformer, x, qformer.layernorm, qformer.dropout)
        layers = iter(range(len(past)))

        def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
            layer = next(layers)
            queries = keys_values(past[layer], layers_of(qformer)[layer].spec)
            k, v = (t.transpose(1, 2) for t in cache.update(k.transpose(1, 2), v.transpose(1, 2), layer))
            if length == 1:
                # Beams find their image's queries by index; all text so far is visible.
                return ops.attention(q, *queries, extra_k=k, extra_v=v)
            rows = q.shape[0] // queries[0].shape[0]
            k, v = (torch.cat((a.repeat_interleave(rows, 0), b), 1) for a, b in zip(queries, (k, v), strict=True))
            return ops.attention(q, k, v, mask=Mask(causal=True))

        x, _ = run_layers(
            qformer, x, None, [None] * len(past), LayerCall(0, attend=attend), rows=1 if length == 1 else None
        )
        logits = model.lm_head(x[:, -1:], retrieval.embeddings.word_embeddings.weight)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

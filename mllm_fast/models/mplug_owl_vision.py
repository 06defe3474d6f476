"""The parts of mPLUG-Owl that see, in plain PyTorch: the vision model, and the visual abstractor (arXiv 2304.14178).

Written from the equations of the original `modeling_mplug_owl.py`, with its parameter names, so that its checkpoints fit.
`mllm_fast.fuse` puts kernels under these classes; without it they are what the kernels are compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .mplug_owl_config import MplugOwlConfig, MplugOwlVisionConfig, MplugOwlVisualAbstractorConfig

# Of all norms of the abstractor but the one inside its feed-forward networks.
NORM_EPS = 1e-5


class MplugOwlVisionEmbeddings(nn.Module):
    """Patches, class token and positions, normalised (CLIP's norm before its first layer)."""

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embed = nn.Conv2d(
            config.num_channels, width, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Parameter(torch.randn(1, patches + 1, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [N, C, H, W] in any float dtype; returns [N, patches + 1, D], the class token first.

        Raises:
            ValueError: images of another number of channels or size.
        """
        expected = (self.patch_embed.in_channels, self.image_size, self.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected [images, {', '.join(map(str, expected))}]"
            )
        patches = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)
        return self.pre_layernorm(torch.cat((first, patches), dim=1) + self.position_embedding.to(patches.dtype))


class MplugOwlVisionAttention(nn.Module):
    """Self-attention whose one projection holds query, key and value of the first head, then of the second, and so on."""

    is_causal = False

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, head_dim(config)
        self.attention_dropout = config.attention_dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[N, L, D] -> [N, L, D], and the probabilities [N, heads, L, L] where the implementation has them."""
        qkv = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, 3, self.head_dim))
        q, k, v = qkv.transpose(1, 2).unbind(3)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        attended, probabilities = attend(
            self, q, k, v, attention_mask=None, dropout=dropout, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.dense(attended.flatten(2)), probabilities


class MplugOwlMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class MplugOwlVisionEncoderLayer(GradientCheckpointingLayer):
    """x = x + attention(norm(x)); x = x + mlp(norm(x))."""

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        self.self_attn = MplugOwlVisionAttention(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MplugOwlMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[N, L, D] -> [N, L, D]."""
        hidden_states = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0] + hidden_states
        return self.mlp(self.post_attention_layernorm(hidden_states)) + hidden_states


class MplugOwlVisionEncoder(nn.Module):
    """The layers one after another."""

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MplugOwlVisionEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutput:
        """[N, L, D] -> `last_hidden_state` [N, L, D]."""
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, **kwargs)
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class MplugOwlVisualAbstractorMLP(nn.Module):
    """w2(norm(silu(w1 x) * w3 x)): SwiGLU with a norm inside."""

    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.act = nn.SiLU()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.w2(self.ffn_ln(self.act(self.w1(hidden_states)) * self.w3(hidden_states)))


class MplugOwlVisualAbstractorMultiHeadAttention(nn.Module):
    """Attention of queries to whatever keys they are given."""

    is_causal = False

    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads, self.attention_head_size = config.num_attention_heads, head_dim(config)
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        self.value = nn.Linear(config.encoder_hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, keys: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Queries [N, n, D], keys [N, K, D] and an additive mask [N, 1, 1, K] -> [N, n, D], and the probabilities."""
        q, k, v = (
            t.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)
            for t in (self.query(hidden_states), self.key(keys), self.value(keys))
        )
        implementation = self.config._attn_implementation
        if attention_mask is not None and implementation != "eager":
            implementation = "sdpa"  # the other implementations take masks in other forms
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout, scaling = self.attention_dropout if self.training else 0.0, self.attention_head_size**-0.5
        attended, probabilities = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return attended.flatten(2), probabilities


class MplugOwlVisualAbstractorCrossOutput(nn.Module):
    """y = x + out_proj(attended); y + mlp(norm2(y))."""

    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = MplugOwlVisualAbstractorMLP(config)

    def forward(self, attended: Tensor, queries: Tensor) -> Tensor:
        """[N, n, D] twice -> [N, n, D]."""
        queries = queries + self.out_proj(attended)
        return queries + self.mlp(self.norm2(queries))


class MplugOwlVisualAbstractorAttention(nn.Module):
    """Queries read themselves and the image; what is added to is the normalised queries, not the queries."""

    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.attention = MplugOwlVisualAbstractorMultiHeadAttention(config)
        self.output = MplugOwlVisualAbstractorCrossOutput(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.normk = nn.LayerNorm(config.encoder_hidden_size, eps=NORM_EPS)

    def forward(self, queries: Tensor, image: Tensor, image_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Queries [N, n, D], image [N, M, D], image_mask [N, M] -> [N, n, D]."""
        queries = self.norm1(queries)
        keys = torch.cat((queries, self.normk(image)), dim=1)
        mask = None
        if image_mask is not None:
            seen = torch.cat((image_mask.new_ones(queries.shape[:2]), image_mask), dim=1).bool()
            mask = keys.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(keys.dtype).min)[:, None, None]
        return self.output(self.attention(queries, keys, mask, **kwargs)[0], queries)


class MplugOwlVisualAbstractorLayer(GradientCheckpointingLayer):
    """One layer: attention, and the feed-forward network in its output."""

    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.crossattention = MplugOwlVisualAbstractorAttention(config)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Queries [N, n, D], image [N, M, D] and its mask [N, M] -> [N, n, D]."""
        return self.crossattention(hidden_states, encoder_hidden_states, encoder_attention_mask, **kwargs)


class MplugOwlVisualAbstractorEncoder(nn.Module):
    """The layers one after another, all of the same image."""

    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MplugOwlVisualAbstractorLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """As the layers; `last_hidden_state` [N, n, D]."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, encoder_hidden_states, encoder_attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class MplugOwlPreTrainedModel(PreTrainedModel):
    """What the models share: initialisation, and what they tell transformers about themselves."""

    config_class = MplugOwlConfig
    base_model_prefix = "mplug_owl"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # A language model adds its own layers.
    _no_split_modules = [  # noqa: RUF012
        "MplugOwlVisionEmbeddings",
        "MplugOwlVisionEncoderLayer",
        "MplugOwlVisualAbstractorLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Buffers that older versions of transformers saved with a Llama.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"position_ids$"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MplugOwlVisionEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embedding, std=std)
        elif isinstance(module, MplugOwlVisualAbstractorModel):
            init.trunc_normal_(module.vit_eos, std=std)


class MplugOwlVisionModel(MplugOwlPreTrainedModel):
    """The vision model. All its tokens are read, after a last norm."""

    config_class = MplugOwlVisionConfig
    main_input_name = "pixel_values"
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MplugOwlVisionEncoderLayer,
        "attentions": OutputRecorder(MplugOwlVisionAttention, index=1),
    }

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = MplugOwlVisionEmbeddings(config)
        self.encoder = MplugOwlVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Images [N, C, H, W].

        Returns:
            `last_hidden_state` [N, patches + 1, D], and `pooler_output` [N, D]: the class token, normalised once more. On
            request `hidden_states` (before the last norm) and, with eager attention, `attentions`.
        """
        hidden = self.post_layernorm(self.encoder(self.embeddings(pixel_values), **kwargs).last_hidden_state)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.post_layernorm(hidden[:, 0]))

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self.embeddings


class MplugOwlVisualAbstractorModel(MplugOwlPreTrainedModel):
    """The visual abstractor: learned queries summarise an image as rows of the language model, and an end row follows.

    Args:
        language_hidden_size: width of the language model's embeddings.
    """

    config_class = MplugOwlVisualAbstractorConfig
    main_input_name = "query_embeds"
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MplugOwlVisualAbstractorLayer,
        "attentions": OutputRecorder(MplugOwlVisualAbstractorMultiHeadAttention, index=1),
    }

    def __init__(self, config: MplugOwlVisualAbstractorConfig, language_hidden_size: int) -> None:
        super().__init__(config)
        self.encoder = MplugOwlVisualAbstractorEncoder(config)
        self.visual_fc = nn.Linear(config.hidden_size, language_hidden_size)
        self.vit_eos = nn.Parameter(torch.randn(1, 1, language_hidden_size))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        query_embeds: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Summarise images.

        Args:
            query_embeds: [N, n, D]; a batch made by `expand` is known to be one row.
            encoder_hidden_states: [N, M, D] the vision model's last hidden state.
            encoder_attention_mask: [N, M], nonzero where the image is seen; None: everywhere.

        Returns:
            `last_hidden_state` [N, n + 1, D_language], and `pooler_output` [N, D]: the first query.
        """
        hidden = self.encoder(query_embeds, encoder_hidden_states, encoder_attention_mask, **kwargs).last_hidden_state
        rows = self.visual_fc(hidden)
        rows = torch.cat((rows, self.vit_eos.to(rows.dtype).expand(rows.shape[0], -1, -1)), dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=rows, pooler_output=hidden[:, 0])


def head_dim(config: MplugOwlVisionConfig | MplugOwlVisualAbstractorConfig) -> int:
    """Channels of a head.

    Raises:
        ValueError: the heads do not divide the width.
    """
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{config.num_attention_heads} heads do not divide hidden_size {config.hidden_size}")
    return int(config.hidden_size // config.num_attention_heads)

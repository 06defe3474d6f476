"""A tiny MiniGPT-4: our model, files in the original's layout, and the original's equations.

The original's code does not import on today's transformers (`apply_chunking_to_forward` is gone from it), so the reference is
derived again from its equations, in fp64, with plain torch functions on a mapping of tensors by the original's names: one
head and one sample at a time, with nothing of ours. Its language model is transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, OPTConfig, PreTrainedConfig
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mllm_fast.models.minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from tests.families.builders import randomise

# Widths and lengths that all differ, so that GEMMs can be told apart by what they contract over.
VISION, VISION_FFN, IMAGE_SIZE, PATCHES, DEPTH = 32, 56, 56, 16, 2
QFORMER, QFORMER_FFN, QFORMER_LAYERS, QUERIES, HEADS = 24, 44, 4, 3, 4
TEXT, IMAGE, VOCABULARY = 40, -1, 108

# As LLaMA's: a piece of text begins with a space of its own, "$$" and "###" are single tokens.
_PIECES = ["<unk>", "<s>", "</s>", "▁", *(chr(i) for i in range(33, 127)), "$$", "th", "▁th", "##", "###"]
_MERGES = [("t", "h"), ("▁", "th"), ("$", "$"), ("#", "#"), ("##", "#")]


def tokenizer() -> LlamaTokenizer:
    made = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(_PIECES)}, merges=_MERGES, add_bos_token=True)
    made.pad_token = "$$"  # as the original has it
    return made


PAD = _PIECES.index("$$")
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4}


def text_config(kind: str = "llama") -> PreTrainedConfig:
    if kind == "gpt2":  # its head is its embeddings
        return GPT2Config(n_embd=TEXT, n_layer=2, n_head=4, **_IDS)
    if kind == "opt":
        return OPTConfig(hidden_size=TEXT, ffn_dim=64, word_embed_proj_dim=16, **_SIZES, **_IDS)
    return LlamaConfig(hidden_size=TEXT, intermediate_size=64, num_key_value_heads=2, **_SIZES, **_IDS)


def config(kind: str = "llama", *, has_qformer: bool = True, **changes: Any) -> MiniGPT4Config:
    vision = {
        "hidden_size": VISION, "intermediate_size": VISION_FFN, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
        "image_size": IMAGE_SIZE, "patch_size": 14,
    }  # fmt: skip
    qformer = {
        "hidden_size": QFORMER, "intermediate_size": QFORMER_FFN, "num_hidden_layers": QFORMER_LAYERS,
        "num_attention_heads": HEADS,
    }  # fmt: skip
    settings = {"num_query_tokens": QUERIES, "has_qformer": has_qformer, **changes}
    return MiniGPT4Config(vision, qformer, text_config(kind), **settings)


def minigpt4(kind: str = "llama", seed: int = 0, **changes: Any) -> MiniGPT4ForConditionalGeneration:
    """With every parameter drawn, in evaluation."""
    torch.manual_seed(seed)
    model = randomise(MiniGPT4ForConditionalGeneration(config(kind, **changes)).eval(), seed)
    with torch.no_grad():
        # Of the order of the embeddings, or the images would hardly matter.
        model.language_projection.linear.weight.mul_(2)
        for name, bias in model.named_parameters():
            if name.endswith("qkv.bias"):
                bias[VISION : 2 * VISION] = 0  # keys have none in the original
    return model


def processor(style: str = "vicuna", **options: Any) -> MiniGPT4Processor:
    pictures = BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    rows = QUERIES if style == "vicuna" else PATCHES // 4
    return MiniGPT4Processor(pictures, tokenizer(), rows_per_image=rows, style=style, **options)


def inputs(rows: int = QUERIES) -> dict[str, Tensor]:
    """Four samples, padded left: two images apart; one; none; two side by side."""
    image = [IMAGE] * rows
    ids = [[1, 5, *image, 6, *image, 7, 8], [1, *image, 9, 10], [1, 12, 13, 14], [1, 15, *image, *image, 16]]
    length = max(map(len, ids))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    pixels = torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(7))
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long(), "pixel_values": pixels}


# The original's files.


def original_files(seed: int = 0, *, has_qformer: bool = True) -> dict[str, dict[str, Tensor]]:
    """The tensors of the three files, by part, with what the released ones hold beyond what is used."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        return 1.3 * scale * torch.randn(shape, generator=generator)

    def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
        return {f"{name}.weight": drawn(out, into), f"{name}.bias": drawn(out)}

    def norm(name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + drawn(size), f"{name}.bias": drawn(size)}

    vision = {
        "cls_token": drawn(1, 1, VISION), "pos_embed": drawn(1, PATCHES + 1, VISION),
        "patch_embed.proj.weight": 0.1 * drawn(VISION, 3, 14, 14), "patch_embed.proj.bias": drawn(VISION),
    }  # fmt: skip
    for i in range(DEPTH + 1):  # the released file has a layer more than is used
        at = f"blocks.{i}."
        vision |= norm(f"{at}norm1", VISION) | norm(f"{at}norm2", VISION)
        vision |= {f"{at}attn.q_bias": drawn(VISION), f"{at}attn.v_bias": drawn(VISION)}
        vision |= {f"{at}attn.qkv.weight": 1.5 * drawn(3 * VISION, VISION)} | linear(f"{at}attn.proj", VISION, VISION)
        vision |= linear(f"{at}mlp.fc1", VISION_FFN, VISION) | linear(f"{at}mlp.fc2", VISION, VISION_FFN)
    vision |= norm("norm", VISION) | linear("head", 8, VISION)

    qformer = {"query_tokens": 3 * drawn(1, QUERIES, QFORMER)} | norm("ln_vision", VISION)
    qformer |= norm("Qformer.bert.embeddings.LayerNorm", QFORMER)
    qformer |= {"Qformer.bert.embeddings.position_ids": torch.arange(16)[None]} | linear("t5_proj", 20, QFORMER)
    for i in range(QFORMER_LAYERS):
        at = f"Qformer.bert.encoder.layer.{i}."
        for block, width in (("attention", QFORMER), ("crossattention", VISION))[: 2 - i % 2]:
            qformer |= linear(f"{at}{block}.self.query", QFORMER, QFORMER)
            qformer |= linear(f"{at}{block}.self.key", QFORMER, width)
            qformer |= linear(f"{at}{block}.self.value", QFORMER, width)
            qformer |= linear(f"{at}{block}.output.dense", QFORMER, QFORMER)
            qformer |= norm(f"{at}{block}.output.LayerNorm", QFORMER)
        qformer |= linear(f"{at}intermediate_query.dense", QFORMER_FFN, QFORMER)
        qformer |= linear(f"{at}output_query.dense", QFORMER, QFORMER_FFN)
        qformer |= norm(f"{at}output_query.LayerNorm", QFORMER)

    projection = linear("llama_proj", TEXT, QFORMER if has_qformer else 4 * VISION)
    projection["llama_proj.weight"] *= 3
    projection["llama_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    return {"vision": vision, "qformer": qformer if has_qformer else {}, "projection": projection}


def write_files(folder: Path, files: Mapping[str, Mapping[str, Tensor]], language_model: Any) -> dict[str, Any]:
    """Write the files as the original and its trainers do; returns the arguments of `from_original`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(files["vision"]), folder / "eva_vit_g.pth")
    optimiser = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
    trained = {
        "model": dict(files["projection"]),
        "optimizer": optimiser,
        "config": {"run": {}},
        "scaler": None,
        "epoch": 3,
    }
    torch.save(trained, folder / "pretrained_minigpt4.pth")
    language_model.save_pretrained(folder / "llm")
    given: dict[str, Any] = {"vision": folder / "eva_vit_g.pth", "language_model": folder / "llm"}
    given |= {"projection": folder / "pretrained_minigpt4.pth"}
    if files["qformer"]:
        torch.save({"model": dict(files["qformer"])}, folder / "blip2_pretrained_flant5xxl.pth")
        given["qformer"] = folder / "blip2_pretrained_flant5xxl.pth"
    return given


def llama(seed: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return randomise(LlamaForCausalLM(text_config()).eval(), seed)


# The original's equations.


def _norm(w: Mapping[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    x = centred * (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"] if f"{name}.weight" in w else x


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].mT + w[f"{name}.bias"]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[Lq, D], [Lk, D], [Lk, D]; one head after another."""
    size = q.shape[-1] // HEADS
    heads = []
    for part in (slice(head * size, (head + 1) * size) for head in range(HEADS)):
        scores = q[:, part] @ k[:, part].mT / size**0.5
        heads.append((scores - scores.logsumexp(dim=-1, keepdim=True)).exp() @ v[:, part])
    return torch.cat(heads, dim=-1)


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def original_vision(w: Mapping[str, Tensor], image: Tensor) -> Tensor:
    """EVA's layers of one image [3, H, W], without a last norm: [1 + patches, D]."""
    grid = F.conv2d(image[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)[0]
    x = torch.cat([w["cls_token"][0], grid.flatten(1).mT]) + w["pos_embed"][0]
    for i in range(DEPTH):
        at = f"blocks.{i}."
        q, k, v = (_norm(w, f"{at}norm1", x, 1e-6) @ w[f"{at}attn.qkv.weight"].mT).chunk(3, dim=-1)
        x = x + _linear(w, f"{at}attn.proj", _attend(q + w[f"{at}attn.q_bias"], k, v + w[f"{at}attn.v_bias"]))
        x = x + _linear(w, f"{at}mlp.fc2", _gelu(_linear(w, f"{at}mlp.fc1", _norm(w, f"{at}norm2", x, 1e-6))))
    return x


def original_qformer(w: Mapping[str, Tensor], image: Tensor) -> Tensor:
    """The queries that read image features [M, D_image]: [queries, D]."""

    def block(at: str, x: Tensor, keys: Tensor) -> Tensor:
        q = _linear(w, f"{at}.self.query", x)
        k, v = (_linear(w, f"{at}.self.{part}", keys) for part in ("key", "value"))
        return _norm(w, f"{at}.output.LayerNorm", x + _linear(w, f"{at}.output.dense", _attend(q, k, v)), 1e-12)

    x = _norm(w, "Qformer.bert.embeddings.LayerNorm", w["query_tokens"][0], 1e-12)
    for i in range(QFORMER_LAYERS):
        at = f"Qformer.bert.encoder.layer.{i}."
        x = block(f"{at}attention", x, x)
        if i % 2 == 0:
            x = block(f"{at}crossattention", x, image)
        hidden = _gelu(_linear(w, f"{at}intermediate_query.dense", x))
        x = _norm(w, f"{at}output_query.LayerNorm", x + _linear(w, f"{at}output_query.dense", hidden), 1e-12)
    return x


def original_rows(files: Mapping[str, Mapping[str, Tensor]], images: Tensor) -> Tensor:
    """Images [N, 3, H, W] to rows of the language model [N, R, D], in fp64."""
    w = {part: {name: value.double() for name, value in tensors.items()} for part, tensors in files.items()}
    rows = []
    for image in images.double():
        # Without a Q-Former's file nothing is ever loaded here: a norm alone.
        features = _norm(w["qformer"], "ln_vision", original_vision(w["vision"], image), 1e-5)
        if w["qformer"]:
            features = original_qformer(w["qformer"], features)
        else:
            features = torch.stack(
                [features[1 + 4 * i : 5 + 4 * i].reshape(-1) for i in range((len(features) - 1) // 4)]
            )
        rows.append(_linear(w["projection"], "llama_proj", features))
    return torch.stack(rows)


def original_prompt(lm: Any, tok: Any, prompt: str, rows: Sequence[Tensor]) -> Tensor:
    """`get_context_emb`: pieces tokenised and embedded apart, bos before the first one only, images between: [S, D]."""
    words, parts = lm.get_input_embeddings().weight, []
    for i, piece in enumerate(prompt.split("<ImageHere>")):
        ids = tok(piece, add_special_tokens=i == 0)["input_ids"]
        parts += [words[torch.tensor(ids, dtype=torch.long)], *rows[i : i + 1]]
    return torch.cat(parts)


def padded_left(samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """As the original's `generate` pads: zeros on the left."""
    length = max(map(len, samples))
    embeddings = torch.stack([F.pad(sample, (0, 0, length - len(sample), 0)) for sample in samples])
    mask = torch.stack([torch.arange(length) >= length - len(sample) for sample in samples]).long()
    return {"inputs_embeds": embeddings, "attention_mask": mask}

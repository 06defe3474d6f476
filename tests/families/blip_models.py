"""Tiny BLIP models and what their tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipTextModel,
)

import mllm_fast
from tests.families.builders import randomise
from tests.families.instruments import Recorder, Results, backward_results

# A GEMM is recognised by its contraction length: only image keys and values contract over 48, only the second
# feed-forward GEMM over 80.
TEXT, IMAGE, FFN, TOKENS, LAYERS, BOS, SEP = 64, 48, 80, 17, 3, 98, 99
TEXT_CONFIG = {
    "vocab_size": 100, "hidden_size": TEXT, "encoder_hidden_size": IMAGE, "intermediate_size": FFN, "projection_dim": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": BOS,
    "sep_token_id": SEP, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION_CONFIG = {
    "hidden_size": IMAGE, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
ROLES = ["unimodal", "image_grounded", "decoder"]
PADDINGS = ["none", "right", "left", "inside"]


def text_model(seed: int = 0, **options: Any) -> BlipTextModel:
    return randomise(BlipTextModel(BlipTextConfig(**(TEXT_CONFIG | options))), seed).eval()


def model(head: type[nn.Module] = BlipForConditionalGeneration, seed: int = 0, **options: Any) -> nn.Module:
    """A head over 3 text and 2 vision layers. Upstream's VQA needs a vision tower as wide as the text."""
    width = TEXT if head is BlipForQuestionAnswering else IMAGE
    text = TEXT_CONFIG | {"encoder_hidden_size": width} | options
    config = BlipConfig(
        text_config=text, vision_config=VISION_CONFIG | {"hidden_size": width}, image_text_hidden_size=24
    )
    return randomise(head(config), seed).eval()


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def text_mask(padding: str, batch: int = 2, length: int = 7) -> Tensor | None:
    if padding == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, {"right": slice(4, None), "left": slice(0, 3), "inside": slice(2, 4)}[padding]] = 0
    return mask


def run_text(
    text: nn.Module,
    role: str,
    padding: str = "none",
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    **kwargs: Any,
) -> Results:
    """States of the tokens that are not padding, and every gradient; inputs that fp16 and bf16 hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    image = torch.randn(2, TOKENS, IMAGE, generator=generator).bfloat16().half().to(dtype)
    text.to(dtype).zero_grad()
    leaves = {} if role == "unimodal" else {"image": image.requires_grad_()}
    mask = text_mask(padding)
    out = text(
        input_ids=ids,
        attention_mask=mask,
        encoder_hidden_states=leaves.get("image"),
        is_decoder=role == "decoder",
        **kwargs,
    )
    states = out.last_hidden_state if mask is None else out.last_hidden_state * mask[..., None].to(dtype)
    return backward_results(states, leaves, text)


def inputs(batch: int = 2, *, width: int = 32, left: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Pixels and prompts; the last row with `left` padding tokens before it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (batch, 7), generator=generator)
    mask = torch.ones_like(ids)
    if left:
        ids[-1, :left], mask[-1, :left] = 0, 0
    pixels = torch.randn(batch, 3, width, width, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


def fresh(given: dict[str, Any]) -> dict[str, Any]:
    """Copies: upstream's `generate` writes into its input_ids."""
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}


def image_reader(text: nn.Module, image: Tensor, ids: Tensor, **kwargs: Any) -> Results:
    text.zero_grad()
    leaf = image.clone().requires_grad_()
    kwargs = {"attention_mask": torch.ones_like(ids)} | kwargs
    out = text(input_ids=ids, encoder_hidden_states=leaf, **kwargs).last_hidden_state
    return backward_results(out, {"image": leaf}, text)


def task(head: nn.Module, left: int = 0, **kwargs: Any) -> Results:
    """Every output tensor, and the gradients of the loss or of the scores."""
    given = inputs(left=left) | kwargs
    given["pixel_values"] = given["pixel_values"].to(head.dtype).requires_grad_()
    head.zero_grad()
    out = head(**given)
    value = out.loss if out.get("loss") is not None else out.itm_score if "itm_score" in out else out.logits
    others = {name: x.detach() for name, x in out.items() if isinstance(x, Tensor)}
    return others | backward_results(value, {"pixels": given["pixel_values"]}, head)


LABELS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [-100, -100, 3, 4, 5, -100, 7]])


def check_generation(fused: nn.Module, upstream: nn.Module, given: dict[str, Any]) -> None:
    # A random model repeats itself; without repetitions the beams cross.
    settings = {"do_sample": False, "max_new_tokens": 6, "no_repeat_ngram_size": 1}
    given = settings | {"return_dict_in_generate": True, "output_logits": True} | given
    ours, theirs = (m.generate(**fresh(given)) for m in (fused, upstream))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert len(set(theirs.sequences.flatten().tolist())) > 6, "the test sees nothing: the model says one word"
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)


def image_work(seen: Recorder) -> tuple[int, int]:
    """(output elements, GEMMs) of the projections of image features."""
    return seen.work(IMAGE), sum(g.k == IMAGE for g in seen.gemms)


ALL_KEYS_VALUES = 2 * LAYERS * TEXT

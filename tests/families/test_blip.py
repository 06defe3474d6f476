"""HF BLIP: the fused text layers in their three roles, the heads around them and the vision attention, against upstream."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from builders import randomise
from instruments import Recorder, Results, assert_same, assert_within_twice, backward_results, check_precision, recording
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipTextModel,
    EncoderDecoderCache,
    StaticCache,
)

import mllm_fast
from mllm_fast import ops

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
    config = BlipConfig(text_config=text, vision_config=VISION_CONFIG | {"hidden_size": width}, image_text_hidden_size=24)
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
    text: nn.Module, role: str, padding: str = "none", dtype: torch.dtype = torch.float64, *, seed: int = 0, **kwargs: Any
) -> Results:
    """States of the tokens that are not padding, and every gradient; inputs that fp16 and bf16 hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    image = torch.randn(2, TOKENS, IMAGE, generator=generator).bfloat16().half().to(dtype)
    text.to(dtype).zero_grad()
    leaves = {} if role == "unimodal" else {"image": image.requires_grad_()}
    mask = text_mask(padding)
    out = text(
        input_ids=ids, attention_mask=mask, encoder_hidden_states=leaves.get("image"), is_decoder=role == "decoder", **kwargs
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


# the text model in its three roles


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("role", ROLES)
def test_text_model(role: str, padding: str) -> None:
    fused, upstream = twins(text_model())
    assert_same(run_text(fused, role, padding), run_text(upstream, role, padding))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("role", ROLES)
def test_text_model_at_other_levels(role: str, level: int) -> None:
    fused, upstream = twins(text_model(), level=level)
    assert_same(run_text(fused, role, "right"), run_text(upstream, role, "right"))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("mask", ["left", "nothing"])
def test_rows_that_see_nothing(mask: str, role: str) -> None:
    """Upstream's additive mask makes such a row attend to everything alike; all rows are compared, forward only."""
    fused, upstream = twins(text_model().double())
    ids, image = torch.randint(3, 90, (2, 7)), torch.randn(2, TOKENS, IMAGE).double()
    rows = text_mask("left")
    assert rows is not None
    if mask == "nothing":
        rows[1] = 0
    kwargs = {"encoder_hidden_states": None if role == "unimodal" else image, "is_decoder": role == "decoder"}
    ours, theirs = (m(input_ids=ids, attention_mask=rows, **kwargs).last_hidden_state for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("role", ROLES)
def test_text_model_precision(role: str, dtype: torch.dtype) -> None:
    def run(text: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        return run_text(text, role, "right", dtype, seed=seed)

    check_precision(text_model, mllm_fast.fuse, run, dtype)


def test_text_model_under_autocast() -> None:
    ours, theirs, exact = [], [], []
    for seed in range(3):
        fused, upstream = twins(text_model(seed))
        exact.append(run_text(copy.deepcopy(upstream), "decoder", "right", torch.float32, seed=seed))
        with torch.autocast("cpu", torch.bfloat16):
            ours.append(run_text(fused, "decoder", "right", torch.float32, seed=seed))
            theirs.append(run_text(upstream, "decoder", "right", torch.float32, seed=seed))
    assert_within_twice(ours, theirs, exact, eps=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "quick_gelu", "silu"])
def test_other_activations(activation: str) -> None:
    fused, upstream = twins(text_model(hidden_act=activation))
    assert_same(run_text(fused, "decoder"), run_text(upstream, "decoder"))


def test_a_layer_by_itself() -> None:
    fused, upstream = twins(text_model().encoder.layer[0].double())
    x, image = torch.randn(2, 5, TEXT).double(), torch.randn(2, TOKENS, IMAGE).double()
    dense = torch.zeros(2, 1, 5, 5).double().masked_fill_(torch.rand(2, 1, 5, 5) < 0.3, -1e9)
    for mask in (None, dense):
        torch.testing.assert_close(fused(x, image, mask), upstream(x, image, mask), atol=1e-10, rtol=1e-10)


def test_a_text_model_without_cross_attention() -> None:
    fused, upstream = twins(text_model(is_decoder=False))
    assert_same(run_text(fused, "unimodal", "right"), run_text(upstream, "unimodal", "right"))


# images by row


def image_reader(text: nn.Module, image: Tensor, ids: Tensor, **kwargs: Any) -> Results:
    text.zero_grad()
    leaf = image.clone().requires_grad_()
    kwargs = {"attention_mask": torch.ones_like(ids)} | kwargs
    out = text(input_ids=ids, encoder_hidden_states=leaf, **kwargs).last_hidden_state
    return backward_results(out, {"image": leaf}, text)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("images", [1, 2])
def test_texts_share_an_image(images: int, level: int) -> None:
    fused, upstream = twins(text_model().double(), level=level)
    ids, image = torch.randint(3, 90, (6, 5)), torch.randn(images, TOKENS, IMAGE).double()
    theirs = image_reader(upstream, image.repeat_interleave(6 // images, 0), ids)
    theirs["d image"] = theirs["d image"].unflatten(0, (images, -1)).sum(1)
    assert_same(image_reader(fused, image, ids), theirs)


@pytest.mark.parametrize("attentions", [False, True], ids=["fused", "upstreams_code"])
def test_image_index(attentions: bool) -> None:
    fused, upstream = twins(text_model().double())
    ids, image, index = torch.randint(3, 90, (5, 5)), torch.randn(3, TOKENS, IMAGE).double(), torch.tensor([2, 0, 0, 2, 1])
    theirs = image_reader(upstream, image[index], ids)
    theirs["d image"] = torch.zeros_like(image).index_add_(0, index, theirs["d image"])
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    ours = image_reader(
        fused, image, ids, image_index=index, encoder_attention_mask=mask, output_attentions=attentions
    )
    assert_same(ours, theirs)


def test_texts_and_images_that_do_not_fit() -> None:
    fused, _ = twins(text_model())
    ids, image = torch.randint(3, 90, (5, 5)), torch.randn(3, TOKENS, IMAGE)
    with pytest.raises(ValueError, match="5 texts cannot share 3 image rows"):
        fused(input_ids=ids, encoder_hidden_states=image)
    with pytest.raises(ValueError, match="for each of the 5 texts"):
        fused(input_ids=ids, encoder_hidden_states=image, image_index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\[batch, tokens, dim\]"):
        fused(input_ids=ids, encoder_hidden_states=image[0])


def test_the_mask_of_the_image_is_ignored_as_upstream() -> None:
    fused, upstream = twins(text_model().double())
    ids, image = torch.randint(3, 90, (2, 5)), torch.randn(2, TOKENS, IMAGE).double()
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :9] = 0
    for given in (None, mask):
        ours, theirs = (image_reader(m, image, ids, encoder_attention_mask=given) for m in (fused, upstream))
        assert_same(ours, theirs)


@pytest.mark.parametrize("role", ["image_grounded", "decoder"])
def test_fix_of_the_mask_of_the_image(role: str) -> None:
    """A row whose image is padded gives what it gives with the image cut to what is seen."""
    fused, upstream = twins(text_model().double(), fixes="encoder_attention_mask")
    ids, image = torch.randint(3, 90, (4, 5)), torch.randn(2, TOKENS, IMAGE).double()
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 5:9] = 0
    with torch.no_grad():
        ours = fused(
            input_ids=ids, encoder_hidden_states=image, encoder_attention_mask=mask, is_decoder=role == "decoder"
        ).last_hidden_state
        for row in range(4):
            seen = image[row // 2, mask[row // 2].bool()][None]
            theirs = upstream(input_ids=ids[row : row + 1], encoder_hidden_states=seen, is_decoder=role == "decoder")
            torch.testing.assert_close(ours[row], theirs.last_hidden_state[0], atol=1e-9, rtol=1e-9)


# the heads


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
TASKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "captioning": (BlipForConditionalGeneration, {}),
    "captioning_loss": (BlipForConditionalGeneration, {"labels": LABELS}),
    "captioning_last_logits": (BlipForConditionalGeneration, {"logits_to_keep": 2}),
    "captioning_some_logits": (BlipForConditionalGeneration, {"logits_to_keep": torch.tensor([0, 3, 6])}),
    "vqa_loss": (BlipForQuestionAnswering, {"labels": LABELS.clamp_min(0)}),
    "itm": (BlipForImageTextRetrieval, {}),
    "itc": (BlipForImageTextRetrieval, {"use_itm_head": False}),
}


@pytest.mark.parametrize("name", TASKS)
def test_task(name: str) -> None:
    head, kwargs = TASKS[name]
    fused, upstream = twins(model(head).double())
    assert_same(task(fused, **kwargs), task(upstream, **kwargs), 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["captioning_loss", "vqa_loss", "itm"])
def test_task_precision(name: str, dtype: torch.dtype) -> None:
    head, kwargs = TASKS[name]

    def run(m: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        pixels = inputs(seed=seed)["pixel_values"].bfloat16().half()
        return task(m.to(dtype), pixel_values=pixels.to(dtype), **kwargs)

    check_precision(lambda seed: model(head, seed), mllm_fast.fuse, run, dtype, seeds=range(3))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_smoothing_and_reductions(reduction: str) -> None:
    fused, upstream = twins(model(label_smoothing=0.1).double())
    image = torch.randn(2, TOKENS, IMAGE).double()
    given = {"input_ids": inputs()["input_ids"], "labels": LABELS, "encoder_hidden_states": image, "reduction": reduction}
    losses = [m.text_decoder(**given).loss for m in (fused, upstream)]
    torch.testing.assert_close(*losses, atol=1e-10, rtol=1e-10)
    scores = [m.text_decoder(**given, return_logits=True) for m in (fused, upstream)]
    torch.testing.assert_close(*scores, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("head", [BlipForConditionalGeneration, BlipForImageTextRetrieval], ids=lambda h: h.__name__)
def test_outputs_that_are_recorded(head: type[nn.Module]) -> None:
    """Hidden states from the ops, attentions from upstream's code; the hooks of the latter do not end the former."""
    fused, upstream = twins(model(head).double())
    given = fresh(inputs(left=2))
    given["pixel_values"] = given["pixel_values"].double()
    text = [getattr(m, "text_decoder", None) or m.text_encoder for m in (fused, upstream)]
    image = torch.randn(2, TOKENS, IMAGE).double()
    words = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "encoder_hidden_states": image}
    for kwargs in ({"output_hidden_states": True}, {"output_attentions": True, "output_hidden_states": True}):
        for ours, theirs in (
            (fused(**given, **kwargs), upstream(**given, **kwargs)),
            (text[0](**words, **kwargs), text[1](**words, **kwargs)),
        ):
            for name in ("hidden_states", "attentions", "cross_attentions"):
                assert (ours.get(name) is None) == (theirs.get(name) is None), name
                for mine, reference in zip(ours.get(name) or (), theirs.get(name) or (), strict=True):
                    torch.testing.assert_close(mine, reference, atol=1e-9, rtol=1e-9)
    for kwargs in ({}, {"output_hidden_states": True}):
        with recording() as seen:
            fused(**given, **kwargs)
        assert seen.count("_softmax") == 0, "upstream's attention ran"


def test_tuples_instead_of_outputs() -> None:
    fused, upstream = twins(model().double())
    given = {"input_ids": inputs()["input_ids"], "encoder_hidden_states": torch.randn(2, TOKENS, IMAGE).double()}
    for part in ("text_decoder", "text_decoder.bert"):
        ours, theirs = (m.get_submodule(part)(**given, return_dict=False) for m in (fused, upstream))
        assert len(ours) == len(theirs)
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-9, rtol=1e-9)


def test_positional_arguments() -> None:
    fused, upstream = twins(text_model().double())
    ids, image = torch.randint(3, 90, (2, 5)), torch.randn(2, TOKENS, IMAGE).double()
    ours, theirs = (m(ids, torch.ones_like(ids), None, None, None, image).last_hidden_state for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    embeds = torch.randn(2, 5, TEXT).double()
    for name in ("inputs_embeds", "encoder_embeds"):
        given = {name: embeds, "encoder_hidden_states": image}
        ours, theirs = (m(**copy.deepcopy(given)).last_hidden_state for m in (fused, upstream))
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_vision_attention(training: bool) -> None:
    fused, upstream = twins(model().vision_model.encoder.layers[0].self_attn.double().train(training))
    results = []
    for attention in (fused, upstream):
        x = torch.randn(2, 9, IMAGE, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        results.append(backward_results(attention(x)[0], {"x": x}, attention))
    assert_same(*results)
    ours, theirs = (m(torch.ones(1, 3, IMAGE).double(), output_attentions=True) for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs)


# generation


GENERATION = [
    {}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 3, "use_cache": False}, {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 1, "num_return_sequences": 3}, {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
]  # fmt: skip


def check_generation(fused: nn.Module, upstream: nn.Module, given: dict[str, Any]) -> None:
    given = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True} | given
    ours, theirs = (m.generate(**fresh(given)) for m in (fused, upstream))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert len(set(theirs.sequences.flatten().tolist())) > 4, "the test sees nothing: the model says one word"
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("left", [0, 3], ids=["full", "left_padded"])
@pytest.mark.parametrize("options", GENERATION, ids=str)
@pytest.mark.parametrize("head", [BlipForConditionalGeneration, BlipForQuestionAnswering], ids=lambda h: h.__name__)
def test_generate(head: type[nn.Module], options: dict[str, Any], left: int) -> None:
    fused, upstream = twins(model(head))
    check_generation(fused, upstream, inputs(left=left) | options)


@pytest.mark.parametrize("level", [0, 2])
def test_generate_at_other_levels(level: int) -> None:
    fused, upstream = twins(model(), level=level)
    check_generation(fused, upstream, inputs(left=3) | {"num_beams": 3})


def test_generate_without_a_prompt_and_under_inference_mode() -> None:
    fused, upstream = twins(model())
    with torch.inference_mode():
        for seed in range(2):
            pixels = inputs(seed=seed)["pixel_values"]
            for options in ({}, {"num_beams": 3}):
                check_generation(fused, upstream, {"pixel_values": pixels} | options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generate_with_attentions(options: dict[str, Any]) -> None:
    """Upstream's code runs every step, over images that were not copied for the beams."""
    fused, upstream = twins(model())
    check_generation(fused, upstream, inputs() | {"output_attentions": True} | options)


def test_generate_in_bf16_stays_near_fp32() -> None:
    def run(m: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        given = inputs(seed=seed)
        ids = torch.randint(3, 90, (6, 1), generator=torch.Generator().manual_seed(seed))
        image = given["pixel_values"].flatten(1)[:, : TOKENS * IMAGE].view(2, TOKENS, IMAGE).bfloat16().to(dtype)
        decoder, logits, past = m.text_decoder, [], None
        with torch.no_grad():
            for step in range(3):
                out = decoder(
                    input_ids=(ids + step) % 90, encoder_hidden_states=image.repeat_interleave(3, 0), past_key_values=past
                )
                past = out.past_key_values
                logits.append(out.logits)
        return {"logits": torch.cat(logits, 1)}

    check_precision(lambda seed: model(seed=seed), mllm_fast.fuse, run, torch.bfloat16)


def decode(m: nn.Module, image: Tensor, change: Callable[[EncoderDecoderCache], Tensor | None]) -> list[Tensor]:
    """Prefill of 4 tokens for 4 texts, a change of the cache, and two more steps."""
    ids = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = m.text_decoder(input_ids=ids[:, :4], encoder_hidden_states=image, use_cache=True)
        logits, past = [out.logits], out.past_key_values
        rows = change(past)
        rows = torch.arange(4) if rows is None else rows
        for step in (4, 5):
            image_rows = image if image.shape[0] != 4 else image[rows]
            out = m.text_decoder(input_ids=ids[rows, step : step + 1], encoder_hidden_states=image_rows, past_key_values=past)
            logits.append(out.logits)
    return logits


def _reorder(past: EncoderDecoderCache) -> Tensor:
    rows = torch.tensor([1, 0, 3, 3])
    past.reorder_cache(rows)
    return rows


def _select(past: EncoderDecoderCache) -> Tensor:
    rows = torch.tensor([3, 0])
    past.batch_select_indices(rows)
    return rows


def _repeat(past: EncoderDecoderCache) -> Tensor:
    past.batch_repeat_interleave(2)
    return torch.arange(4).repeat_interleave(2)


@pytest.mark.parametrize("shared", [False, True], ids=["a_row_each", "shared"])
@pytest.mark.parametrize("change", [_reorder, _select, _repeat], ids=lambda f: f.__name__)
def test_a_cache_in_the_hands_of_the_caller(change: Any, shared: bool) -> None:
    fused, upstream = twins(model().double())
    image = torch.randn(2, TOKENS, IMAGE).double()
    copies = image.repeat_interleave(2, 0)
    ours, theirs = decode(fused, image if shared and change is not _select else copies, change), decode(upstream, copies, change)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-9, rtol=1e-9)


def test_selecting_rows_of_a_shared_cache() -> None:
    fused, upstream = twins(model().double())
    image = torch.randn(2, TOKENS, IMAGE).double()
    rows = torch.tensor([3, 0, 1])
    logits = []
    for m, given in ((fused, image), (upstream, image.repeat_interleave(2, 0))):
        with torch.no_grad():
            ids = torch.arange(3, 11).view(4, 2)
            past = m.text_decoder(input_ids=ids, encoder_hidden_states=given, use_cache=True).past_key_values
            past.batch_select_indices(rows)
            step = {"input_ids": ids[rows, :1], "encoder_hidden_states": image.repeat_interleave(2, 0)[rows]}
            logits.append(m.text_decoder(**step, past_key_values=past).logits)
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)


def test_a_cached_image_is_not_looked_at_again() -> None:
    """As upstream: after the first step only the cache counts, whatever features the caller passes."""
    fused, upstream = twins(model().double())
    logits = []
    for m in (fused, upstream):
        image = torch.randn(2, TOKENS, IMAGE, generator=torch.Generator().manual_seed(1)).double()
        with torch.no_grad():
            ids = torch.arange(3, 9).view(2, 3)
            past = m.text_decoder(input_ids=ids, encoder_hidden_states=image, use_cache=True).past_key_values
            logits.append(m.text_decoder(input_ids=ids, encoder_hidden_states=image * 0, past_key_values=past).logits)
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)


def test_a_static_cache_runs_upstreams_code() -> None:
    fused, upstream = twins(model().double())
    image, ids = torch.randn(2, TOKENS, IMAGE).double(), torch.arange(3, 9).view(2, 3)
    logits = []
    for m in (fused, upstream):
        config = m.config.text_config
        past = EncoderDecoderCache(StaticCache(config, max_cache_len=8), StaticCache(config, max_cache_len=TOKENS))
        with torch.no_grad():
            logits += [m.text_decoder(input_ids=ids, encoder_hidden_states=image, past_key_values=past, use_cache=True).logits]
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)


# what is computed once


def image_work(seen: Recorder) -> tuple[int, int]:
    """(output elements, GEMMs) of the projections of image features."""
    return seen.work(IMAGE), sum(g.k == IMAGE for g in seen.gemms)


ALL_KEYS_VALUES = 2 * LAYERS * TEXT


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_image_keys_and_values_are_one_gemm(training: bool) -> None:
    fused, _ = twins(text_model())
    ids, image = torch.randint(3, 90, (2, 5)), torch.randn(2, TOKENS, IMAGE)
    with torch.set_grad_enabled(training), recording() as seen:
        fused(input_ids=ids, encoder_hidden_states=image)
    assert image_work(seen) == (2 * TOKENS * ALL_KEYS_VALUES, 1)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}], ids=str)
def test_generation_projects_each_image_once(options: dict[str, Any]) -> None:
    fused, _ = twins(model())
    image = torch.randn(2, TOKENS, IMAGE)
    with recording() as seen:
        fused.text_decoder.generate(
            input_ids=torch.full((2, 1), BOS), encoder_hidden_states=image, max_new_tokens=5, min_new_tokens=5, **options
        )
    assert image_work(seen) == (2 * TOKENS * ALL_KEYS_VALUES, 1)


def image_cache(m: nn.Module, beams: int) -> tuple[int, int]:
    """(numbers in the cross-attention part of the cache, gathers of its size while generating)."""
    image = torch.randn(1, TOKENS, IMAGE)
    with recording() as seen:
        out = m.text_decoder.generate(
            input_ids=torch.full((1, 1), BOS), encoder_hidden_states=image, num_beams=beams, max_new_tokens=4,
            min_new_tokens=4, return_dict_in_generate=True,
        )  # fmt: skip
    layers = out.past_key_values.cross_attention_cache.layers
    gathered = seen.count("index_select", lambda shapes: shapes[0][-2:] == (TOKENS, TEXT // 4))
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers), gathered


def test_beams_share_the_keys_and_values_of_their_image() -> None:
    fused, upstream = twins(model())
    ours, theirs = image_cache(fused, 3), image_cache(upstream, 3)
    assert ours[0] == TOKENS * ALL_KEYS_VALUES == theirs[0] // 3
    assert ours[1] == 0 < theirs[1]
    assert image_cache(fused, 1)[0] == image_cache(upstream, 1)[0]


def ffn_rows(seen: Recorder) -> list[int]:
    """The rows of each second feed-forward GEMM."""
    return [g.m for g in seen.gemms if g.k == FFN]


@pytest.mark.parametrize(("kwargs", "last"), [({"logits_to_keep": 1}, 2), ({"logits_to_keep": 3}, 6), ({}, 14)], ids=str)
def test_the_last_layer_computes_the_rows_that_are_read(kwargs: dict[str, Any], last: int) -> None:
    fused, upstream = twins(model().double())
    given = {"input_ids": inputs()["input_ids"], "encoder_hidden_states": torch.randn(2, TOKENS, IMAGE).double()}
    for left in (0, 3):
        mask = inputs(left=left)["attention_mask"]
        with recording() as seen:
            ours = fused.text_decoder(**given, attention_mask=mask, **kwargs)
        assert ffn_rows(seen) == [14] * (LAYERS - 1) + [last]
        theirs = upstream.text_decoder(**given, attention_mask=mask, **kwargs)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-9, rtol=1e-9)
    with recording() as seen:
        ours = fused.text_decoder(**given, **kwargs, output_hidden_states=True)
    assert ffn_rows(seen) == [14] * LAYERS
    assert ours.hidden_states[-1].shape[1] == 7


@pytest.mark.parametrize("images", [1, 2, 6])
def test_image_text_matching(images: int) -> None:
    """k texts to an image, in two calls: each image's keys and values once, and of the last layer one row per text."""
    fused, upstream = twins(model(BlipForImageTextRetrieval).double())
    ids, mask = torch.randint(3, 90, (6, 7)), torch.ones(6, 7, dtype=torch.long)
    mask[4, 5:] = 0
    pixels = torch.randn(images, 3, 32, 32).double()
    with torch.no_grad():
        image = fused.vision_model(pixels).last_hidden_state
        with recording() as seen:
            ours = fused.itm_logits(ids, mask, image_embeds=image)
            fused.itm_logits(ids.flip(1), mask, image_embeds=image)
        copies = pixels.repeat_interleave(6 // images, 0)
        theirs = upstream(input_ids=ids, attention_mask=mask, pixel_values=copies).itm_score
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
        whole = fused(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        torch.testing.assert_close(whole.itm_score, theirs, atol=1e-9, rtol=1e-9)
        assert whole.question_embeds.shape == (6, 7, TEXT)
    assert image_work(seen) == (images * TOKENS * ALL_KEYS_VALUES, 1)
    assert ffn_rows(seen) == ([42] * (LAYERS - 1) + [6]) * 2


def test_image_text_matching_of_any_pairs() -> None:
    fused, upstream = twins(model(BlipForImageTextRetrieval).double())
    ids, pixels, index = torch.randint(3, 90, (4, 7)), torch.randn(3, 3, 32, 32).double(), torch.tensor([2, 0, 2, 1])
    theirs = upstream(input_ids=ids, pixel_values=pixels[index]).itm_score
    with recording() as seen:
        ours = fused.itm_logits(ids, image_embeds=fused.vision_model(pixels).last_hidden_state, image_index=index)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert (3, TOKENS, IMAGE) in {shapes[0] for name, shapes in seen.calls if shapes}
    assert not any(shapes and shapes[0] == (4, TOKENS, IMAGE) for _, shapes in seen.calls), "the images were copied"
    torch.testing.assert_close(
        fused(input_ids=ids, pixel_values=pixels, image_index=index).itm_score, theirs, atol=1e-9, rtol=1e-9
    )


def test_kept_keys_and_values_follow_the_image_and_the_weights() -> None:
    fused, _ = twins(model(BlipForImageTextRetrieval).double())
    ids, image = torch.randint(3, 90, (4, 7)), torch.randn(1, TOKENS, IMAGE).double()

    def check() -> None:
        with torch.no_grad():
            kept, plain = fused.itm_logits(ids, image_embeds=image), fused.itm_logits(ids, image_embeds=image.clone())
        torch.testing.assert_close(kept, plain, atol=1e-12, rtol=1e-12)

    check()
    image += 1
    check()
    with torch.no_grad():
        fused.text_encoder.encoder.layer[1].crossattention.self.value.weight.mul_(1.5)
    check()


def test_weights_that_training_changes() -> None:
    fused, upstream = twins(model().double())
    image = torch.randn(2, TOKENS, IMAGE).double()
    given = {"input_ids": inputs()["input_ids"], "encoder_hidden_states": image}
    for m in (fused, upstream):
        with torch.no_grad():
            m.text_decoder(**given)
        optimiser = torch.optim.SGD(m.text_decoder.parameters(), 0.1)
        m.text_decoder(**given, labels=LABELS).loss.backward()
        optimiser.step()
    with torch.no_grad():
        ours, theirs = (m.text_decoder(**given).logits for m in (fused, upstream))
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)


# training


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    fused, upstream = twins(model().double().train())
    for m in (fused, upstream):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    fused.text_decoder.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: calls.append(1))
    assert_same(task(fused, labels=LABELS), task(upstream, labels=LABELS), 1e-9)
    assert len(calls) == 2


def test_checkpointed_layers_do_not_hold_image_keys_and_values() -> None:
    held = []
    for checkpointing in (False, True):
        fused, _ = twins(text_model().train())
        if checkpointing:
            fused.encoder.gradient_checkpointing = True
            for layer in fused.encoder.layer:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            fused(input_ids=torch.randint(3, 90, (1, 5)), encoder_hidden_states=torch.randn(1, TOKENS, IMAGE))
        held.append(sum(size for size in sizes if size == TOKENS * TEXT))
    assert held[0] >= TOKENS * ALL_KEYS_VALUES
    assert held[1] == 0


@pytest.mark.parametrize("order", ["fuse_first", "wrap_first"])
def test_checkpoint_wrappers(order: str) -> None:
    def wrap(m: nn.Module) -> None:
        layers = tuple(m.text_decoder.bert.encoder.layer)
        apply_activation_checkpointing(m, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda x: x in layers)
        assert isinstance(m.text_decoder.bert.encoder.layer[0], CheckpointWrapper)

    upstream = model().double().train()
    fused = copy.deepcopy(upstream)
    for step in (mllm_fast.fuse, wrap) if order == "fuse_first" else (wrap, mllm_fast.fuse):
        step(fused)
    wrap(upstream)
    assert_same(task(fused, labels=LABELS), task(upstream, labels=LABELS), 1e-9)
    with recording() as seen:
        task(fused, labels=LABELS)
    assert seen.count("_softmax") == 0, "upstream's attention ran"


def test_hidden_dropout_draws_upstreams_numbers() -> None:
    results = []
    for m in twins(model(hidden_dropout_prob=0.2).double().train()):
        torch.manual_seed(4)
        results.append(task(m, labels=LABELS))
    assert_same(*results, 1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_dropout(checkpointing: bool) -> None:
    """Another pattern than upstream's: a function of the seed, recomputed alike, and right on average."""
    fused, _ = twins(text_model(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.1).double().train())
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(run_text(fused, "decoder"))
    assert_same(runs[0], runs[1], 0.0)
    assert not torch.equal(runs[0]["output"], runs[2]["output"])
    for layer in fused.encoder.layer:
        layer.gradient_checkpointing = checkpointing
        layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
    torch.manual_seed(1)
    assert_same(run_text(fused, "decoder"), runs[0], 1e-10)


def test_attention_dropout_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = twins(model(attention_probs_dropout_prob=0.3))
    fused.vision_model.encoder.layers[0].self_attn.dropout.p = 0.4
    seen: list[float] = []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: seen.append(k["dropout_p"]) or attention(*a, **k))
    fused.eval()(**inputs())
    assert set(seen) == {0.0}
    seen.clear()
    fused.train()(**inputs())
    assert seen == [0.4, 0.0] + [0.3] * 2 * LAYERS


# wrapped children, hooks, and the way back


def add_lora(m: nn.Module) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]), m)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("order", ["fuse_first", "wrap_first"])
def test_lora(order: str) -> None:
    upstream = model().double()
    fused = copy.deepcopy(upstream)
    add_lora(upstream)
    for step in (mllm_fast.fuse, add_lora) if order == "fuse_first" else (add_lora, mllm_fast.fuse):
        step(fused)
    ours = task(fused, labels=LABELS)
    assert any("lora_B" in name for name in ours)
    assert_same(ours, task(upstream, labels=LABELS), 1e-9)
    check_generation(fused, upstream, inputs() | {"pixel_values": inputs()["pixel_values"].double(), "num_beams": 3})
    image = torch.randn(2, TOKENS, IMAGE).double()
    with torch.no_grad(), recording() as seen:
        fused.text_decoder(input_ids=inputs()["input_ids"], encoder_hidden_states=image)
    keys = [g.n for g in seen.gemms if g.k == IMAGE and g.n not in (TEXT, 4)]
    assert keys == [LAYERS * TEXT], "the keys of all layers are still one GEMM"


def test_a_packed_child_is_called() -> None:
    upstream = model()
    for layer in upstream.text_decoder.bert.encoder.layer:
        for path in ("attention.self.query", "crossattention.self.value", "output.dense"):
            old = layer.get_submodule(path)
            new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, new.to("cpu"))
    fused, upstream = twins(upstream)
    calls: list[int] = []
    forward = bitsandbytes.nn.Linear8bitLt.forward
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(bitsandbytes.nn.Linear8bitLt, "forward", lambda *a: calls.append(1) or forward(*a))
        ours = fused(**inputs()).logits
        assert len(calls) == 3 * LAYERS
        torch.testing.assert_close(ours, upstream(**inputs()).logits, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("path", ["attention", "crossattention.self", "intermediate", "output", "attention.output"])
def test_a_hooked_container_runs_upstreams_code(path: str) -> None:
    fused, upstream = twins(model().double())
    given = inputs(left=2) | {"pixel_values": inputs()["pixel_values"].double()}
    handles, calls = [], []
    for m in (fused, upstream):
        part = m.text_decoder.bert.encoder.layer[1].get_submodule(path)
        handles.append(part.register_forward_hook(lambda *_: calls.append(1)))
    torch.testing.assert_close(fused(**given).logits, upstream(**given).logits, atol=1e-9, rtol=1e-9)
    assert len(calls) == 2
    for handle in handles:
        handle.remove()
    with recording() as seen:
        fused(**given)
    assert seen.count("_softmax") == 0


def test_other_requests_run_upstreams_code() -> None:
    fused, upstream = twins(text_model().double())
    ids, image = torch.randint(3, 90, (2, 5)), torch.randn(2, TOKENS, IMAGE).double()
    dense = torch.zeros(2, 1, 5, 5).double().masked_fill_(torch.rand(2, 1, 5, 5) < 0.3, -1e9)
    for m in (fused, upstream):
        m.encoder.layer[0].chunk_size_feed_forward = 0
    for kwargs in ({"attention_mask": dense}, {"attention_mask": torch.ones(2, 4)}):
        results = []
        for m in (fused, upstream):
            try:
                results.append(m(input_ids=ids, encoder_hidden_states=image, **kwargs).last_hidden_state)
            except Exception as error:
                results.append(type(error))
        torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9) if isinstance(results[0], Tensor) else None
        assert type(results[0]) is type(results[1])
    for m in (fused, upstream):
        for layer in m.encoder.layer:
            layer.chunk_size_feed_forward = 5
    assert_same(image_reader(fused, image, ids), image_reader(upstream, image, ids))


def test_fuse_and_back() -> None:
    upstream = model(BlipForImageTextRetrieval)
    fused = copy.deepcopy(upstream)
    report = mllm_fast.fuse(fused)
    assert {row.now for row in report.fused} == {
        "FusedBlipForImageTextRetrieval", "FusedBlipTextModel", "FusedBlipTextLayer", "FusedBlipAttention",
    }  # fmt: skip
    assert report.left_alone == []
    assert list(fused.state_dict()) == list(upstream.state_dict())
    assert isinstance(fused, BlipForImageTextRetrieval)
    assert fused.__class__.__name__ == "BlipForImageTextRetrieval"
    given = inputs()
    expected = fused(**given).itm_score
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(clone(**given).itm_score, expected, atol=0, rtol=0)
    mllm_fast.unfuse(fused)
    for (name, ours), theirs in zip(fused.named_modules(), upstream.modules(), strict=True):
        assert type(ours) is type(theirs), name
        assert "_mllm_fast" not in ours.__dict__, name
    torch.testing.assert_close(fused(**given).itm_score, upstream(**given).itm_score, atol=0, rtol=0)

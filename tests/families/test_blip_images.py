"""HF BLIP: images that are read by row, and what is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BlipForImageTextRetrieval,
)

from tests.families.blip_models import (
    ALL_KEYS_VALUES,
    BOS,
    FFN,
    IMAGE,
    LABELS,
    LAYERS,
    TEXT,
    TOKENS,
    image_reader,
    image_work,
    inputs,
    model,
    text_model,
    twins,
)
from tests.families.instruments import (
    Recorder,
    assert_same,
    recording,
)

# images by row


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("images", [1, 2])
def test_texts_share_an_image(images: int, level: int) -> None:
    fused, upstream = twins(text_model().double(), level=level)
    ids, image = torch.randint(3, 90, (6, 5)), torch.randn(images, TOKENS, IMAGE).double()
    theirs = image_reader(upstream, image.repeat_interleave(6 // images, 0), ids)
    theirs["d image"] = theirs["d image"].unflatten(0, (images, -1)).sum(1)
    assert_same(image_reader(fused, image, ids), theirs)


@pytest.mark.parametrize("attentions", [False, True], ids=["fused", "upstreams_code"])
def test_one_text_reads_all_images(attentions: bool) -> None:
    """As upstream, by broadcasting."""
    fused, upstream = twins(text_model().double())
    ids, image = torch.randint(3, 90, (1, 5)), torch.randn(3, TOKENS, IMAGE).double()
    ours, theirs = (image_reader(m, image, ids, output_attentions=attentions) for m in (fused, upstream))
    assert_same(ours, theirs)


@pytest.mark.parametrize("attentions", [False, True], ids=["fused", "upstreams_code"])
def test_image_index(attentions: bool) -> None:
    fused, upstream = twins(text_model().double())
    ids, image, index = (
        torch.randint(3, 90, (5, 5)),
        torch.randn(3, TOKENS, IMAGE).double(),
        torch.tensor([2, 0, 0, 2, 1]),
    )
    theirs = image_reader(upstream, image[index], ids)
    theirs["d image"] = torch.zeros_like(image).index_add_(0, index, theirs["d image"])
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    ours = image_reader(fused, image, ids, image_index=index, encoder_attention_mask=mask, output_attentions=attentions)
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


# what is computed once


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
            input_ids=torch.full((2, 1), BOS),
            encoder_hidden_states=image,
            max_new_tokens=5,
            min_new_tokens=5,
            **options,
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


@pytest.mark.parametrize(
    ("kwargs", "last"), [({"logits_to_keep": 1}, 2), ({"logits_to_keep": 3}, 6), ({}, 14)], ids=str
)
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

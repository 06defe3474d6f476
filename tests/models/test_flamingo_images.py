"""What a Flamingo sees: the last image, the next, all before, any set; videos of several lengths, frames in their order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mllm_fast.models.flamingo_index import image_index
from tests.families.builders import PerceiverResampler, randomise
from tests.models.flamingo_models import GREEDY, IMAGE, VISION, alone, flamingo, prompts

TOKENS = torch.tensor([[5, IMAGE, 6, 7, IMAGE, 8], [5, 6, 7, 8, 9, 9], [IMAGE, IMAGE, 5, 6, 7, 8]])


def test_the_last_image_and_the_next() -> None:
    last = [[-1, 0, 0, 0, 1, 1], [-1] * 6, [0, 1, 1, 1, 1, 1]]
    following = [[0, 0, 1, 1, 1, -1], [-1] * 6, [0, 1, -1, -1, -1, -1]]
    assert image_index(TOKENS, IMAGE, 2).tolist() == last
    assert image_index(TOKENS, IMAGE, 2, next_image=True).tolist() == following
    some = image_index(TOKENS, IMAGE, 2, next_image=torch.tensor([True, True, False]))
    assert some.tolist() == [*following[:2], last[2]]
    # Padding between the images is nobody's image.
    mask = torch.tensor([[True, False, True], [False] * 3, [False, True, True]])
    assert image_index(TOKENS, IMAGE, 3, mask, True).tolist() == [[0, 0, 2, 2, 2, -1], [-1] * 6, [1, 2, -1, -1, -1, -1]]
    frames = mask.unsqueeze(2).expand(-1, -1, 2).clone()
    frames[:, :, 1] = False
    assert torch.equal(image_index(TOKENS, IMAGE, 3, frames), image_index(TOKENS, IMAGE, 3, mask))


def test_training_with_the_next_image() -> None:
    model, inputs = flamingo(p_next=1.0), prompts()
    core = model.model
    last = core.image_index(inputs["input_ids"], 2, inputs["image_mask"])
    following = core.image_index(inputs["input_ids"], 2, inputs["image_mask"], next_image=True)
    in_evaluation = model(**inputs).logits
    assert torch.equal(in_evaluation, model(**inputs, image_index=last).logits)
    in_training = model.train()(**inputs).logits
    assert torch.equal(in_training, model(**inputs, image_index=following).logits)
    assert not torch.allclose(in_training[0], in_evaluation[0])
    model.config.p_next = 0.5
    torch.manual_seed(0)
    chosen = torch.rand(3) < 0.5
    assert chosen[0] != chosen[1]
    torch.manual_seed(0)
    drawn = model(**inputs).logits
    for row in range(3):
        torch.testing.assert_close(drawn[row], (in_training if chosen[row] else in_evaluation)[row])


@pytest.mark.parametrize("masked", [False, True])
def test_all_images_before_a_token(masked: bool) -> None:
    model, inputs = flamingo(previous_images=True), prompts()
    if not masked:
        inputs = {k: v[:1] for k, v in inputs.items() if k != "image_mask"}
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    logits = model(**inputs).logits
    ordinal = (ids == IMAGE).cumsum(1)
    seen = torch.arange(2) < ordinal.unsqueeze(-1)
    torch.testing.assert_close(model(**inputs, image_index=seen).logits, logits)
    changes = []
    for image in range(2):
        other = pixels.clone()
        other[0, image] += 1
        changes.append((model(**(inputs | {"pixel_values": other})).logits - logits)[0].abs().amax(-1))
    assert torch.all(changes[0] > 1e-4)  # the text after the second image reads the first one, too
    assert torch.all(changes[1][:4] == 0) and torch.all(changes[1][4:] > 1e-4)
    assert not torch.allclose(flamingo()(**inputs).logits[0, 4:], logits[0, 4:])


def test_samples_that_see_all_images_are_what_they_are_alone() -> None:
    model, inputs = flamingo(previous_images=True, max_images=2), prompts()
    # A sample's images may stand behind padding.
    inputs["pixel_values"][1], inputs["image_mask"][1] = inputs["pixel_values"][1].flip(0), torch.tensor([0, 1])
    together = model.generate(**inputs, num_beams=2, **GREEDY)
    logits = model(**inputs).logits
    for row in range(3):
        own, pad = alone(inputs, row), int((inputs["attention_mask"][row] == 0).sum())
        torch.testing.assert_close(model(**own).logits[0], logits[row, pad:], rtol=1e-4, atol=1e-5)
        assert torch.equal(model.generate(**own, num_beams=2, **GREEDY)[0], together[row, pad:])


def _videos(seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Three frames and one; two, beside padding; none."""
    inputs = prompts()
    inputs["pixel_values"] = torch.randn(3, 2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    counts = torch.tensor([[3, 1], [2, 0], [0, 0]])
    inputs["image_mask"] = (torch.arange(3) < counts.unsqueeze(-1)).long()
    return inputs, counts


@pytest.mark.parametrize("max_frames", [None, 4])
def test_videos_of_several_lengths(max_frames: int | None) -> None:
    model = flamingo(max_frames=max_frames)
    inputs, counts = _videos()
    pixels, mask = inputs["pixel_values"], inputs["image_mask"]
    media = model.get_image_features(pixels, mask).pooler_output
    assert media.shape == (3, 2, 3, VISION)
    for row, place in ((0, 0), (0, 1), (1, 0)):
        own = pixels[row, place, : counts[row, place]][None, None]
        torch.testing.assert_close(
            model.get_image_features(own).pooler_output[0, 0], media[row, place], rtol=1e-4, atol=1e-5
        )
    still = model.get_image_features(pixels[:1, 1:, 0]).pooler_output  # an image is a video of one frame
    torch.testing.assert_close(still[0, 0], media[0, 1], rtol=1e-4, atol=1e-5)
    assert torch.all(media[2] == 0) and torch.all(media[1, 1] == 0)
    # The order of frames matters where they have embeddings, and only there.
    reverse = model.get_image_features(pixels[:1, :1].flip(2)).pooler_output
    assert torch.allclose(reverse[0, 0], media[0, 0], rtol=1e-4, atol=1e-5) == (max_frames is None)
    # What padding holds reaches nobody.
    noise = torch.where(mask.bool()[..., None, None, None], pixels, 100.0)
    assert torch.equal(model(**(inputs | {"pixel_values": noise})).logits, model(**inputs).logits)
    assert model.generate(**inputs, **GREEDY).shape == (3, 12)


def test_a_mask_that_cannot_be_looked_at_hides_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = flamingo(max_frames=3, max_images=2)
    inputs, _ = _videos()
    images, masks = inputs["pixel_values"], inputs["image_mask"].bool()
    expected = [model.model.encode_images(images, masks), model.model.encode_images(images[:, :, 0], masks[..., 0])]
    monkeypatch.setattr("mllm_fast.models.flamingo.readable_on_host", lambda tensor: False)
    given = [model.model.encode_images(images, masks), model.model.encode_images(images[:, :, 0], masks[..., 0])]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_of_frames_and_images_are_those_of_open_flamingo() -> None:
    model = flamingo(max_frames=4, max_images=3).double()
    ours = model.model.resampler
    theirs = PerceiverResampler(
        dim=VISION, depth=2, dim_head=8, heads=2, num_latents=3, max_num_frames=4, max_num_media=3
    ).double()
    randomise(theirs)
    with torch.no_grad():
        for name in ("latents", "norm.weight", "norm.bias"):
            ours.get_parameter(name).copy_(theirs.get_parameter(name))
        ours.frame_embeddings.copy_(theirs.frame_embs)
        ours.image_embeddings.copy_(theirs.media_time_embs[:, 0])
        for own, (attention, ffn) in zip(ours.layers, theirs.layers, strict=True):
            k, v = attention.to_kv.weight.chunk(2)
            own["to_k"].weight.copy_(k), own["to_v"].weight.copy_(v)
            for role, source in (
                *((role, getattr(attention, role)) for role in ("norm_media", "norm_latents", "to_q", "to_out")),
                *zip(("ffn_norm", "ffn_up", "ffn_down"), (ffn[0], ffn[1], ffn[3]), strict=True),
            ):
                own[role].load_state_dict(source.state_dict())
    pixels = torch.randn(2, 3, 2, 3, 16, 16, dtype=torch.float64)
    patches = model.model.vision_encoder(pixels.flatten(0, 2)).unflatten(0, (2, 3, 2))
    expected = theirs(patches)
    torch.testing.assert_close(ours(patches), expected)
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected)
    masked = torch.tensor([[1, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(model.get_image_features(pixels, masked).pooler_output[1, :2], expected[1, :2])


def test_clear_errors() -> None:
    model = flamingo(max_frames=2, max_images=2)
    inputs, _ = _videos()
    with pytest.raises(ValueError, match="got 3 frames but the resampler has embeddings for 2"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"got 3 images a sample; .* for 2 \(max_images\)"):
        model.get_image_features(torch.zeros(1, 3, 3, 16, 16))
    with pytest.raises(ValueError, match="padding before a frame"):
        model.get_image_features(inputs["pixel_values"][:, :, :2], torch.tensor([[[0, 1], [1, 1]]]).expand(3, -1, -1))
    with pytest.raises(ValueError, match=r"expected .*videos with their frames"):
        model.get_image_features(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="a flag for each token and image"):
        model(**prompts(), image_index=torch.ones(3, 7, 3, dtype=torch.bool))

"""The native Flamingo: cached generation is the full forward, rows and samples do not touch each other, nothing leaks."""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mllm_fast.models import BridgeMismatchError, Flamingo
from mllm_fast.models.flamingo_options import LATER
from tests.models.helpers import GREEDY, IMAGE, PAD, Vision, config, flamingo, language_model, prompts


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "mpt"])
def test_cached_generation_is_the_full_forward(kind: str) -> None:
    model = flamingo(kind)
    ids, mask, images, image_mask = prompts()
    inputs = {"image_mask": image_mask, "attention_mask": mask}
    output = model.generate(ids, images, **inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    mask = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
    full = model(output.sequences, images, image_mask=image_mask, attention_mask=mask).logits
    torch.testing.assert_close(torch.stack(output.logits, dim=1), full[:, 6:-1], rtol=1e-4, atol=1e-4)
    uncached = model.generate(ids, images, **(inputs | {"attention_mask": mask[:, :7]}), **GREEDY, use_cache=False)
    assert torch.equal(uncached, output.sequences)


@pytest.mark.parametrize("beams", [1, 3])
def test_each_sample_is_what_it_is_alone(beams: int) -> None:
    """Left padding, other samples, padding images and other beams change nothing."""
    model = flamingo()
    ids, mask, images, image_mask = prompts()
    together = model.generate(
        ids, images, image_mask=image_mask, attention_mask=mask, num_beams=beams, num_return_sequences=beams, **GREEDY
    )
    for row in range(3):
        kept = mask[row].bool()
        own = images[row][image_mask[row]]
        alone = model.generate(
            ids[row, kept][None],
            own[None] if len(own) else None,
            num_beams=beams,
            num_return_sequences=beams,
            **GREEDY,
        )
        assert torch.equal(together[row * beams : (row + 1) * beams, int((~kept).sum()) :], alone)


def test_media_for_one_sample_serve_every_row() -> None:
    model = flamingo()
    ids, mask, images, _ = prompts()
    media = model.encode_images(images[:1])
    shared = model(ids, media=media, attention_mask=mask).logits
    repeated = model(ids, images[:1].expand(3, *images.shape[1:]), attention_mask=mask).logits
    torch.testing.assert_close(shared, repeated)


def test_each_token_reads_the_last_image_before_it() -> None:
    model = flamingo()
    ids, _, images, _ = prompts()
    base = model(ids[:1], images[:1]).logits
    changed = images[:1].clone()
    changed[:, 1] += 1
    difference = (model(ids[:1], changed).logits - base).abs().amax(dim=-1)[0]
    assert torch.all(difference[:4] == 0)
    assert torch.all(difference[4:] > 1e-4)
    index = model.image_index(ids[:1], 2)
    assert index.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert torch.equal(model(ids[:1], images[:1], image_index=index).logits, base)
    none = torch.full_like(index, -1)
    unseen = model(ids[:1], images[:1], image_index=none).logits
    assert torch.equal(unseen, model(ids[:1], changed, image_index=none).logits)


def test_images_are_encoded_once_and_media_projected_once_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = flamingo()
    ids, mask, images, image_mask = prompts()
    forms: list[tuple[int, ...]] = []
    real = nn.functional.linear

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        for block in model.blocks:
            if weight.data_ptr() == block.to_k.weight.data_ptr():
                forms.append(tuple(x.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counting)
    model.generate(ids, images, image_mask=image_mask, attention_mask=mask, num_beams=3, **GREEDY)
    assert model.vision_encoder.seen == int(image_mask.sum())
    assert len(forms) == len(model.blocks)
    assert all(math.prod(form[:-1]) == 3 * 2 * 3 for form in forms), "one copy of the media a sample, not a beam"


def test_nothing_is_left_between_generations() -> None:
    model = flamingo()
    ids, mask, images, image_mask = prompts()
    inputs = {"image_mask": image_mask, "attention_mask": mask}
    first = model.generate(ids, images, **inputs, **GREEDY)
    other = model.generate(ids, images.flip(0) + 1, **(inputs | {"image_mask": None}), **GREEDY)
    assert not torch.equal(first, other)
    assert torch.equal(model.generate(ids, images, **inputs, **GREEDY), first)
    # After an error too, and for the language model by itself.
    text = ids[2:, 1:]
    alone = model.lm(text).logits
    with pytest.raises(ValueError, match="media tokens"):
        model.generate(ids[:1], images[:1, :1], **GREEDY)
    assert torch.equal(model.lm(text).logits, alone)


def test_generations_in_two_threads_do_not_meet() -> None:
    model = flamingo()
    ids, mask, images, image_mask = prompts()
    runs = [(images, image_mask), (images.flip(0) + 1, torch.ones_like(image_mask))]

    def generate(run: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return model.generate(ids, run[0], image_mask=run[1], attention_mask=mask, **GREEDY)

    alone = [generate(run) for run in runs]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(generate, runs), alone, strict=True))


def test_the_language_model_is_untouched() -> None:
    torch.manual_seed(0)
    lm = language_model()
    ids = torch.randint(4, 40, (2, 6))
    names, before = list(lm.state_dict()), lm(ids).logits
    model = Flamingo(lm, Vision(), config())
    assert model.lm is lm
    assert type(lm).__name__ == "LlamaForCausalLM"
    assert list(lm.state_dict()) == names
    assert torch.equal(lm(ids).logits, before)
    assert not any(p.requires_grad for p in lm.parameters())
    media_token = ids.clone()
    media_token[:, 0] = IMAGE
    nn.init.ones_(model.blocks[0].attn_gate)
    conditioned = model(media_token, torch.randn(2, 1, 2, 4, 3)).logits
    assert not torch.allclose(conditioned, lm(media_token).logits)
    model.detach_language_model()
    assert not any(module._forward_pre_hooks for module in lm.modules())


def test_a_language_model_inside_peft() -> None:
    """PEFT calls its base model's forward past the hooks on it, and generates with the base model itself."""
    peft = pytest.importorskip("peft")
    plain = flamingo()
    ids, mask, images, image_mask = prompts()
    inputs = {"image_mask": image_mask, "attention_mask": mask}
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = Flamingo(peft.get_peft_model(copy.deepcopy(plain).detach_language_model(), lora), Vision(), config())
    model.load_state_dict({**plain.bridge_state_dict(), **_prefixed(plain.vision_encoder)}, strict=False)
    model.eval()
    torch.testing.assert_close(model(ids, images, **inputs).logits, plain(ids, images, **inputs).logits)
    assert torch.equal(model.generate(ids, images, **inputs, **GREEDY), plain.generate(ids, images, **inputs, **GREEDY))


def _prefixed(vision: nn.Module) -> dict[str, torch.Tensor]:
    return {f"vision_encoder.{name}": value for name, value in vision.state_dict().items()}


def test_a_bridge_saved_before_videos_still_loads(tmp_path: Path) -> None:
    """Its files lack the options that came with them."""
    model = flamingo()
    weights, written = tmp_path / "bridge.safetensors", tmp_path / "bridge.json"
    model.save_bridge(tmp_path)
    old = {k: v for k, v in json.loads(written.read_text()).items() if k not in LATER}
    written.write_text(json.dumps(old))
    save_file(load_file(weights), weights, metadata={"config": json.dumps(old)})
    loaded = Flamingo.from_bridge(tmp_path, model.lm, model.vision_encoder)
    ids, mask, images, _ = prompts()
    expected = model(ids, images, attention_mask=mask).logits
    assert torch.equal(loaded(ids, images, attention_mask=mask).logits, expected)
    with pytest.raises(BridgeMismatchError, match="previous_images: the file has False, the model has True"):
        Flamingo(model.lm, Vision(), config(previous_images=True)).load_bridge(tmp_path)


def test_two_models_over_one_language_model_do_not_meet() -> None:
    first = flamingo()
    ids, mask, images, image_mask = prompts()
    inputs = {"image_mask": image_mask, "attention_mask": mask}
    expected = first(ids, images, **inputs).logits
    second = Flamingo(first.lm, Vision(), config(every=1))
    nn.init.constant_(second.blocks[0].attn_gate, 2.0)
    second(ids, images, **inputs)
    assert torch.equal(first(ids, images, **inputs).logits, expected)


def test_a_copy_is_independent() -> None:
    model = flamingo()
    ids, mask, images, image_mask = prompts()
    inputs = {"image_mask": image_mask, "attention_mask": mask}
    expected = model(ids, images, **inputs).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids, images, **inputs).logits, expected)
    nn.init.zeros_(copied.blocks[0].attn_gate)
    assert not torch.equal(copied(ids, images, **inputs).logits, expected)
    assert torch.equal(model(ids, images, **inputs).logits, expected)


@pytest.mark.parametrize("train_vision", [False, True])
def test_checkpointing_changes_no_gradient(train_vision: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = flamingo(train_vision=train_vision).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        ids, mask, images, image_mask = prompts()
        labels = ids.masked_fill(ids == PAD, -100)
        loss = model(ids, images, image_mask=image_mask, attention_mask=mask, labels=labels).loss
        other = model(ids, images + 1, image_mask=image_mask, attention_mask=mask, labels=labels).loss
        (loss + other).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert set(gradients[0]) == set(flamingo(train_vision=train_vision).bridge_state_dict())
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.abs().max() > 0, name


def test_training_reaches_every_trained_parameter_and_no_other() -> None:
    model = flamingo()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.bridge_state_dict())
    assert not any(name.startswith(("lm.", "vision_encoder.")) for name in trained)


def test_clear_errors() -> None:
    with pytest.raises(ValueError, match="no decoder layers were found in Linear"):
        Flamingo(nn.Linear(2, 2), Vision(), config())
    with pytest.raises(ValueError, match="every=5 leaves no gated block; choose 1 to 4"):
        Flamingo(language_model(), Vision(), config(every=5))
    model = flamingo()
    ids, mask, images, image_mask = prompts()
    with pytest.raises(ValueError, match=r"sample 0 has 2 media tokens .* but 1 images"):
        model(ids, images[:, :1])
    with pytest.raises(ValueError, match=r"sample 0 has 2 media tokens .* but 0 images"):
        model(ids)
    with pytest.raises(ValueError, match="pass one of them"):
        model(ids, images, media=model.encode_images(images))
    with pytest.raises(ValueError, match=r"expected .samples, images, channels"):
        model(ids, images[0])
    with pytest.raises(ValueError, match=r"image_mask has shape \(3, 1\)"):
        model(ids, images, image_mask=image_mask[:, :1])
    with pytest.raises(ValueError, match="with 3 samples"):
        model(ids, images[:2])
    with pytest.raises(ValueError, match="vision_dim=24"):
        Flamingo(language_model(), Vision(dim=8), config())(ids, images)
    cache = model(ids, images, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="pass image_index"):
        model(ids[:, :1], images, past_key_values=cache)


def test_a_manual_decoding_step_with_image_index() -> None:
    model = flamingo()
    ids, mask, images, image_mask = prompts()
    media = model.encode_images(images, image_mask)
    full = model(ids, media=media, image_mask=image_mask, attention_mask=mask).logits
    start = model(
        ids[:, :6], media=media, image_index=model.image_index(ids, 2, image_mask)[:, :6], attention_mask=mask[:, :6]
    )
    step = model(
        ids[:, 6:],
        media=media,
        image_index=model.image_index(ids, 2, image_mask)[:, 6:],
        attention_mask=mask,
        past_key_values=start.past_key_values,
    )
    torch.testing.assert_close(step.logits[:, 0], full[:, -1], rtol=1e-4, atol=1e-4)

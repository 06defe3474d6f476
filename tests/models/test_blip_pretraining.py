"""BLIP pretraining against the original's computation, written out over transformers' own modules.

The original no longer imports (its `med.py` needs functions that transformers has dropped), so `original_losses` follows
`BLIP_Pretrain.forward` of salesforce/BLIP line by line over unfused modules with the same weights, in fp64.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration

import mllm_fast
from mllm_fast.models.blip_pretraining import BlipPretraining
from mllm_fast.models.original_checkpoint import CheckpointMismatchError
from tests.families.builders import randomise
from tests.families.instruments import recording

ENC, DEC, WIDTH, QUEUE, VISION = 98, 99, 12, 10, 40


def build(seed: int = 0, **options: Any) -> BlipPretraining:
    config = BlipConfig(
        text_config={
            "vocab_size": 100, "hidden_size": 32, "encoder_hidden_size": VISION, "intermediate_size": 48,
            "projection_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
            "pad_token_id": 0, "bos_token_id": DEC, "eos_token_id": 2, "sep_token_id": 2,
        },
        vision_config={
            "hidden_size": VISION, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8,
        },
        image_text_hidden_size=WIDTH,
    )  # fmt: skip
    torch.manual_seed(seed)  # the queues
    model = BlipPretraining(config, encoder_token_id=ENC, bos_token_id=DEC, queue_size=QUEUE, **options)
    randomise(model, seed)
    with torch.no_grad():
        model.temperature.fill_(0.3)
    return model.double()


def batch(pairs: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (pairs, 7))
    mask = torch.ones_like(ids)
    for row, length in enumerate((7, 5, 3, 6)[:pairs]):
        ids[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(pairs, 3, 32, 32).double()}


NEGATIVES = (torch.tensor([1, 0, 3, 2]), torch.tensor([2, 3, 0, 0]))


def original_losses(m: BlipPretraining, data: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    ids, mask, n = data["input_ids"], data["attention_mask"], len(data["input_ids"])
    image = m.vision_model(pixel_values=data["pixel_values"]).last_hidden_state
    image_feat = F.normalize(m.vision_projection(image[:, 0]), dim=-1)
    text = m.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    text_feat = F.normalize(m.text_projection(text[:, 0]), dim=-1)
    with torch.no_grad():
        if m.training:
            for a, b in (
                (m.vision_model, m.vision_model_m),
                (m.text_encoder, m.text_encoder_m),
                (m.vision_projection, m.vision_projection_m),
                (m.text_projection, m.text_projection_m),
            ):
                for p, q in zip(a.parameters(), b.parameters(), strict=True):
                    q.data = q.data * 0.995 + p.data * (1.0 - 0.995)
        image_m = F.normalize(
            m.vision_projection_m(m.vision_model_m(pixel_values=data["pixel_values"])[0][:, 0]), dim=-1
        )
        text_m = F.normalize(m.text_projection_m(m.text_encoder_m(input_ids=ids, attention_mask=mask)[0][:, 0]), dim=-1)
        image_all = torch.cat([image_m.t(), m.image_queue.clone()], dim=1)
        text_all = torch.cat([text_m.t(), m.text_queue.clone()], dim=1)
        sim_targets = torch.zeros(n, n + QUEUE).double()
        sim_targets.fill_diagonal_(1)
        i2t_targets = alpha * F.softmax(image_m @ text_all / m.temperature, dim=1) + (1 - alpha) * sim_targets
        t2i_targets = alpha * F.softmax(text_m @ image_all / m.temperature, dim=1) + (1 - alpha) * sim_targets
    i2t = -torch.sum(F.log_softmax(image_feat @ text_all / m.temperature, dim=1) * i2t_targets, dim=1).mean()
    t2i = -torch.sum(F.log_softmax(text_feat @ image_all / m.temperature, dim=1) * t2i_targets, dim=1).mean()
    enc_ids = ids.clone()
    enc_ids[:, 0] = ENC
    wrong_image, wrong_text = NEGATIVES
    positive = m.text_encoder(input_ids=enc_ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
    negative = m.text_encoder(
        input_ids=torch.cat([enc_ids, enc_ids[wrong_text]]),
        attention_mask=torch.cat([mask, mask[wrong_text]]),
        encoder_hidden_states=torch.cat([image[wrong_image], image]),
    ).last_hidden_state
    scores = m.itm_head(torch.cat([positive[:, 0], negative[:, 0]]))
    itm = F.cross_entropy(scores, torch.cat([torch.ones(n), torch.zeros(2 * n)]).long())
    dec_ids = ids.clone()
    dec_ids[:, 0] = DEC
    labels = dec_ids.masked_fill(dec_ids == 0, -100)
    decoder = copy.copy(m.text_decoder)
    decoder.label_smoothing = 0.1
    lm = decoder(input_ids=dec_ids, attention_mask=mask, encoder_hidden_states=image, labels=labels).loss
    return {"itc": (i2t + t2i) / 2, "itm": itm, "lm": lm, "loss": (i2t + t2i) / 2 + itm + lm}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_losses_gradients_and_queues_equal_the_original(fused: bool, alpha: float) -> None:
    ours, theirs = build(fused=fused), build(fused=False)
    # Momentum is updated and queues are filled in training; dropout is 0 in this configuration.
    ours.train()
    theirs.train()
    data = batch()
    expected = original_losses(theirs, data, alpha)
    expected["loss"].backward()
    found = ours(**data, alpha=alpha, negatives=NEGATIVES)
    found["loss"].backward()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, msg=lambda m, name=name: f"{name}: {m}")
    expected_gradients = gradients(theirs)
    assert gradients(ours).keys() == expected_gradients.keys()
    for name, value in gradients(ours).items():
        torch.testing.assert_close(
            value, expected_gradients[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, value in theirs.named_parameters():
        if "_m." in name:
            torch.testing.assert_close(dict(ours.named_parameters())[name], value)
    assert int(ours.queue_ptr) == 4


def test_the_queue_wraps_and_keeps_the_newest() -> None:
    model = build().train()
    for _ in range(3):
        data = batch()
        with torch.no_grad():
            model(**data, negatives=NEGATIVES)
    assert int(model.queue_ptr) == 2
    with torch.no_grad():
        feature = F.normalize(
            model.vision_projection_m(model.vision_model_m(pixel_values=data["pixel_values"])[0][:, 0]), dim=-1
        )
    torch.testing.assert_close(model.image_queue[:, [8, 9, 0, 1]].t(), feature, rtol=1e-6, atol=1e-6)


def test_evaluation_changes_nothing() -> None:
    model = build().eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        losses = [model(**batch(), negatives=NEGATIVES)["loss"] for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_shared() -> None:
    model = build()
    encoder, decoder = model.text_encoder, model.text_decoder.bert
    assert decoder.embeddings is encoder.embeddings
    for a, b in zip(encoder.encoder.layer, decoder.encoder.layer, strict=True):
        assert a.crossattention is b.crossattention
        assert a.intermediate is b.intermediate
        assert a.output is b.output
        assert a.attention is not b.attention
    assert model.text_decoder.cls.predictions.decoder.weight is encoder.embeddings.word_embeddings.weight


def test_matching_projects_each_image_once() -> None:
    counts = []
    for fused in (True, False):
        model = build(fused=fused).eval()
        data = batch()
        image = model.vision_model(pixel_values=data["pixel_values"]).last_hidden_state.detach()
        with torch.no_grad(), recording() as seen:
            model._match(image, data["input_ids"], data["attention_mask"], NEGATIVES)
        counts.append(seen.work(VISION))
    assert counts[0] * 3 == counts[1]


def test_negatives_are_drawn_among_the_others() -> None:
    from mllm_fast.models.blip_pretraining import _drawn

    similarity = torch.zeros(3, 3)
    similarity[0, 1] = 50.0
    draws = torch.stack([_drawn(similarity) for _ in range(50)])
    assert bool((draws[:, 0] == 1).all())
    assert not bool((draws == torch.arange(3)).any())
    assert set(draws[:, 1].tolist()) == {0, 2}


def original_state(model: BlipPretraining) -> dict[str, Tensor]:
    """The original's names, from its code and from timm's ViT."""
    state = {}
    for name, value in model.state_dict().items():
        new = name.replace("vision_projection", "vision_proj").replace("text_projection", "text_proj")
        new = "temp" if new == "temperature" else new
        for ours, theirs in (("vision_model_m.", "visual_encoder_m."), ("vision_model.", "visual_encoder.")):
            if new.startswith(ours):
                new = theirs + new.removeprefix(ours)
                for a, b in (
                    ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
                    ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers", "blocks"),
                    ("layer_norm", "norm"), ("self_attn.projection", "attn.proj"), ("self_attn", "attn"),
                    ("post_layernorm", "norm"),
                ):  # fmt: skip
                    new = new.replace(a, b)
        state[new] = value.clone()
    state["text_encoder.embeddings.position_ids"] = torch.arange(32)[None]
    return state


def test_original_checkpoints(tmp_path: Path) -> None:
    trained, fresh = build(1), build(2)
    torch.save({"model": original_state(trained), "epoch": 3}, tmp_path / "model_base.pth")
    fresh.load_original(tmp_path / "model_base.pth")
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    state = original_state(trained)
    del state["itm_head.bias"]
    torch.save({"model": state}, tmp_path / "short.pth")
    with pytest.raises(CheckpointMismatchError, match=r"missing: itm_head\.bias"):
        fresh.load_original(tmp_path / "short.pth")


@pytest.mark.parametrize("fused", [False, True])
def test_what_was_trained_captions(fused: bool, tmp_path: Path) -> None:
    """The captioning model predicts what the loss of language modelling is of, and goes through transformers' files."""
    model, data = build(fused=fused).eval(), batch()
    captioner = model.captioner()
    with torch.no_grad():
        ids = data["input_ids"].clone()
        ids[:, 0] = DEC
        logits = captioner(data["pixel_values"], ids, data["attention_mask"]).logits[:, :-1]
        labels = ids[:, 1:].masked_fill(data["attention_mask"][:, 1:] == 0, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        torch.testing.assert_close(loss, model(**data, negatives=NEGATIVES)["lm"])
        assert {id(p) for p in captioner.parameters()} <= {id(p) for p in model.parameters()}
        captions = [captioner.generate(data["pixel_values"], max_new_tokens=4, num_beams=beams) for beams in (1, 3)]
        captioner.save_pretrained(tmp_path)
        again, info = BlipForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        for beams, expected in zip((1, 3), captions, strict=True):
            assert torch.equal(again.generate(data["pixel_values"], max_new_tokens=4, num_beams=beams), expected)
    # What is trained further is seen.
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[7] += 1e4
    assert bool((captioner.generate(data["pixel_values"], max_new_tokens=2)[:, 1:] == 7).all())


def test_bad_input() -> None:
    model, data = build(), batch()
    with pytest.raises(ValueError, match="one text for each image"):
        model(**{**data, "pixel_values": data["pixel_values"][:3]})
    with pytest.raises(ValueError, match="vocabulary"):
        BlipPretraining(model.config, encoder_token_id=100, bos_token_id=DEC)
    small = BlipPretraining(model.config, encoder_token_id=ENC, bos_token_id=DEC, queue_size=3).double().train()
    with pytest.raises(ValueError, match="queue_size"):
        small(**data, negatives=NEGATIVES)


def test_unfuse_and_fuse_again() -> None:
    model = build().eval()
    data = batch()
    with torch.no_grad():
        fused = model(**data, negatives=NEGATIVES)["loss"]
        mllm_fast.unfuse(model)
        torch.testing.assert_close(model(**data, negatives=NEGATIVES)["loss"], fused)

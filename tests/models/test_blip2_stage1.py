"""BLIP-2's first stage: its three objectives against upstream's modules and an explicit UniLM pass, and what it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

import mllm_fast
from mllm_fast.models import stage1_passes
from mllm_fast.models.blip2_stage1 import Blip2Stage1
from mllm_fast.models.contrast import hard_negatives
from mllm_fast.models.lavis_checkpoint import LavisMismatchError, load_lavis, save_lavis
from mllm_fast.verification import verify
from tests.families.instruments import Recorder, assert_same, assert_within_twice, recording
from tests.families.qformers import DIM, FFN, IMAGE, QUERIES, VOCABULARY, retrieval
from tests.models.lavis_files import copied, norm, qformer, tensors, vision
from tests.models.stage1_models import (
    DEC,
    LAYERS,
    LENGTH,
    NEGATIVES,
    PAIRS,
    PATCHES,
    SEP,
    Reference,
    batch,
    results,
    stage1,
)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_and_gradients_equal_the_explicit_passes(train: bool, checkpointed: bool) -> None:
    model, upstream = (m.double().train(train) for m in stage1())
    reference = Reference(upstream, model)
    if checkpointed:
        model.retrieval.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(results(model, torch.float64, negatives=NEGATIVES), results(reference, torch.float64))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unfused_it_runs_upstreams_modules(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, upstream = (m.double().train() for m in stage1())
    expected = results(Reference(upstream, model), torch.float64)
    fused = results(model, torch.float64, negatives=NEGATIVES)
    mllm_fast.unfuse(model)
    model.retrieval.qformer.set_attn_implementation(attention)
    with recording() as seen:
        unfused = results(model, torch.float64, negatives=NEGATIVES)
    assert any(gemm.k == IMAGE and gemm.n == DIM for gemm in seen.gemms)  # nothing is stacked
    assert_same(unfused, expected)
    with pytest.raises(ValueError, match=r"unfused; only a step's losses"):
        model.similarity(**batch())
    given = batch()
    with pytest.raises(ValueError, match="got 3 images and 2 texts"):
        model(given["input_ids"][:2], given["attention_mask"][:2], given["pixel_values"])
    monkeypatch.setattr(stage1_passes, "processes", lambda: (0, 2))
    with pytest.raises(ValueError, match="one process's pairs only"):
        model(**batch())
    mllm_fast.fuse(model)
    assert_same(results(model, torch.float64, negatives=NEGATIVES, across_processes=False), fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_verifies(dtype: torch.dtype) -> None:
    model, _ = stage1()
    given = batch() | {"negatives": NEGATIVES}
    report = verify(model.to(dtype), given | {"pixel_values": given["pixel_values"].to(dtype)})
    assert report.passed, report
    assert {row.name for row in report.outputs} == {"loss", "itc", "itm", "itg"}
    assert report.fused > LAYERS


def test_reentrant_checkpointing_reaches_what_generation_reads_of_contrast() -> None:
    model, upstream = (m.double().train() for m in stage1())
    model.retrieval.gradient_checkpointing_enable({"use_reentrant": True})
    ours = results(model, torch.float64, negatives=NEGATIVES)
    assert_same(ours, results(Reference(upstream, model), torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_the_error_of_upstreams_modules(dtype: torch.dtype) -> None:
    ours, theirs, exact = [], [], []
    for seed in range(4):
        model, upstream = stage1(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data *= 0.7
        upstream.load_state_dict(model.retrieval.state_dict())
        model.to(dtype)
        reference = Reference(upstream.to(dtype), model)
        exact.append(results(copy.deepcopy(reference).float(), torch.float32, seed))
        theirs.append(results(reference, dtype, seed))
        ours.append(results(model, dtype, seed, negatives=NEGATIVES))
    assert_within_twice(ours, theirs, exact)


def test_cached_features_train_what_images_through_a_frozen_tower_train() -> None:
    model, _ = stage1()
    model.double().train().retrieval.vision_model.requires_grad_(False)
    expected = results(model, torch.float64, negatives=NEGATIVES)
    given = batch()
    with torch.no_grad():
        features = model.encode_images(given.pop("pixel_values"))
    model.zero_grad(set_to_none=True)
    with recording() as record:
        losses = model(**given, features=features, negatives=NEGATIVES)
        losses["loss"].backward()
    found = losses | {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same({name: value.detach() for name, value in found.items()}, expected)
    assert not any("vision_model" in name for name in found)
    assert not any(g.k == IMAGE and g.n == 3 * IMAGE for g in record.gemms)  # the tower did not run


def test_dropout_is_active_in_every_pass() -> None:
    model, _ = stage1(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model.train()
    first, second = (results(model, torch.float32, negatives=NEGATIVES) for _ in range(2))
    assert all(first[name] != second[name] for name in ("itc", "itm", "itg"))
    model.eval()
    first, second = (results(model, torch.float32, negatives=NEGATIVES) for _ in range(2))
    assert_same(first, second, 0.0)


def test_similarity_and_matching_equal_upstream() -> None:
    model, upstream = (m.double() for m in stage1())
    given = batch()
    itc = upstream(**given).logits_per_image
    torch.testing.assert_close(model.similarity(**given), itc, rtol=0, atol=1e-12)
    itm = upstream(**given, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(model.match(**given), itm, rtol=0, atol=1e-12)
    features = model.encode_images(given.pop("pixel_values"))
    torch.testing.assert_close(model.match(**given, features=features), itm, rtol=0, atol=1e-12)


def test_matching_by_index() -> None:
    model, upstream = (m.double() for m in stage1())
    given, index = batch(), torch.tensor([2, 0, 2])
    expected = upstream(**given | {"pixel_values": given["pixel_values"][index]}, use_image_text_matching_head=True)
    ours = model.match(**given, image_index=index)
    torch.testing.assert_close(ours, expected.logits_per_image, rtol=0, atol=1e-12)
    one = given | {"pixel_values": given["pixel_values"][:1]}
    copied = given | {"pixel_values": given["pixel_values"][:1].expand(PAIRS, -1, -1, -1)}
    expected = upstream(**copied, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(model.match(**one), expected, rtol=0, atol=1e-12)


class _Config(PreTrainedConfig):
    model_type = "explicit_unilm"


class Explicit(PreTrainedModel, GenerationMixin):
    """What transformers' own `generate` gives when each step is the joint pass over queries and all text, without a cache."""

    config_class = _Config

    def __init__(self, reference: Reference, pixels: Tensor) -> None:
        super().__init__(_Config(vocab_size=VOCABULARY))
        self.reference = reference
        self.image = reference.retrieval.vision_model(pixels).last_hidden_state
        self.generation_config = GenerationConfig(bos_token_id=DEC, eos_token_id=SEP, pad_token_id=0)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        image = self.image.repeat_interleave(len(input_ids) // len(self.image), 0)
        return CausalLMOutputWithPast(logits=self.reference.joint(input_ids, image))


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}, {"do_sample": True}],
    ids=str,
)
def test_generated_text_equals_generate_over_explicit_joint_passes(how: dict[str, Any], prompted: bool) -> None:
    for seed in range(2):
        model, upstream = (m.double() for m in stage1(seed))
        given = batch(seed)
        prompt = given["input_ids"][:, 1:4] if prompted else None
        start = torch.full((PAIRS, 1), DEC)
        start = start if prompt is None else torch.cat((start, prompt), 1)
        torch.manual_seed(0)
        with torch.no_grad():
            explicit = Explicit(Reference(upstream, model), given["pixel_values"])
            theirs = explicit.generate(input_ids=start, max_new_tokens=7, use_cache=False, **how)
        torch.manual_seed(0)
        ours = model.generate_text(given["pixel_values"], prompt_ids=prompt, max_new_tokens=7, **how)
        assert torch.equal(ours, theirs), (ours, theirs)


def recorded(model: Blip2Stage1, **more: Any) -> Recorder:
    given = batch()
    with recording() as record:
        model(**given | {"pixel_values": given["pixel_values"].float()}, **more)
    return record


def image_gemms(record: Recorder) -> list[tuple[int, int]]:
    """Rows and columns of the projections of image features, the vision tower's own apart."""
    return [(g.m, g.n) for g in record.gemms if g.k == IMAGE and g.n % DIM == 0]


def test_a_step_projects_each_image_once_for_all_objectives() -> None:
    model, upstream = stage1()
    assert image_gemms(recorded(model, negatives=NEGATIVES)) == [(PAIRS * PATCHES, 3 * 2 * DIM)]
    with torch.no_grad():
        assert image_gemms(recorded(model, negatives=NEGATIVES)) == [(PAIRS * PATCHES, 3 * 2 * DIM)]
    given = batch()
    with recording() as record:
        Reference(upstream, model)(**given | {"pixel_values": given["pixel_values"].float()})
    rows = sum(m * n for m, n in image_gemms(record))
    # Once for contrast, three times for matching, and in the explicit joint pass once more.
    assert rows == 5 * PAIRS * PATCHES * 3 * 2 * DIM


def test_a_step_computes_only_rows_that_somebody_reads() -> None:
    model, _ = stage1()
    second = [g for g in recorded(model, negatives=NEGATIVES).gemms if g.k == FFN]
    full = LAYERS - 1
    lengths = batch()["attention_mask"].sum(1)
    queries, text, read = PAIRS * QUERIES, int(lengths.sum()), int(lengths[NEGATIVES[1]].sum())
    assert text < PAIRS * LENGTH
    rows = LAYERS * queries  # contrast: queries
    rows += full * text + PAIRS  # contrast: text, of which the last layer computes the first row
    rows += LAYERS * 3 * queries + full * (2 * text + read)  # matching: no text in the last layer
    rows += LAYERS * (text - PAIRS)  # generation: no queries, and the last token predicts nothing
    assert sum(g.m for g in second) == rows


def test_generation_reads_the_image_once_and_one_text_row_a_step() -> None:
    model, _ = stage1()
    pixels = batch()["pixel_values"].float()
    model.lm_head.bias.data[SEP] = -100  # no text ends
    with recording() as record:
        model.generate_text(pixels, max_new_tokens=5, num_beams=3)
    assert sum(m for m, _ in image_gemms(record)) <= PAIRS * PATCHES
    rows = [g.m for g in record.gemms if g.k == FFN]
    assert rows == LAYERS * [PAIRS * QUERIES] + 5 * LAYERS * [3 * PAIRS]


def test_negatives_are_drawn_among_the_others_and_the_more_alike_the_likelier() -> None:
    model, _ = stage1()
    scores = torch.tensor([[0.9, 0.5, -0.9], [0.1, 0.9, 0.1], [-0.9, 0.7, 0.9]]) / model.temperature
    drawn = [hard_negatives((scores, scores.t()), 0) for _ in range(50)]
    image, text = (torch.stack(part) for part in zip(*drawn, strict=True))
    assert not (image == torch.arange(3)).any()
    assert not (text == torch.arange(3)).any()
    assert (text[:, 0] == 1).all()  # text 1 is far more like image 0 than text 2 is
    assert (text[:, 1] == 0).any()
    assert (text[:, 1] == 2).any()
    assert results(model, torch.float32)["itm"].isfinite()


def lavis_checkpoint(model: Blip2Stage1, tower: bool) -> dict[str, Tensor]:
    """The model's parameters under LAVIS's names, spelled out independently of the loader's rules."""
    r, head = model.retrieval, "Qformer.cls.predictions."
    state = qformer(r.qformer, r.qformer.layernorm, r.embeddings) | norm(r.vision_model)
    state |= {"query_tokens": r.query_tokens, "temp": model.temperature, f"{head}bias": model.lm_head.bias}
    state |= {
        f"{head}decoder.bias": model.lm_head.bias,
        f"{head}decoder.weight": r.embeddings.word_embeddings.weight,
    }
    parts = {"vision_proj": r.vision_projection, "text_proj": r.text_projection, "itm_head": r.itm_head}
    parts |= {f"{head}transform.dense": model.lm_head.dense, f"{head}transform.LayerNorm": model.lm_head.norm}
    return copied(state | tensors(parts) | (vision(r.vision_model) if tower else {}))


@pytest.mark.parametrize("tower", [False, True])
def test_lavis_checkpoints_load(tower: bool, tmp_path: Any) -> None:
    trained, _ = stage1(1)
    checkpoint = lavis_checkpoint(trained, tower)
    torch.save({"model": checkpoint, "epoch": 3}, tmp_path / "stage1.pth")
    model, _ = stage1(2)
    if not tower:
        model.retrieval.vision_model.load_state_dict(trained.retrieval.vision_model.state_dict())
        model.retrieval.vision_model.post_layernorm.weight.data.fill_(0.5)
    load_lavis(model, tmp_path / "stage1.pth")
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    trained.retrieval.vision_model.post_layernorm.eps = 1e-5
    given = batch() | {"pixel_values": batch()["pixel_values"].float()}
    ours, theirs = (m(**given, negatives=NEGATIVES)["loss"] for m in (model, trained))
    assert torch.equal(ours, theirs)
    back = torch.load(save_lavis(model, tmp_path / "back.pth", vision=tower), weights_only=True)["model"]
    implied = ("position_ids", "decoder.bias", "decoder.weight")  # tied, or no parameter
    assert set(back) == {name for name in checkpoint if not name.endswith(implied)}
    for name, value in back.items():
        assert torch.equal(value, checkpoint[name].reshape(value.shape)), name
    assert back["temp"].shape == ()


def test_a_lavis_checkpoint_that_does_not_fit_lists_everything_and_changes_nothing() -> None:
    trained, _ = stage1(1)
    checkpoint = lavis_checkpoint(trained, tower=False)
    del checkpoint["itm_head.bias"]
    del checkpoint["Qformer.bert.encoder.layer.1.attention.self.query.weight"]
    checkpoint["t5_proj.weight"] = torch.zeros(2, 2)
    checkpoint["Qformer.bert.embeddings.word_embeddings.weight"] = torch.zeros(VOCABULARY - 1, DIM)
    model, _ = stage1(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LavisMismatchError) as caught:
        load_lavis(model, checkpoint)
    for line in (
        "missing: retrieval.itm_head.bias",
        "missing: retrieval.qformer.encoder.layer.1.attention.attention.query.weight",
        "unexpected: t5_proj.weight",
        "shape of retrieval.embeddings.word_embeddings.weight: the checkpoint has (59, 24), the model has (60, 24)",
    ):
        assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 5
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bad_input() -> None:
    model, upstream = (m.double() for m in stage1())
    given = batch()
    with pytest.raises(ValueError, match=r"attention_mask is missing; expected \(3, 6\)"):
        model(given["input_ids"], None, given["pixel_values"])
    with pytest.raises(ValueError, match="got 3 images and 2 texts"):
        model(given["input_ids"][:2], given["attention_mask"][:2], given["pixel_values"])
    left = given | {"attention_mask": given["attention_mask"].flip(1)}
    with pytest.raises(ValueError, match="pad texts on the right"):
        model(**left)
    with pytest.raises(ValueError, match="at least two"):
        model(**{name: value[:1] for name, value in given.items()})
    with pytest.raises(ValueError, match="either pixel_values or features"):
        model.match(given["input_ids"], given["attention_mask"])
    with pytest.raises(ValueError, match=r"expected \[3, P\], a prompt an image"):
        model.generate_text(given["pixel_values"], prompt_ids=given["input_ids"][:2])
    with pytest.raises(ValueError, match="vocabulary has 60 words"):
        Blip2Stage1(upstream, bos_token_id=60, eos_token_id=SEP)
    with pytest.raises(ValueError, match="use_qformer_text_input=True"):
        Blip2Stage1(retrieval(use_qformer_text_input=False), bos_token_id=DEC, eos_token_id=SEP)

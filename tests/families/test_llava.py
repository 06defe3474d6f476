"""HF LLaVA: projector, image splice and the vision layers that nobody reads, against upstream; and our own projector."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

import mllm_fast
from mllm_fast.modules.projector import Projector, splice_rows
from tests.families.builders import randomise
from tests.families.instruments import Results, assert_same, backward_results, check_precision, recording
from tests.families.llava_models import FFN, IMAGE_TOKEN, PATCHES, TEXT, VISION, VISION_LAYERS, inputs, model
from tests.families.upstream_versions import ENCODER_OUTPUTS


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def results(llava: nn.Module, given: dict[str, Any], dtype: torch.dtype = torch.float64, **kwargs: Any) -> Results:
    """Logits, image features, and every gradient."""
    llava.to(dtype).zero_grad()
    pixels = given["pixel_values"].to(dtype).requires_grad_()
    out = llava(**(given | {"pixel_values": pixels}), **kwargs)
    results = backward_results(out.logits * given["attention_mask"][..., None], {"pixels": pixels}, llava)
    return results | {"image_hidden_states": out.image_hidden_states.detach()}


def vision_layers(llava: nn.Module, call: Any) -> float:
    """How many vision layers the call runs."""
    with recording() as seen:
        call(llava)
    return sum(g.k == FFN for g in seen.gemms)


@pytest.mark.parametrize("left", [0, 3], ids=["full", "left_padded"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_model(level: int, left: int) -> None:
    """Llama's norms are in fp32 whatever the type, hence the tolerance."""
    fused, upstream = twins(model(), level=level)
    given = inputs(left=left)
    assert_same(results(fused, given), results(upstream, given), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_projector_precision(dtype: torch.dtype) -> None:
    def run(projector: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        x = torch.randn(3, PATCHES, VISION, generator=torch.Generator().manual_seed(seed)).bfloat16().half()
        x = x.to(dtype).requires_grad_()
        return backward_results(projector(x), {"x": x}, projector)

    check_precision(lambda seed: model(seed).model.multi_modal_projector, mllm_fast.fuse, run, dtype)


def test_model_precision() -> None:
    def run(llava: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        given = inputs(seed=seed)
        return results(llava, given | {"pixel_values": given["pixel_values"].bfloat16().half()}, dtype)

    check_precision(lambda seed: model(seed), mllm_fast.fuse, run, torch.bfloat16)


@pytest.mark.parametrize(
    "options",
    [
        {"multimodal_projector_bias": False},
        {"projector_hidden_act": "gelu_pytorch_tanh"},
        {"projector_hidden_act": "linear"},
    ],
    ids=str,
)
def test_other_projectors(options: dict[str, Any]) -> None:
    fused, upstream = twins(model(**options))
    assert type(fused.model.multi_modal_projector).__qualname__ == "FusedLlavaMultiModalProjector"
    assert_same(results(fused, inputs()), results(upstream, inputs()), 1e-5)


def test_an_unknown_activation_is_left_alone() -> None:
    fused = model(projector_hidden_act="mish")
    report = mllm_fast.fuse(fused)
    assert [row.reason for row in report.left_alone] == ["its activation is MishActivation, which no kernel computes"]


def test_losses_and_tuples() -> None:
    fused, upstream = twins(model().double())
    given = inputs()
    given["pixel_values"] = given["pixel_values"].double()
    labels = given["input_ids"].masked_fill(given["input_ids"] == IMAGE_TOKEN, -100)
    losses = [m(**given, labels=labels).loss for m in (fused, upstream)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for m, reference in ((fused, upstream), (fused.model, upstream.model)):
        ours, theirs = m(**given, return_dict=False), reference(**given, return_dict=False)
        assert [type(x) for x in ours] == [type(x) for x in theirs]
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ours[-1], theirs[-1], atol=1e-6, rtol=1e-6)


def test_text_alone_and_wrong_arguments() -> None:
    fused, upstream = twins(model())
    ids = inputs()["input_ids"].clamp_max(80)
    torch.testing.assert_close(fused(input_ids=ids).logits, upstream(input_ids=ids).logits)
    torch.testing.assert_close(fused.model(ids)[0], upstream.model(ids)[0])
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        fused(pixel_values=inputs()["pixel_values"])


@pytest.mark.parametrize("given", ["inputs_embeds", pytest.param("mm_encoder_outputs", marks=ENCODER_OUTPUTS)])
def test_precomputed_inputs(given: str) -> None:
    fused, upstream = twins(model())
    logits = []
    for m in (fused, upstream):
        arguments: dict[str, Any] = inputs()
        if given == "inputs_embeds":
            arguments[given] = m.get_input_embeddings()(arguments.pop("input_ids"))
        else:
            features = m.get_image_features(pixel_values=arguments.pop("pixel_values"), return_dict=True)
            arguments[given] = {"image": features}
        logits.append(m(**arguments).logits)
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("left", [0, 3], ids=["full", "left_padded"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}],
    ids=str,
)
def test_generate(options: dict[str, Any], left: int) -> None:
    fused, upstream = twins(model())
    settings = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = (m.generate(**inputs(left=left), **(settings | options)) for m in (fused, upstream))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)


# the vision layers that nobody reads


FEATURE_LAYERS = [(-2, 3), (-1, 4), (1, 1), (4, 4), ([-2, 1], 3), ([0, 2], 2), ([-5, -4], 1), ([1, -1], 4)]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(("feature_layer", "layers"), FEATURE_LAYERS, ids=str)
def test_vision_layers(feature_layer: int | list[int], layers: int, tower: str) -> None:
    fused, upstream = twins(model(tower=tower, vision_feature_layer=feature_layer))
    given = inputs()
    ours, theirs = results(fused, given), results(upstream, given)
    assert_same(ours, theirs, 1e-5)
    with torch.no_grad():
        assert vision_layers(fused, lambda m: m(**given)) == layers
        assert vision_layers(fused, lambda m: m.generate(**given, max_new_tokens=3)) == layers
        assert vision_layers(upstream, lambda m: m(**given)) == VISION_LAYERS


def test_the_call_names_the_layer() -> None:
    fused, upstream = twins(model())
    given = inputs() | {"vision_feature_layer": -4, "vision_feature_select_strategy": "default"}
    given["pixel_values"] = given["pixel_values"].double()
    fused.double(), upstream.double()
    torch.testing.assert_close(fused(**given).logits, upstream(**given).logits, atol=1e-6, rtol=1e-6)
    assert vision_layers(fused, lambda m: m(**given)) == 1


@pytest.mark.parametrize("kwargs", [{}, {"output_hidden_states": True}, {"vision_feature_layer": -3}], ids=str)
def test_who_asks_for_image_features_gets_all_outputs(kwargs: dict[str, Any]) -> None:
    fused, upstream = twins(model())
    pixels = inputs()["pixel_values"]
    ours, theirs = (m.get_image_features(pixel_values=pixels, return_dict=True, **kwargs) for m in (fused, upstream))
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output)
    assert [h is None for h in ours.hidden_states] == [h is None for h in theirs.hidden_states]
    for mine, reference in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        if reference is not None:
            torch.testing.assert_close(mine, reference)
    assert vision_layers(fused, lambda m: m.get_image_features(pixel_values=pixels, **kwargs)) == VISION_LAYERS


def test_a_layer_that_is_watched_runs() -> None:
    fused, _ = twins(model())
    calls: list[int] = []
    fused.model.vision_tower.encoder.layers[-1].mlp.register_forward_hook(lambda *_: calls.append(1))
    fused(**inputs())
    assert calls == [1]


def test_a_feature_layer_that_does_not_exist() -> None:
    fused, upstream = twins(model())
    for m in (fused, upstream):
        with pytest.raises(IndexError):
            m(**inputs(), vision_feature_layer=-9)


def test_gradient_checkpointing() -> None:
    fused, upstream = twins(model().double().train())
    for m in (fused, upstream):
        m.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(results(fused, inputs()), results(upstream, inputs()), 1e-5)


# the splice


def test_splice_is_bitwise_masked_scatter() -> None:
    embeddings, places = torch.randn(3, 7, 5), torch.rand(3, 7) < 0.4
    rows = torch.randn(int(places.sum()), 5)
    outputs = []
    for splice in (splice_rows, lambda e, p, r: e.masked_scatter(p[..., None], r)):
        leaves = [embeddings.clone().requires_grad_(), rows.clone().requires_grad_()]
        out = splice(leaves[0], places, leaves[1])
        out.backward(torch.arange(105.0).view(3, 7, 5))
        outputs.append([out, leaves[0].grad, leaves[1].grad])
    for mine, reference in zip(*outputs, strict=True):
        assert torch.equal(mine, reference)


def test_splice_without_an_image_and_of_strided_embeddings() -> None:
    embeddings = torch.randn(7, 3, 5).transpose(0, 1)
    nowhere = torch.zeros(3, 7, dtype=torch.bool)
    assert torch.equal(splice_rows(embeddings, nowhere, torch.empty(0, 5)), embeddings)
    everywhere = splice_rows(embeddings, ~nowhere, torch.ones(21, 5))
    assert torch.equal(everywhere, torch.ones(3, 7, 5))


def test_the_splice_makes_no_mask_as_large_as_the_embeddings() -> None:
    fused, upstream = twins(model())
    for m, scatters in ((fused, 0), (upstream, 1)):
        with torch.no_grad(), recording() as seen:
            m(**inputs())
        assert seen.count("masked_scatter") == scatters


@pytest.mark.parametrize("images", [1, 2, 4])
def test_image_tokens_that_do_not_match_the_images(images: int) -> None:
    fused, _ = twins(model())
    given = inputs() | {"pixel_values": torch.randn(images, 3, 28, 28)}
    expected = rf"has 12 image tokens \(id {IMAGE_TOKEN}\), but the images have {images * PATCHES} features"
    for call in (fused, fused.generate):
        with pytest.raises(ValueError, match=expected):
            call(**given)
    embeddings = fused.get_input_embeddings()(given.pop("input_ids"))
    with pytest.raises(ValueError, match=rf"but the images have {images * PATCHES} features"):
        fused(**given, inputs_embeds=embeddings)


# around it


def test_lora_on_the_projector() -> None:
    upstream = model()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    for m in (fused, upstream):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["linear_1", "q_proj"]), m)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in m.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    ours = results(fused, inputs())
    assert any("linear_1.lora_B" in name for name in ours)
    assert_same(ours, results(upstream, inputs()), 1e-5)


def test_a_hooked_activation_runs_upstreams_code() -> None:
    fused, upstream = twins(model())
    calls: list[int] = []
    fused.model.multi_modal_projector.act.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(fused(**inputs()).logits, upstream(**inputs()).logits)
    assert calls == [1]


def test_fuse_and_back() -> None:
    upstream = model()
    fused = copy.deepcopy(upstream)
    report = mllm_fast.fuse(fused)
    assert [row.now for row in report.fused] == [
        "FusedLlavaForConditionalGeneration", "FusedLlavaModel", "FusedCLIPEncoder", "FusedLlavaMultiModalProjector",
    ]  # fmt: skip
    assert report.left_alone == []
    assert list(fused.state_dict()) == list(upstream.state_dict())
    clones = (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)))
    expected = fused(**inputs()).logits
    for clone in clones:
        assert torch.equal(clone(**inputs()).logits, expected)
        assert vision_layers(clone, lambda m: m(**inputs())) == VISION_LAYERS - 1
    mllm_fast.unfuse(fused)
    for (name, ours), theirs in zip(fused.named_modules(), upstream.modules(), strict=True):
        assert type(ours) is type(theirs), name
        assert not [key for key in ours.__dict__ if "mllm_fast" in key], name
    assert vision_layers(fused, lambda m: m(**inputs())) == VISION_LAYERS
    mllm_fast.fuse(fused)
    assert vision_layers(fused, lambda m: m(**inputs())) == VISION_LAYERS - 1


def test_a_clip_by_itself_is_left_alone() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPModel.config_class(
        text_config=CLIPTextConfig(vocab_size=50, **sizes).to_dict(),
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes).to_dict(),
    )
    with pytest.raises(mllm_fast.NothingToFuseError, match="only in a LLaVA is it known"):
        mllm_fast.fuse(CLIPModel(config))


# our own projector


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_own_projector(kind: str, layers: int) -> None:
    projector = randomise(Projector(VISION, TEXT, kind)).double()
    parts: list[nn.Module] = []
    for linear in projector.layers:
        parts += [linear, nn.GELU()]
    reference = nn.Sequential(*parts[:-1])
    assert len(projector.layers) == layers
    x = torch.randn(2, 3, VISION).double()
    torch.testing.assert_close(projector(x), reference(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "mlp0x_gelu", "identity"])
def test_unknown_projector(kind: str) -> None:
    with pytest.raises(ValueError, match="kind must be 'linear' or 'mlp<n>x_gelu'"):
        Projector(VISION, TEXT, kind)

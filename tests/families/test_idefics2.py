"""HF Idefics2: connector and resampler with grouped queries, RMS norms and a patch mask, against upstream."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Idefics2Config, Idefics2ForConditionalGeneration

import mllm_fast
from tests.families.builders import randomise
from tests.families.instruments import Results, assert_same, backward_results, check_precision, run_module

IMAGE_TOKEN, LATENTS = 100, 4


def model(seed: int = 0, **perceiver: Any) -> Idefics2ForConditionalGeneration:
    config = Idefics2Config(
        image_token_id=IMAGE_TOKEN,
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
            "patch_size": 14,
        },
        perceiver_config={
            "hidden_size": 64, "rms_norm_eps": 1e-5, "resampler_n_latents": LATENTS, "resampler_depth": 3,
            "resampler_n_heads": 4, "resampler_head_dim": 24, "num_key_value_heads": 2, **perceiver,
        },
        text_config={
            "model_type": "mistral", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2,
        },
    )  # fmt: skip
    return randomise(Idefics2ForConditionalGeneration(config), seed).eval()


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Two prompts: two images, the second with padding to the right and below; one image, and a padding image."""
    ids = torch.randint(3, 99, (2, 14))
    ids[0, 1 : 1 + LATENTS] = ids[0, 8 : 8 + LATENTS] = ids[1, 3 : 3 + LATENTS] = IMAGE_TOKEN
    pixels = torch.randn(2, 2, 3, 56, 56, dtype=dtype)
    pixels[1, 1] = 0
    mask = torch.ones(2, 2, 56, 56, dtype=torch.bool)
    mask[0, 1, 28:] = mask[0, 1, :, 42:] = False
    mask[1, 1] = False
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "pixel_attention_mask": mask,
    }  # fmt: skip


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def results(net: nn.Module, given: dict[str, Any]) -> Results:
    net.zero_grad()
    out = net(**given, labels=given["input_ids"])
    return backward_results(out.loss, {}, net) | {"logits": out.logits.detach()}


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_model(level: int, training: bool) -> None:
    fused, upstream = twins(model().double().train(training), level=level)
    given = inputs()
    # Upstream's RMS norms compute in fp32 whatever the model is in.
    assert_same(results(fused, given), results(upstream, given), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resampler_precision(dtype: torch.dtype) -> None:
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[1, 9:] = False

    def build(seed: int) -> nn.Module:
        return model(seed).model.connector.perceiver_resampler

    def run(net: nn.Module, seed: int, kind: torch.dtype) -> Results:
        context = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return run_module(net, {"context": context}, kind, attention_mask=mask)

    check_precision(build, mllm_fast.fuse, run, dtype)


def test_hidden_patches_have_no_influence() -> None:
    fused, _ = twins(model().model.connector.perceiver_resampler.double())
    context = torch.randn(2, 16, 64, dtype=torch.float64)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 5:] = False
    other = context.clone()
    other[0, 5:] = torch.randn(11, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(fused(context, mask), fused(other, mask))
        assert not torch.equal(fused(context, mask), fused(context, torch.ones_like(mask)))


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams: int) -> None:
    fused, upstream = twins(model(3))
    given = inputs(torch.float32)
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    assert torch.equal(fused.generate(**given, **how), upstream.generate(**given, **how))


def test_what_runs_upstreams_code() -> None:
    fused, upstream = twins(model(attention_dropout=0.5).double().train())
    given = inputs()
    for net in (fused, upstream):
        net.config._attn_implementation = "eager"
    outputs = []
    for net in (fused, upstream):
        torch.manual_seed(0)
        outputs.append(net(**given).logits)
    torch.testing.assert_close(*outputs)
    with pytest.raises(mllm_fast.NothingToFuseError, match="not SiLU"):
        mllm_fast.fuse(model(hidden_act="gelu").model.connector.perceiver_resampler)


def test_fuse_and_back() -> None:
    fused, upstream = twins(model())
    names = [row.now for row in mllm_fast.fuse(copy.deepcopy(upstream)).fused]
    assert "FusedIdefics2Connector" in names
    assert "FusedIdefics2PerceiverResampler" in names
    assert fused.state_dict().keys() == upstream.state_dict().keys()
    mllm_fast.unfuse(fused)
    assert [type(a) for a in fused.modules()] == [type(b) for b in upstream.modules()]

"""No drop-in waits for the device: every forward and decode step runs on a fake GPU, where reading a tensor is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import BlipForImageTextRetrieval, DynamicCache, EncoderDecoderCache, StaticCache

import mllm_fast
from mllm_fast import ops
from mllm_fast.models import flamingo, flamingo_index
from tests.families import blip_models, frozen_decoders, llava_models, qformers, test_idefics2, test_mllama
from tests.families.blocks import KINDS, TOKENS, BlockKind
from tests.families.builders import (
    MEDIA_DIM,
    TEXT_DIM,
    idefics,
    luc_resampler,
    of_inputs,
    of_model,
    of_resampler,
    palm,
)
from tests.families.fake_gpu import DEVICE, FakeGpu, HostReadError
from tests.models import helpers, minigpt4_models, mplug_owl_models

Run = Callable[[FakeGpu, nn.Module], Any]


def ids(gpu: FakeGpu, batch: int, length: int) -> Tensor:
    return gpu.tensor(torch.zeros(batch, length, dtype=torch.long))


def visible(gpu: FakeGpu, batch: int, queries: int, keys: int) -> Tensor:
    """A finished mask, as `generate` makes it for a static cache: transformers' own functions read smaller ones."""
    return gpu.tensor(torch.zeros(batch, 1, queries, keys, dtype=torch.bool))


# the models: a prompt with images, and steps that follow it


def run_open_flamingo(gpu: FakeGpu, model: nn.Module) -> None:
    inputs = gpu.inputs(of_inputs())
    model(inputs["vision_x"], inputs["lang_x"])
    language_model, cache = model.lang_encoder, DynamicCache()
    language_model._use_cached_vision_x = True
    model._encode_vision_x(inputs["vision_x"])
    for length in (10, 1, 1, 2):
        language_model(input_ids=ids(gpu, 2, length), past_key_values=cache, use_cache=True)


def run_flamingo_pytorch(gpu: FakeGpu, model: nn.Module) -> None:
    model(ids(gpu, 2, 10), images=gpu.tensor(torch.zeros(2, 2, 7, 20)))


def run_idefics(gpu: FakeGpu, model: nn.Module) -> None:
    cache, media = DynamicCache(), {"pixel_values": gpu.tensor(torch.zeros(2, 3, 3, 28, 28))}
    for step, length in enumerate((10, 1, 1)):
        place = 9 + step
        out = model(
            input_ids=ids(gpu, 2, length),
            attention_mask=visible(gpu, 2, length, place + 1),
            position_ids=ids(gpu, 2, length),
            image_attention_mask=gpu.tensor(torch.zeros(2, length, 3, dtype=torch.long)),
            past_key_values=cache,
            use_cache=True,
            **media,
        )
        media = {"perceiver_embeddings": out.image_hidden_states}


def run_blip(gpu: FakeGpu, model: nn.Module) -> None:
    image = model.vision_model(gpu.tensor(torch.zeros(2, 3, 32, 32))).last_hidden_state
    static = EncoderDecoderCache(StaticCache(config=model.config.text_config, max_cache_len=12), DynamicCache())
    for cache in (EncoderDecoderCache(DynamicCache(), DynamicCache()), static):
        for step, length in enumerate((7, 1, 1, 2)):
            model.text_decoder(
                input_ids=ids(gpu, 4, length),
                attention_mask=gpu.tensor(torch.zeros(4, 7 + step + (length == 2), dtype=torch.long)),
                encoder_hidden_states=image,
                encoder_attention_mask=gpu.tensor(torch.zeros(2, image.shape[1], dtype=torch.long)),
                past_key_values=cache,
                use_cache=True,
            )


def run_blip_retrieval(gpu: FakeGpu, model: nn.Module) -> None:
    mask = gpu.tensor(torch.zeros(2, 7, dtype=torch.long))
    pixels = gpu.tensor(torch.zeros(2, 3, 32, 32))
    for matching in (True, False):
        model(pixel_values=pixels, input_ids=ids(gpu, 2, 7), attention_mask=mask, use_itm_head=matching)


def run_blip2(gpu: FakeGpu, model: nn.Module) -> None:
    model.set_attn_implementation({"text_config": "eager"})  # else transformers reads the language model's mask
    inputs = gpu.inputs(
        {n: x.float() if x.is_floating_point() else x for n, x in qformers.prompt("instructblip").items()}
    )
    if not isinstance(model, qformers.InstructBlipForConditionalGeneration):
        inputs = {name: x for name, x in inputs.items() if "qformer" not in name}
    model(**inputs)


def run_llava(gpu: FakeGpu, model: nn.Module) -> None:
    inputs, cache = gpu.inputs(llava_models.inputs()), DynamicCache()
    model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], past_key_values=cache, use_cache=True)
    for _ in range(2):
        model(input_ids=ids(gpu, 2, 1), past_key_values=cache, use_cache=True)


def run_mllama(gpu: FakeGpu, model: nn.Module) -> None:
    inputs, cache = gpu.inputs(test_mllama.inputs(torch.float32)), DynamicCache()
    del inputs["attention_mask"]
    model(**inputs, past_key_values=cache, use_cache=True)
    step = {"input_ids": ids(gpu, 2, 1), "cross_attention_mask": inputs["cross_attention_mask"][:, -1:]}
    model(**step, past_key_values=cache, use_cache=True)


def run_idefics2(gpu: FakeGpu, connector: nn.Module) -> None:
    features, seen = torch.zeros(3, 16, 32), torch.ones(3, 16, dtype=torch.bool)
    connector(image_hidden_states=gpu.tensor(features), attention_mask=gpu.tensor(seen))


def run_own_flamingo(gpu: FakeGpu, model: nn.Module) -> None:
    tokens, _, images, image_mask = gpu.inputs(helpers.prompts())
    model(tokens, images, image_mask=image_mask)
    cache, media = DynamicCache(), model.encode_images(images, image_mask)
    index = gpu.tensor(torch.zeros(3, 7, dtype=torch.long))
    model(tokens, media=media, image_index=index, past_key_values=cache, use_cache=True)
    model(tokens[:, :1], media=media, image_index=index[:, :1], past_key_values=cache, use_cache=True)


def run_image_rows(inputs: Callable[[], dict[str, Tensor]]) -> Run:
    def run(gpu: FakeGpu, model: nn.Module) -> None:
        cache, given = DynamicCache(), gpu.inputs(inputs())
        token_ids, pixels = given["input_ids"], given["pixel_values"]
        if torch.is_grad_enabled():
            model(input_ids=token_ids, pixel_values=pixels, labels=token_ids).loss.backward()
            return
        model(input_ids=token_ids, pixel_values=pixels, past_key_values=cache, use_cache=True)
        model(input_ids=ids(gpu, token_ids.shape[0], 1), past_key_values=cache, use_cache=True)

    return run


IMAGE_ROWS = {
    "minigpt4": (minigpt4_models.minigpt4, run_image_rows(minigpt4_models.inputs)),
    "mplug_owl": (mplug_owl_models.owl, run_image_rows(mplug_owl_models.inputs)),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    "open_flamingo": (of_model, run_open_flamingo),
    "flamingo_pytorch": (palm, run_flamingo_pytorch),
    "idefics": (idefics, run_idefics),
    "blip": (blip_models.model, run_blip),
    "blip_retrieval": (lambda: blip_models.model(BlipForImageTextRetrieval), run_blip_retrieval),
    "blip2": (lambda: qformers.generator("blip2"), run_blip2),
    "instructblip": (lambda: qformers.generator("instructblip"), run_blip2),
    "llava": (llava_models.model, run_llava),
    "mllama": (test_mllama.model, run_mllama),
    "idefics2_connector": (lambda: test_idefics2.model().model.connector, run_idefics2),
    "flamingo": (helpers.flamingo, run_own_flamingo),
    **IMAGE_ROWS,
}  # fmt: skip
# Those with upstream bugs to mend.
MENDED = ["open_flamingo", "flamingo_pytorch", "idefics", "blip", "blip_retrieval"]
# Where upstream waits, and the instrument sees it. (In the Q-Former's masks it does too, but not for fake tensors.)
UPSTREAM_READS = ["open_flamingo", "idefics", "llava"]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in MODELS), *((name, {"level": 2, "fixes": "all"}) for name in MENDED)],
    ids=[*MODELS, *(f"{name}-mended" for name in MENDED)],
)
def test_no_model_waits(gpu: FakeGpu, name: str, options: dict[str, Any]) -> None:
    build, run = MODELS[name]
    model = build()
    if name != "flamingo":  # which is ours
        mllm_fast.fuse(model, **options)
    gpu.module(model)
    with gpu.running():
        run(gpu, model)
    assert gpu.launches, "no kernel would have run"


@pytest.mark.parametrize("name", UPSTREAM_READS)
def test_upstream_waits_and_is_caught(gpu: FakeGpu, name: str) -> None:
    build, run = MODELS[name]
    model = gpu.module(build())
    with gpu.running(), pytest.raises((HostReadError, DataDependentOutputException)):
        run(gpu, model)


def test_what_a_device_works_out_is_what_the_host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of images on a GPU: all images are encoded, instead of the real ones, and padding is zeroed."""
    model = helpers.flamingo()
    tokens, mask, images, image_mask = helpers.prompts()
    results = []
    for host in (True, False):
        for module in (flamingo, flamingo_index):
            monkeypatch.setattr(module, "readable_on_host", lambda tensor, host=host: host)
        with torch.no_grad():
            media = model.encode_images(images, image_mask)
            logits = model(tokens, images, image_mask=image_mask, attention_mask=mask).logits
        results.append((media, logits))
    torch.testing.assert_close(results[1], results[0])


# parts by themselves, and their training

trained = pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])


@trained
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gated_blocks(gpu: FakeGpu, kind: BlockKind, grad: bool) -> None:
    if kind.name == "idefics":
        pytest.skip("called by itself it is given a dense mask, for which upstream's attention runs on a GPU")
    block = kind.build()
    mllm_fast.fuse(block)
    gpu.module(block)
    x = gpu.tensor(torch.zeros(2, 9, TEXT_DIM))
    media = gpu.tensor(torch.zeros(2, 3, TOKENS, kind.media_dim))
    locations = gpu.tensor(torch.zeros(2, 9, dtype=torch.bool))
    with gpu.running(grad):
        out = kind.call(block, x, media, locations)
        if grad:
            out.sum().backward()
        elif kind.has_decode:
            kind.call(block, x[:, :1], media, locations, decode=True)
    assert gpu.launches


@trained
def test_resamplers(gpu: FakeGpu, grad: bool) -> None:
    for build, shape in ((of_resampler, (2, 2, 1, 7, MEDIA_DIM)), (luc_resampler, (2, 2, 7, MEDIA_DIM))):
        resampler = build()
        mllm_fast.fuse(resampler)
        gpu.module(resampler)
        x = gpu.tensor(torch.zeros(shape))
        with gpu.running(grad):
            out = resampler(x)
            if grad:
                out.sum().backward()


@trained
@pytest.mark.parametrize("kind", qformers.KINDS, ids=str)
def test_qformers_with_text(gpu: FakeGpu, kind: qformers.Kind, grad: bool) -> None:
    """In training with dropout."""
    model = kind.build(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train(grad)
    mllm_fast.fuse(model)
    gpu.module(model)
    queries, text = gpu.tensor(torch.zeros(3, qformers.QUERIES, qformers.DIM)), ids(gpu, 3, 6)
    image = gpu.tensor(torch.zeros(3, qformers.TOKENS, qformers.IMAGE))
    given = {"input_ids": text, "query_embeds": queries}
    if kind.name == "blip2":
        both = gpu.tensor(torch.zeros(3, qformers.QUERIES + 6, qformers.DIM))
        given = {"query_embeds": both, "query_length": qformers.QUERIES}
    masks = {
        "attention_mask": gpu.tensor(torch.zeros(3, qformers.QUERIES + 6, dtype=torch.long)),
        "encoder_attention_mask": gpu.tensor(torch.zeros(3, qformers.TOKENS, dtype=torch.long)),
    }
    with gpu.running(grad):
        out = model(**given, **masks, encoder_hidden_states=image).last_hidden_state
        if grad:
            out.sum().backward()
    assert gpu.launches


@pytest.mark.parametrize("name", IMAGE_ROWS)
def test_models_with_rows_of_images_train(gpu: FakeGpu, name: str) -> None:
    build, run = IMAGE_ROWS[name]
    model = build().train()
    mllm_fast.fuse(model)
    gpu.module(model)
    with gpu.running(grad=True):
        run(gpu, model)
    assert gpu.launches


def test_decoder_layers_with_lora_train(gpu: FakeGpu) -> None:
    model = frozen_decoders.fused(frozen_decoders.adapted(kind="dense"))
    gpu.module(model)
    x = gpu.tensor(torch.zeros(2, 7, frozen_decoders.SIZES["hidden_size"]))
    with gpu.running(grad=True):
        model.model(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    assert gpu.launches


# the instrument itself


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "all": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float64),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "multinomial": lambda x: torch.multinomial(x, 1),
    "equal": lambda x: torch.equal(x, x + 1),
    "into": lambda x: torch.zeros(4).copy_(x),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_is_caught(gpu: FakeGpu, name: str) -> None:
    x = gpu.tensor(torch.zeros(4))
    with gpu.running(), pytest.raises((HostReadError, RuntimeError)):
        READS[name](x)


def test_a_read_in_backward_is_caught(gpu: FakeGpu) -> None:
    """On a device, autograd runs backward in a thread of its own."""

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad[grad > 0].expand(4)

    x = gpu.tensor(torch.zeros(4)).requires_grad_()
    with gpu.running(grad=True), pytest.raises(HostReadError):
        Reads.apply(x).sum().backward()


def test_what_needs_no_wait_is_let_through(gpu: FakeGpu) -> None:
    x = gpu.tensor(torch.zeros(2, 3))
    with gpu.running():
        index = ops.image_rows(x > 0)
        assert ops.splice_rows(gpu.tensor(torch.zeros(2, 3, 4)), gpu.tensor(torch.zeros(5, 4)), index).shape == (
            2,
            3,
            4,
        )
        x[torch.zeros(2, dtype=torch.long, device=DEVICE)].masked_fill_(x > 0, 1.0).to(DEVICE, torch.bfloat16)
    assert [launch.kernel.fn.__name__ for launch in gpu.launches] == ["gather_rows"]

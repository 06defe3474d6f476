"""`torch.compile(fullgraph=True)`: whole graphs, one for all steps, and never a stale key or weight inside of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    BlipForImageTextRetrieval,
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)

import mllm_fast
from mllm_fast.families import open_flamingo
from tests.families import blip_models, llava_models, qformers, test_idefics2, test_mllama
from tests.families.blocks import KINDS, BlockKind
from tests.families.builders import (
    IMAGE_TOKEN,
    MEDIA_DIM,
    idefics,
    idefics_inputs,
    of_inputs,
    of_model,
    of_resampler,
)
from tests.families.decoders import FlamingoDecoder
from tests.families.generating import SYSTEMS, System
from tests.families.upstream_versions import MLLAMA_STATIC_CACHE
from tests.models import helpers, minigpt4_models, mplug_owl_models

# Of the two language models that each Q-Former is built for, one: what is compiled of them is transformers' own.
pytestmark = pytest.mark.usefixtures("fresh_compiler")
systems = pytest.mark.parametrize(
    "system", [s for s in SYSTEMS if s.name not in ("blip2_t5", "instructblip_opt")], ids=str
)
# Where gated blocks read media, and how wide these are; no other weight has such rows.
MEDIA_WIDTHS = {"open_flamingo": MEDIA_DIM, "idefics": MEDIA_DIM, "flamingo": helpers.VISION_DIM}


class Backend:
    """Runs the graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.inputs: list[list[Any]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        self.inputs.append(inputs)
        return graph.forward

    def __deepcopy__(self, memo: Any) -> Backend:
        return self  # `generate` copies its options

    def reads_weights_of(self, width: int) -> bool:
        """Whether any graph is given a matrix [*, width]."""
        return any(isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == width for xs in self.inputs for x in xs)


def compiled(backend: Any) -> dict[str, Any]:
    """Options of `generate`: a static cache, and steps that are compiled whole, on a CPU too."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def logits(system: System, model: nn.Module, seed: int = 0, **options: Any) -> Tensor:
    """Of every step of a generation, [steps, B, V]."""
    recorded: list[Tensor] = []

    def record(_: Any, scores: Tensor) -> Tensor:
        recorded.append(scores.clone())
        return scores

    system.generate(model, seed, logits_processor=[record], **options)
    return torch.stack(recorded)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


# generation


@systems
def test_generation_with_a_static_cache(system: System) -> None:
    """Compiled steps equal the uncompiled ones and upstream's, and one graph serves all, whatever the weights become.

    Steps of a model with gated blocks are given the media's keys and values: its weights for them are not in the graph.
    """
    upstream = system.build()
    fused = copy.deepcopy(upstream)
    if system.name != "flamingo":  # which is ours
        mllm_fast.fuse(fused)
    backend = Backend()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            expected = logits(system, upstream, seed)
            close(logits(system, fused, seed), expected)
            close(logits(system, fused, seed, **compiled(backend)), expected)
            for model in (upstream, fused):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.1)
    assert counters["stats"]["unique_graphs"] == len(backend.graphs) == 1
    assert not counters["graph_break"]
    if system.name in MEDIA_WIDTHS:
        assert not backend.reads_weights_of(MEDIA_WIDTHS[system.name])


OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "minigpt4": (minigpt4_models.minigpt4, minigpt4_models.inputs),
    "mplug_owl": (mplug_owl_models.owl, mplug_owl_models.inputs),
    "mllama": (test_mllama.model, lambda: test_mllama.inputs(torch.float32)),
    "idefics2": (test_idefics2.model, test_idefics2.inputs),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=MLLAMA_STATIC_CACHE) if n == "mllama" else n for n in OTHERS])
def test_other_systems_with_a_static_cache(name: str) -> None:
    build, inputs = OTHERS[name]
    upstream, length = build(), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    fused, given = copy.deepcopy(upstream), {n: x for n, x in inputs().items() if n != "labels"}
    mllm_fast.fuse(fused)
    expected = upstream.generate(**given, **length)
    assert torch.equal(fused.generate(**given, **length, **compiled(Backend())), expected)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def test_upstream_breaks_where_it_waits() -> None:
    """The instrument can fail: OpenFlamingo asks at every step whether there is an image token."""
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        logits(SYSTEMS[0], SYSTEMS[0].build(), **compiled("eager"))


def test_upstream_blip_mixes_text_and_image_keys_in_a_static_cache() -> None:
    with pytest.raises(IndexError):
        blip_models.model().generate(**blip_models.inputs(), max_new_tokens=6, cache_implementation="static")


def test_generation_by_inductor() -> None:
    system = SYSTEMS[0]
    upstream = system.build()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    for seed in range(2):
        close(logits(system, fused, seed, **compiled("inductor")), logits(system, upstream, seed))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("mask", ["none", "exact", "long"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["static", "encoder_decoder"])
def test_blip_static_cache_in_the_hands_of_the_caller(wrapped: bool, mask: str) -> None:
    """Prefill in two pieces, a step, and steps of several tokens, against upstream's dynamic cache."""
    upstream = blip_models.text_model(is_decoder=True).double()
    fused, keys = copy.deepcopy(upstream), 16
    mllm_fast.fuse(fused)
    static = StaticCache(config=upstream.config, max_cache_len=keys)
    caches = [EncoderDecoderCache(DynamicCache(), DynamicCache())]
    caches.append(EncoderDecoderCache(static, DynamicCache()) if wrapped else static)
    image = torch.randn(2, blip_models.TOKENS, blip_models.IMAGE, dtype=torch.float64)
    visible, seen = blip_models.text_mask("left" if mask != "none" else "none", length=13), 0
    for length in (5, 4, 1, 3):
        seen += length
        ids, results = torch.randint(3, 90, (2, length)), []
        for i, text in enumerate((upstream, fused)):
            given = None if visible is None else visible[:, :seen]
            if text is fused and mask == "long":
                given = torch.nn.functional.pad(given, (0, keys - seen), value=1)  # what lies ahead is hidden anyway
            with torch.no_grad():
                out = text(
                    input_ids=ids,
                    attention_mask=given,
                    encoder_hidden_states=image,
                    past_key_values=caches[i],
                    use_cache=True,
                    is_decoder=True,
                )
            caches[i] = out.past_key_values
            results.append(out.last_hidden_state)
        rows = slice(3 if seen == 5 and visible is not None else 0, None)  # padding is read by nobody
        torch.testing.assert_close(results[1][:, rows], results[0][:, rows], atol=1e-9, rtol=1e-9)


# media keys and values in compiled steps


def test_a_step_that_is_given_no_keys_projects_the_media_itself() -> None:
    """`model.forward` compiled by hand: right, if slower."""
    upstream = idefics()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    backend, results = Backend(), []
    inputs, length = idefics_inputs(), 14
    for model in (upstream, fused):
        step = torch.compile(model.forward, fullgraph=True, backend=backend) if model is fused else model.forward
        cache, found = StaticCache(config=model.config, max_cache_len=length), []
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            out = model(**inputs, past_key_values=cache, use_cache=True)
            media, mask = out.image_hidden_states, inputs["attention_mask"]
            for place in range(10, 13):
                if place == 12:
                    media.mul_(1.5)  # in place: nothing that was made of it may live on
                mask = torch.nn.functional.pad(mask[:, :place], (0, 1), value=1)
                out = step(
                    input_ids=torch.full((2, 1), 5 + place),
                    attention_mask=torch.nn.functional.pad(mask, (0, length - place - 1)),
                    position_ids=torch.full((2, 1), place),
                    image_attention_mask=inputs["image_attention_mask"][:, -1:],
                    perceiver_embeddings=media,
                    past_key_values=cache,
                    use_cache=True,
                )
                found.append(out.logits)
        results.append(torch.stack(found))
    close(results[1], results[0])
    assert backend.reads_weights_of(MEDIA_DIM) and len(backend.graphs) == 1


@pytest.mark.parametrize("fixes", [(), ("generated_image_tokens",)], ids=["upstream's", "mended"])
def test_open_flamingo_steps_with_image_tokens(monkeypatch: pytest.MonkeyPatch, fixes: tuple[str, ...]) -> None:
    """What a device or a trace works out by itself is what the CPU's path gives, which reads the tokens."""
    models = [of_model(), of_model()]
    for model in models:
        mllm_fast.fuse(model, fixes=fixes)
    inputs = of_inputs(images=3)
    results = []
    for model, host in zip(models, (True, False), strict=True):
        monkeypatch.setattr(open_flamingo, "readable_on_host", lambda tensor, host=host: host)
        decoder = FlamingoDecoder(model, inputs)
        with torch.no_grad():
            decoder.step()
            for rows in ((7, 8), (IMAGE_TOKEN, 9), (10, 11), (12, IMAGE_TOKEN), (IMAGE_TOKEN, IMAGE_TOKEN), (13, 14)):
                decoder.step(torch.tensor(rows).unsqueeze(1))
            decoder.step(torch.tensor(((5, IMAGE_TOKEN, 6), (7, 8, IMAGE_TOKEN))))
            decoder.step(torch.tensor(((5,), (6,))))
        results.append(torch.stack(decoder.logits))
    close(results[1], results[0])


# whole forwards, and training


def _prompt(name: str) -> dict[str, Tensor]:
    return {n: x.float() if x.is_floating_point() else x for n, x in qformers.prompt(name).items()}


FORWARDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    # how to build it, its inputs, the output that is looked at
    "open_flamingo_resampler": (of_resampler, {"x": torch.linspace(-1, 1, 2 * 2 * 7 * 48).view(2, 2, 1, 7, 48)}, ""),
    "blip_retrieval": (
        lambda: blip_models.model(BlipForImageTextRetrieval),
        blip_models.inputs(left=2) | {"use_itm_head": True},
        "itm_score",
    ),
    **{
        name: (lambda name=name: qformers.generator(name), _prompt(name), "logits")
        for name in ("blip2", "instructblip")
    },
    "llava": (llava_models.model, llava_models.inputs(), "logits"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_whole_forward_and_its_gradients(name: str) -> None:
    build, inputs, output = FORWARDS[name]
    backend = "aot_eager" if "resampler" in name else "eager"  # the former takes minutes for the whole models
    upstream = build()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)

    def run(model: nn.Module) -> Tensor:
        out = model(**inputs)
        return getattr(out, output) if output else out

    with torch.no_grad():
        run(fused)  # transformers hooks its recorders of hidden states on at the first request, under a lock
    results = []
    for model, call in ((upstream, run), (fused, torch.compile(run, fullgraph=True, backend=backend))):
        out = call(model)
        out.square().mean().backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    close(results[1][0], results[0][0])
    assert results[0][1].keys() == results[1][1].keys()
    for parameter, gradient in results[0][1].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(results[1][1][parameter] / scale, gradient / scale, atol=1e-4, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_gated_block(kind: BlockKind) -> None:
    """By itself: prefill and decode, where the media's keys and values are part of the graph."""
    upstream = kind.build()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    x, media, locations = kind.inputs()
    for decode in (False, True) if kind.has_decode else (False,):
        text = x[:, :1] if decode else x
        call = torch.compile(
            lambda text, decode=decode: kind.call(fused, text, media, locations, decode=decode),
            fullgraph=True,
            backend="aot_eager",
        )
        with torch.no_grad():
            close(call(text), kind.call(upstream, text, media, locations, decode=decode))
    assert not counters["graph_break"]


def test_weights_that_change_between_compiled_calls() -> None:
    """Stacked and folded weights are made inside of the graph."""
    upstream = of_resampler()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    call, x = torch.compile(fused, fullgraph=True, backend="aot_eager"), torch.randn(2, 2, 1, 7, MEDIA_DIM)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            close(call(x), upstream(x))
            close(fused(x), upstream(x))  # uncompiled calls in between keep theirs
            for model in (upstream, fused):
                model.layers[1][0].norm_media.weight.mul_(1.3)
                model.layers[0][0].to_kv.weight.mul_(0.9)


def test_llava_image_tokens_are_counted_in_a_trace() -> None:
    fused = llava_models.model()
    mllm_fast.fuse(fused)
    given = llava_models.inputs()
    call = torch.compile(lambda **kwargs: fused(**kwargs).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = fused(**given).logits
        close(call(**given), expected)
        given["input_ids"][0, 0] = llava_models.IMAGE_TOKEN
        with pytest.raises(RuntimeError, match="features"):
            call(**given)

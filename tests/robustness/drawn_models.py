"""Small models of every system with drawn sizes, masks and options, in fp64, and one pass through each.

Each strategy gives a `Drawn`: a model with all its parameters drawn, and what runs it and collects outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.families import blip_models, builders, llava_models, qformers, test_idefics2, test_mllama
from tests.families.blocks import image_masks
from tests.families.instruments import Results, backward_results
from tests.models import mplug_owl_models

seeds = st.integers(0, 99)


@dataclass(frozen=True)
class Drawn:
    """A model in fp64, and its outputs and gradients on inputs that are the same each time.

    `peer` stands for the model where upstream's own code does not run in fp64, `options` are those of `fuse`.
    """

    model: nn.Module
    results: Callable[[nn.Module], Results]
    peer: nn.Module | None = None
    options: dict[str, Any] = field(default_factory=dict)


def passing(
    call: Callable[..., Tensor], inputs: dict[str, Tensor], fixed: torch.dtype | None = None
) -> Callable[[nn.Module], Results]:
    """What calls `call(model, **inputs)` on fresh leaves in the model's dtype, with values that 16 bits hold exactly.

    `fixed` takes the place of the model's dtype.
    """
    given = {name: t.bfloat16().half() if t.is_floating_point() else t for name, t in inputs.items()}

    def results(model: nn.Module) -> Results:
        dtype = fixed or next(t.dtype for t in model.parameters() if t.is_floating_point())
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
        model.zero_grad(set_to_none=True)
        leaves = {name: t.clone().requires_grad_() for name, t in cast.items() if t.is_floating_point()}
        found = backward_results(call(model, **(cast | leaves)), leaves, model)
        with torch.no_grad():  # what was kept by now may serve these
            return found | {f"again {i}": call(model, **cast) for i in range(2)}

    return results


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    out: Tensor = model(**inputs).logits
    return out


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in inputs.items()}


def places(draw: st.DrawFn, batch: int, length: int) -> Tensor:
    """Where the images' tokens are: anywhere, none, or more of them than images."""
    rows = [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(batch)]
    return torch.tensor(rows, dtype=torch.bool).view(batch, length)


@st.composite
def gated_blocks(draw: st.DrawFn, build: Callable[..., nn.Module]) -> Drawn:
    """A gated block of open_flamingo or flamingo-pytorch; its media may be shared by an expanded batch."""
    batch, length, images = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 11])), draw(st.integers(1, 4))
    tokens, heads = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 3))
    head_dim, immediate = draw(st.sampled_from([4, 8, 20])), draw(st.booleans())
    options = {"dim": draw(st.sampled_from([8, 12])), "heads": heads, "dim_head": head_dim, "ff_mult": 2}
    media_dim = options["dim"]
    if build is builders.of_block:
        media_dim = options["dim_visual"] = draw(st.sampled_from([8, 10]))
    model = build(immediate, seed=draw(seeds), **options).double()
    where = places(draw, batch, length)

    def call(module: nn.Module, x: Tensor, media: Tensor) -> Tensor:
        out: Tensor = module(x, media, media_locations=where)
        return out

    inputs = {"x": normal(batch, length, options["dim"]), "media": normal(batch, images, tokens, media_dim)}
    return Drawn(model, passing(call, inputs))


@st.composite
def resamplers(draw: st.DrawFn, build: Callable[..., nn.Module]) -> Drawn:
    batch, images, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 7]))
    options = {
        "dim": draw(st.sampled_from([8, 12])), "depth": draw(st.integers(1, 3)), "heads": draw(st.integers(1, 3)),
        "dim_head": draw(st.sampled_from([4, 8, 20])), "num_latents": draw(st.sampled_from([1, 3, 5])), "ff_mult": 2,
    }  # fmt: skip
    shape: tuple[int, ...] = (batch, images, tokens, options["dim"])
    if build is builders.of_resampler:
        shape = (batch, images, draw(st.integers(1, 2)), tokens, options["dim"])
        options["max_num_frames"] = draw(st.sampled_from([None, 2]))
        options["max_num_media"] = draw(st.sampled_from([None, 3]))
    model = build(seed=draw(seeds), **options).double()
    return Drawn(model, passing(lambda module, x: module(x), {"x": normal(*shape)}))


@st.composite
def idefics_layers(draw: st.DrawFn) -> Drawn:
    batch, length, images = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7])), draw(st.integers(1, 3))
    options = {"qk_norms": draw(st.booleans()), "alpha": draw(st.sampled_from(["vector", "float"]))}
    # Of a row that sees nothing, the eager form has NaN gradients.
    whole = builders.idefics(seed=draw(seeds), resampler=False, **options)
    model = whole.model.gated_cross_attn_layers[0].double()
    where, tokens = places(draw, batch, length), draw(st.sampled_from([1, 4]))

    def call(module: nn.Module, x: Tensor, media: Tensor) -> Tensor:
        out: Tensor = module(x, None, media.flatten(1, 2), **image_masks(where, media, x, decode=False))
        return out

    inputs = {"x": normal(batch, length, builders.TEXT_DIM), "media": normal(batch, images, tokens, builders.MEDIA_DIM)}
    return Drawn(model, passing(call, inputs))


@st.composite
def idefics(draw: st.DrawFn) -> Drawn:
    kind = draw(st.sampled_from(["incremental", "many", "scattered", "nothing", "everything"]))
    options = {"resampler": draw(st.booleans()), "qk_norms": draw(st.booleans())}
    inputs = builders.idefics_inputs(kind, draw(st.integers(1, 3)), 13, draw(st.integers(1, 3)), seed=draw(seeds))
    return Drawn(builders.idefics(seed=draw(seeds), **options).double(), passing(logits, widened(inputs)))


@st.composite
def blip_texts(draw: st.DrawFn) -> Drawn:
    options = {"num_hidden_layers": draw(st.integers(1, 3)), "num_attention_heads": draw(st.sampled_from([1, 2, 8]))}
    model = blip_models.text_model(draw(seeds), **options).double()
    role, padding = draw(st.sampled_from(blip_models.ROLES)), draw(st.sampled_from(blip_models.PADDINGS))
    seed = draw(seeds)
    return Drawn(model, lambda module: blip_models.run_text(module, role, padding, seed=seed))


@st.composite
def qformer_models(draw: st.DrawFn) -> Drawn:
    kind, batch = draw(st.sampled_from(qformers.KINDS)), draw(st.integers(1, 4))
    options = {
        "num_hidden_layers": draw(st.integers(1, 4)), "num_attention_heads": draw(st.sampled_from([1, 2, 4])),
        "cross_attention_frequency": draw(st.integers(1, 3)),
    }  # fmt: skip
    model = kind.build(draw(seeds), **options).double()
    drawn = qformers.draw(draw(seeds), batch, queries=draw(st.sampled_from([1, 4])))
    text, shared = draw(st.booleans()), draw(st.booleans())
    rows = drawn["tokens"].shape[1]

    def call(module: nn.Module, tokens: Tensor, image: Tensor) -> Tensor:
        # The query tokens of every sample are one row, expanded, as upstream's models hand them over.
        queries = tokens.expand(batch, -1, -1) if shared else tokens.repeat(batch, 1, 1)
        given = kind.text(queries, drawn["ids"], module) if text else kind.only_queries(queries)
        mask = torch.cat((torch.ones(batch, rows, dtype=torch.long), drawn["text_mask"]), 1) if text else None
        states: Tensor = module(**given, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        if text and mask is not None:  # what padding holds is nobody's business
            states = states * mask[:, : states.shape[1], None]
        return states

    return Drawn(model, passing(call, {"tokens": drawn["tokens"], "image": drawn["image"]}))


@st.composite
def llavas(draw: st.DrawFn) -> Drawn:
    tower, layer = draw(st.sampled_from(["clip", "siglip"])), draw(st.sampled_from([-1, -2, -3, 1, [-2, -1]]))
    model = llava_models.model(draw(seeds), tower=tower, vision_feature_layer=layer).double()
    return Drawn(model, passing(logits, widened(llava_models.inputs(left=draw(st.integers(0, 4)), seed=draw(seeds)))))


@st.composite
def idefics2_models(draw: st.DrawFn) -> Drawn:
    options = {
        "resampler_depth": draw(st.integers(1, 2)), "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "resampler_head_dim": draw(st.sampled_from([8, 20])),
    }  # fmt: skip
    inputs = test_idefics2.inputs()
    for sample, image in ((0, 0), (0, 1), (1, 0)):  # each cut to the right and below; the last one is padding
        height, width = (draw(st.sampled_from([14, 28, 42, 56])) for _ in range(2))
        inputs["pixel_attention_mask"][sample, image] = False
        inputs["pixel_attention_mask"][sample, image, :height, :width] = True
    return Drawn(test_idefics2.model(draw(seeds), **options).double(), passing(logits, inputs))


@st.composite
def mllamas(draw: st.DrawFn) -> Drawn:
    options = {"num_key_value_heads": draw(st.sampled_from([1, 2, 4]))}
    attention = draw(st.sampled_from(["sdpa", "eager"]))
    model = test_mllama.model(draw(seeds), attention, **options).double()
    inputs = test_mllama.inputs(rows_without_image=draw(st.booleans()))
    if draw(st.booleans()):  # any tiles in any order, where a processor gives a beginning of each image
        generator = torch.Generator().manual_seed(draw(seeds))
        inputs["cross_attention_mask"] = torch.randint(2, inputs["cross_attention_mask"].shape, generator=generator)
    return Drawn(model, passing(logits, inputs))


@st.composite
def owls(draw: st.DrawFn) -> Drawn:
    changes = {"width": draw(st.sampled_from([32, 64])), "num_query_tokens": mplug_owl_models.QUERIES}
    model = mplug_owl_models.owl(draw(st.sampled_from(["llama", "gpt2", "opt"])), draw(seeds), **changes).double()
    return Drawn(model, passing(logits, widened(mplug_owl_models.inputs())))


@st.composite
def open_flamingos(draw: st.DrawFn) -> Drawn:
    model = builders.of_model(draw(st.sampled_from(["llama", "opt", "gpt_neox"])), every=draw(st.sampled_from([1, 2])))
    batch, images = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs = builders.of_inputs(batch, 11, images, seed=draw(seeds))
    padded = builders.left_padded(inputs, row=0, pad=draw(st.integers(0, 3)))
    model.requires_grad_(True)
    return Drawn(model.double(), passing(logits, widened(padded)))


MODELS: dict[str, st.SearchStrategy[Drawn]] = {
    "gated block of open_flamingo": gated_blocks(builders.of_block),
    "gated block of flamingo_pytorch": gated_blocks(builders.luc_block),
    "gated layer of idefics": idefics_layers(),
    "resampler of open_flamingo": resamplers(builders.of_resampler),
    "resampler of flamingo_pytorch": resamplers(builders.luc_resampler),
    "open_flamingo": open_flamingos(),
    "idefics": idefics(),
    "blip text": blip_texts(),
    "qformer": qformer_models(),
    "llava": llavas(),
    "idefics2": idefics2_models(),
    "mllama": mllamas(),
    "mplug_owl": owls(),
}

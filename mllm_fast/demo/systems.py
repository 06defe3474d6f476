"""The systems of part 1 of the demo: one builder each, with random weights, at a reduced but realistic size.

`SYSTEMS` is the table: a new system joins with one `System` entry and one builder. A builder returns the model with the
two things that are run on it, a pass over the whole prompt and a greedy continuation.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .photographs import Photograph, to_tensor

IMAGE, END_OF_CHUNK, PAD, BOS, EOS = range(5)
VOCABULARY = 5 + 256

Tick = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """How big the models of part 1 are.

    Attributes:
        image: height and width of the pictures; patches are 14 x 14 pixels.
        vision_dim, vision_layers: the vision tower.
        text_dim, text_layers: the language model; heads have 64 channels.
        latents: media tokens an image.
        resampler_depth: where the system leaves it open.
        images: in the prompt, the last of which is to be described.
        new_tokens: generated in each timed run, where the system has a cache.
        rounds: timed runs of each version.
    """

    image: int
    vision_dim: int
    vision_layers: int
    text_dim: int
    text_layers: int
    latents: int
    resampler_depth: int
    images: int
    new_tokens: int
    rounds: int


FULL = Size(224, 256, 2, 512, 6, 64, 6, 9, 16, 3)
QUICK = Size(28, 64, 1, 64, 2, 8, 2, 3, 4, 1)


@dataclass(frozen=True)
class Case:
    """One model with its inputs bound.

    Attributes:
        model: what `fuse` is given.
        forward: a pass over the prompt; returns logits [1, length, vocabulary].
        generate: (n, tick) -> prompt and n greedily chosen tokens, [1, length + n]; calls `tick` whenever the logits of
            one more token are there.
        images: how many photographs are in the prompt.
        new_tokens: how many to generate in a timed run.
    """

    model: nn.Module
    forward: Callable[[], Tensor]
    generate: Callable[[int, Tick], Tensor]
    images: int
    new_tokens: int


@dataclass(frozen=True)
class System:
    """A supported system: its name, the packages it needs beyond ours, and what builds it."""

    name: str
    needs: tuple[str, ...]
    build: Callable[[Size, list[Photograph]], Case]

    @property
    def key(self) -> str:
        """What the command line calls it: the first word of its name in lower case ("blip-2", "openflamingo")."""
        return self.name.split(" ")[0].strip(",").lower()

    def missing(self) -> list[str]:
        """The needed packages that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


def prompt(photographs: list[Photograph]) -> Tensor:
    """A few-shot prompt, byte by byte: the titles of all photographs but the last, [1, length]."""
    ids = [BOS]
    for photograph in photographs:
        last = photograph is photographs[-1]
        text = "Output:" if last else f"Output: a photo of {photograph.title}."
        ids += [IMAGE, *(byte + 5 for byte in text.encode())] + ([] if last else [END_OF_CHUNK])
    return torch.tensor([ids])


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that let every image and layer matter: upstream gates start at 0, which makes their blocks the identity."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if "gate" in last or "alpha" in last:
            parameter.fill_(0.7)
        elif "latents" in last or "emb" in name:
            parameter.normal_()
        elif parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)


def idefics(size: Size, photographs: list[Photograph]) -> Case:
    """Hugging Face IDEFICS: SwiGLU gated blocks before every second layer, 64 latents an image."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    heads = size.text_dim // 64
    config = IdeficsConfig(
        vocab_size=VOCABULARY,
        additional_vocab_size=0,
        hidden_size=size.text_dim,
        intermediate_size=size.text_dim * 8 // 3 // 64 * 64,
        num_hidden_layers=size.text_layers,
        num_attention_heads=heads,
        cross_layer_interval=2,
        alpha_type="vector",
        alpha_initializer="ones",
        qk_layer_norms=True,
        use_resampler=True,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        vision_config={
            "embed_dim": size.vision_dim,
            "image_size": size.image,
            "patch_size": 14,
            "intermediate_size": 4 * size.vision_dim,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_dim // 64,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": size.latents,
            "resampler_depth": size.resampler_depth,
            "resampler_n_heads": heads,
            "resampler_head_dim": 64,
            "qk_layer_norms_perceiver": True,
        },
    )
    model = IdeficsForVisionText2Text(config).eval()
    randomise(model)
    ids = prompt(photographs)
    seen = (ids == IMAGE).cumsum(dim=1).unsqueeze(-1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": to_tensor(photographs, size.image).unsqueeze(0),
        "image_attention_mask": (seen == torch.arange(1, len(photographs) + 1)).long(),
    }
    return Case(
        model,
        lambda: model(**inputs).logits,
        lambda new, tick: model.generate(**inputs, **greedy(new, tick)),
        len(photographs),
        size.new_tokens,
    )


def open_flamingo(size: Size, photographs: list[Photograph]) -> Case:
    """OpenFlamingo over a Llama, a gated block before every layer, a CLIP vision tower; its resampler has 6 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with _without_open_clip():
        from open_flamingo.src.factory import _infer_decoder_layers_attr_name
        from open_flamingo.src.flamingo import Flamingo
        from open_flamingo.src.flamingo_lm import FlamingoLMMixin
        from open_flamingo.src.utils import extend_instance

    class Mixin(FlamingoLMMixin):
        # transformers 5 leaves an all-ones attention mask out, which upstream's signature demands.
        def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            return super().forward(input_ids, attention_mask, **kwargs)

    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=size.text_dim,
            intermediate_size=size.text_dim * 8 // 3 // 64 * 64,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_dim // 64,
            max_position_embeddings=2048,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    extend_instance(lm, Mixin)
    lm.set_decoder_layers_attr_name(_infer_decoder_layers_attr_name(lm))
    model = Flamingo(
        types.SimpleNamespace(visual=_clip_tower(size, size.vision_dim, with_pooled=True)),
        lm,
        eoc_token_id=END_OF_CHUNK,
        media_token_id=IMAGE,
        vis_dim=size.vision_dim,
        cross_attn_every_n_layers=1,
    ).eval()
    randomise(model)
    ids, mask = prompt(photographs), torch.ones_like(prompt(photographs))
    pixels = to_tensor(photographs, size.image)[None, :, None]
    return Case(
        model,
        lambda: model(pixels, ids, attention_mask=mask).logits,
        lambda new, tick: model.generate(pixels, ids, attention_mask=mask, **greedy(new, tick)),
        len(photographs),
        size.new_tokens,
    )


def flamingo_pytorch(size: Size, photographs: list[Photograph]) -> Case:
    """flamingo-pytorch's FlamingoPaLM: gated blocks after every second layer; no cache, at most 4 images."""
    from flamingo_pytorch import FlamingoPaLM

    photographs = photographs[-4:]
    model = FlamingoPaLM(
        dim=size.text_dim,
        num_tokens=VOCABULARY,
        depth=size.text_layers,
        media_token_id=IMAGE,
        cross_attn_every=2,
        img_encoder=_clip_tower(size, size.text_dim, with_pooled=False),
        perceiver_num_latents=size.latents,
        perceiver_depth=size.resampler_depth,
    ).eval()
    randomise(model)
    ids, pixels = prompt(photographs), to_tensor(photographs, size.image).unsqueeze(0)

    def generate(new: int, tick: Tick) -> Tensor:
        text = ids
        for _ in range(new):
            logits = model(text, images=pixels)[:, -1:]
            tick()
            text = torch.cat([text, logits.argmax(dim=-1)], dim=1)
        return text

    # Every token costs a whole pass.
    return Case(model, lambda: model(ids, images=pixels), generate, len(photographs), min(size.new_tokens, 4))


SYSTEMS = (
    System("IDEFICS", (), idefics),
    System("OpenFlamingo", ("open_flamingo", "einops_exts"), open_flamingo),
    System("flamingo-pytorch", ("flamingo_pytorch", "einops_exts"), flamingo_pytorch),
)


def greedy(new: int, tick: Tick) -> dict[str, Any]:
    """Arguments of Hugging Face's `generate`."""
    from transformers import LogitsProcessorList

    def ticking(ids: Tensor, scores: Tensor) -> Tensor:
        tick()
        return scores

    return {
        "max_new_tokens": new,
        "do_sample": False,
        # An image token of its own making has no image behind it, and an end would cut the timing short.
        "suppress_tokens": [IMAGE, END_OF_CHUNK, PAD, BOS, EOS],
        "logits_processor": LogitsProcessorList([ticking]),
    }


class _ClipTower(nn.Module):
    """A CLIP vision transformer and a projection: images [N, 3, H, W] to patch tokens [N, patches, dim]."""

    def __init__(self, size: Size, dim: int, with_pooled: bool) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(
            hidden_size=size.vision_dim,
            intermediate_size=4 * size.vision_dim,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=size.vision_dim // 64,
            image_size=size.image,
            patch_size=14,
        )
        self.tower = CLIPVisionModel(config)
        self.projection = nn.Identity() if dim == size.vision_dim else nn.Linear(size.vision_dim, dim, bias=False)
        self.with_pooled = with_pooled

    def forward(self, images: Tensor) -> Any:
        """As open_clip's towers answer, (pooled, tokens), or the tokens alone."""
        tokens = self.projection(self.tower(images).last_hidden_state[:, 1:])
        return (tokens.mean(dim=1), tokens) if self.with_pooled else tokens


def _clip_tower(size: Size, dim: int, *, with_pooled: bool) -> nn.Module:
    return _ClipTower(size, dim, with_pooled).eval()


@contextlib.contextmanager
def _without_open_clip() -> Iterator[None]:
    """Let open_flamingo import where open_clip is missing: it needs it only to download models."""
    if importlib.util.find_spec("open_clip") is not None:
        yield
        return
    stub = types.ModuleType("open_clip")
    stub.__spec__ = importlib.machinery.ModuleSpec("open_clip", loader=None)
    sys.modules["open_clip"] = stub
    try:
        yield
    finally:
        sys.modules.pop("open_clip", None)

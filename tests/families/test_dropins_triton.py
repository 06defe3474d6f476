"""The drop-ins on the Triton kernels, in Triton's interpreter: outputs and all gradients are the unfused model's.

Attention runs on its kernels both ways: they are counted.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.kernels import runtime
from tests.families import blip_models, qformers
from tests.families.blocks import KINDS, image_masks
from tests.families.builders import MEDIA_DIM, idefics, luc_resampler, of_resampler
from tests.families.instruments import Results, assert_same, backward_results, run_module
from tests.kernels.triton_device import INTERPRETING, poisoned  # noqa: F401

if not INTERPRETING:
    pytest.skip("test_interpreter.py runs it in Triton's interpreter", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def launched() -> Iterator[Counter[str]]:
    """How often each kernel was launched."""
    from triton.runtime.interpreter import GridExecutor

    found: Counter[str] = Counter()
    launch = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        found[self.fn.__name__] += 1
        launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        yield found


@dataclass(frozen=True)
class Case:
    """A module of an upstream class, how its output and gradients are taken, and how many attentions it computes."""

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Results]
    attentions: int

    def __str__(self) -> str:
        return self.name


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gated_block(kind: Any) -> Case:
    def run(block: nn.Module) -> Results:
        x, media, locations = kind.inputs()
        leaves = {"x": x.requires_grad_(), "media": media.requires_grad_()}
        if kind.name == "idefics":
            masks = image_masks(locations, media.detach(), x.detach(), False)
            return backward_results(block(x, None, media.flatten(1, 2), **masks), leaves, block)
        return backward_results(block(x, media, media_locations=locations), leaves, block)

    return Case(f"{kind} block", kind.build, run, 1)


def qformer(name: str) -> Case:
    kind = qformers.Kind(name)

    def run(model: nn.Module) -> Results:
        drawn = qformers.draw(0, 2)
        tokens, image = (drawn[x].float().requires_grad_() for x in ("tokens", "image"))
        queries = tokens.expand(2, -1, -1)
        mask = torch.cat((torch.ones(2, queries.shape[1], dtype=torch.long), drawn["text_mask"]), 1)
        given = kind.text(queries, drawn["ids"], model)
        out = model(**given, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        # What upstream computes for padding is of no use to anybody.
        out = out * mask[:, : out.shape[1], None]
        return backward_results(out, {"tokens": tokens, "image": image}, model)

    # Two layers of self-attention, of which the first has cross-attention too.
    return Case(name, lambda: kind.build(num_hidden_layers=2), run, 3)


def blip_text(role: str) -> Case:
    return Case(
        f"BLIP {role}",
        lambda: blip_models.text_model(num_hidden_layers=2),
        lambda text: blip_models.run_text(text, role, "right", torch.float32),
        2 if role == "unimodal" else 4,
    )


def resampler(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], depth: int) -> Case:
    return Case(f"{name} resampler", build, lambda m: run_module(m, {"media": draw(*shape)}, torch.float32), depth)


CASES = [
    *map(gated_block, KINDS),
    resampler("open_flamingo", lambda: of_resampler(depth=2), (2, 2, 1, 7, MEDIA_DIM), 2),
    resampler("flamingo_pytorch", lambda: luc_resampler(depth=2), (2, 2, 7, MEDIA_DIM), 2),
    resampler("idefics", lambda: idefics().model.perceiver_resampler, (2, 7, MEDIA_DIM), 2),
    qformer("blip2"),
    qformer("instructblip"),
    *map(blip_text, blip_models.ROLES),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_upstreams(case: Case, launched: Counter[str]) -> None:
    upstream = case.build().float()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    with runtime.backend("triton"):
        ours = case.run(fused)
    assert launched["attention_rows"] == 2 * case.attentions, "forward and dQ of each"
    assert launched["attention_keys"] >= case.attentions, "dK and dV of each"
    launched.clear()
    with runtime.backend("torch"):
        theirs = case.run(upstream)
    assert not launched, "the unfused module launched kernels of ours"
    assert_same(ours, theirs, tolerance=2e-4)

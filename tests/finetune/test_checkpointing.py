"""Checkpointing per block: the same losses and gradients, bit for bit, with only the blocks' inputs kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

import mllm_fast
from mllm_fast.families.recipes import Recipe, recipe_of
from mllm_fast.finetune import Lora, checkpointing, prepare_finetuning
from mllm_fast.finetune.checkpointing import Recompute, RecomputedForward
from tests.families import builders, qformers
from tests.finetune.every_system import SYSTEMS, built
from tests.finetune.saved import saving
from tests.models import helpers

TRAIN = {
    "open_flamingo": "bridge", "flamingo_pytorch": "bridge", "flamingo": "bridge", "flamingo_hf": "bridge+lora",
    "idefics": "bridge+lora", "idefics2": "bridge+lora", "mllama": "bridge", "blip": "decoder+vision", "blip_vqa": "encoder",
    "blip_retrieval": "encoder", "blip_pretraining": "encoder+decoder", "blip2": "bridge+vision+lora", "blip2_t5": "bridge",
    "blip2_retrieval": "bridge", "blip2_stage1": "bridge", "instructblip": "bridge", "instructblipvideo": "bridge",
    "llava": "projection+lora", "minigpt4": "projection", "mplug_owl": "bridge+lora",
}  # fmt: skip
# A drop-in or upstream's model does the same another way while its layers are checkpointed: keys and values per layer
# instead of in one product, no cache. Equal but for the order of rounding.
OTHER_ORDER = {"blip", "blip_vqa", "blip2", "blip2_t5"}


def same(mine: Tensor, expected: Tensor, name: str) -> bool:
    if name not in OTHER_ORDER:
        return torch.equal(mine, expected)
    return bool((mine - expected).abs().max() <= 3e-5 * expected.abs().max().clamp(min=1.0))


def step(model: nn.Module, name: str, batch: dict[str, Any], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = SYSTEMS[name].loss(model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def with_dropout(model: nn.Module, p: float = 0.2) -> int:
    """Turn on the dropout that transformers' layers have as modules and as numbers; returns how many were found."""
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p, found = p, found + 1
        for name in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, p)
                found += 1
    return found


def blocks_of(model: nn.Module) -> list[nn.Module]:
    found = checkpointing.find(model, recipe_of(model))
    return [*found.switched, *found.wrapped]


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "recompute") for name in TRAIN), ("open_flamingo", "offload"), ("llava", "offload")]
)
def test_gradients_are_equal(name: str, how: Any) -> None:
    model, batch = built(name)
    lora = Lora(r=2, dropout=0.0) if "lora" in TRAIN[name] else None
    prepare_finetuning(model, TRAIN[name], lora=lora)
    initial = copy.deepcopy(model.state_dict())  # queues and momentum copies move
    with saving(model) as plain:
        expected_loss, expected = step(model, name, batch)
    model.load_state_dict(initial)
    prepare_finetuning(model, TRAIN[name], checkpointing=how)
    with saving(model) as kept:
        loss, grads = step(model, name, batch)
    assert same(loss, expected_loss, name)
    assert grads.keys() == expected.keys()
    for n, grad in expected.items():
        assert same(grads[n], grad, name), n
    assert kept.total < plain.total


@pytest.mark.parametrize("name", ["open_flamingo", "llava", "blip2", "blip"])
def test_dropout_is_that_of_the_forward_pass(name: str) -> None:
    model, batch = built(name)
    lora = Lora(r=2, dropout=0.3) if "lora" in TRAIN[name] else None
    assert with_dropout(model) or lora
    prepare_finetuning(model, TRAIN[name], lora=lora)
    _, expected = step(model, name, batch)
    _, other = step(model, name, batch, seed=4)
    assert any(not same(other[n], expected[n], name) for n in expected), "the test sees nothing: no dropout"
    prepare_finetuning(model, TRAIN[name], checkpointing="recompute")
    _, grads = step(model, name, batch)
    for n, grad in expected.items():
        assert same(grads[n], grad, name), n


@pytest.mark.parametrize("name", ["open_flamingo", "llava", "blip2"])
def test_a_checkpointed_block_keeps_its_input_only(name: str) -> None:
    model, batch = built(name)
    prepare_finetuning(model, TRAIN[name], lora=Lora(r=2) if "lora" in TRAIN[name] else None, checkpointing="recompute")
    blocks = {f"block {i}": block for i, block in enumerate(blocks_of(model))}
    with saving(model, blocks) as saved:
        step(model, name, batch)
    inside = {n: shapes for n, shapes in saved.shapes.items() if n}
    assert inside
    largest = max(numel(shape) for shapes in saved.shapes.values() for _, shape in shapes)
    for shapes in inside.values():  # hidden states, and what is shared by all blocks: media, image features
        assert len([s for s in shapes if numel(s[1]) > 1]) <= 3, shapes
    assert largest > 0


def numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def test_layers_below_the_first_trained_one_keep_nothing() -> None:
    """transformers' switch lets the embeddings ask for gradients, and every layer then keeps its input."""
    model, batch = built("llava")
    lm = model.model.language_model
    lora = Lora(r=2, targets=("layers.1.self_attn.q_proj",))
    prepare_finetuning(model, "lora", lora=lora, checkpointing="recompute")
    with saving(model, {"0": lm.layers[0], "vision": model.model.vision_tower, "embeddings": lm.embed_tokens}) as saved:
        step(model, "llava", batch)
    assert not {"0", "vision", "embeddings"} & set(saved.bytes)


@pytest.mark.parametrize("name", ["llava", "flamingo_hf"])
@pytest.mark.parametrize("how", ["none", "recompute"])
def test_transformers_own_switch_is_undone(name: str, how: Any) -> None:
    model, batch = built(name)
    (model if name == "llava" else model.model).gradient_checkpointing_enable()
    prepare_finetuning(model, "lora", lora=Lora(r=2, targets=("layers.1.self_attn.q_proj",)), checkpointing=how)
    lm = model.model.language_model if name == "llava" else model.model.lm.model
    with saving(model, {"0": lm.layers[0], "embeddings": lm.embed_tokens}) as saved:
        step(model, name, batch)
    assert not {"0", "embeddings"} & set(saved.bytes)
    assert lm.layers[1].gradient_checkpointing == (how == "recompute")


@pytest.mark.parametrize("name", ["open_flamingo", "blip2"])
def test_in_evaluation_nothing_is_recomputed(name: str) -> None:
    model, batch = built(name)
    prepare_finetuning(model, "bridge", checkpointing="recompute")
    block = blocks_of(model)[-1]
    child = next(m for m in block.modules() if isinstance(m, nn.LayerNorm | nn.Linear | nn.ReLU))
    runs: list[int] = []
    block.register_forward_hook(lambda *_: runs.append(0))
    child.register_forward_hook(lambda *_: runs.append(1))
    for mode, times in ((True, 2), (False, 1)):
        runs.clear()
        SYSTEMS[name].loss(model.train(mode), batch).backward()
        assert runs.count(0) == 1
        assert runs.count(1) == times
    runs.clear()
    with torch.no_grad():
        SYSTEMS[name].loss(model.train(), batch)
    assert runs.count(1) == 1


def test_generation_after_checkpointed_training() -> None:
    model, _ = built("flamingo")
    ids, mask, images, image_mask = helpers.prompts()
    given = {"input_ids": ids, "images": images, "image_mask": image_mask, "attention_mask": mask}
    expected = model.eval().generate(**given, **helpers.GREEDY)
    prepare_finetuning(model, "bridge", checkpointing="recompute")
    assert torch.equal(model.eval().generate(**given, **helpers.GREEDY), expected)


def test_switching_it_off_and_copies() -> None:
    model, batch = built("open_flamingo")
    prepare_finetuning(model, "bridge", checkpointing="recompute")
    wrapped = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), RecomputedForward)]
    assert wrapped == builders.of_blocks(model)
    twin = copy.deepcopy(model)
    for mine, other in zip(wrapped, builders.of_blocks(twin), strict=True):
        assert other.__dict__["forward"].module is other is not mine
    assert torch.equal(step(twin, "open_flamingo", batch)[0], step(model, "open_flamingo", batch)[0])
    prepare_finetuning(model, "bridge")
    assert not any("forward" in m.__dict__ or getattr(m, "gradient_checkpointing", False) for m in model.modules())
    mllm_fast.unfuse(twin)
    step(twin, "open_flamingo", batch)  # with the forward of the class that each block has now


def test_offload_moves_the_hidden_states_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, image = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    moved: list[tuple[int, ...]] = []
    original = checkpointing._offloaded

    def counted(t: Tensor) -> Any:
        hooks = original(t)
        pack = hooks.pack_hook
        hooks.pack_hook = lambda s: (moved.append(tuple(s.shape)) if isinstance(pack(s), tuple) else None, pack(s))[1]
        return hooks

    monkeypatch.setattr(checkpointing, "_offloaded", counted)

    def block(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return torch.tanh(x) * y.sum(1, keepdim=True) * scale

    expected = torch.autograd.grad(block(hidden, image, 2.0).sum(), (hidden, image))
    out = Recompute(offload=True)(block, hidden, image, scale=2.0)
    grads = torch.autograd.grad(out.sum(), (hidden, image))
    assert all(map(torch.equal, grads, expected))
    assert moved == [(2, 3, 4)]


def test_a_block_that_is_not_the_same_again_is_an_error() -> None:
    calls: list[int] = []

    def block(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.tanh(x) if len(calls) == 1 else torch.tanh(x.double().repeat(2, 1))[: len(x)].float()

    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(CheckpointError):
        Recompute()(block, x).sum().backward()


def test_a_model_without_blocks() -> None:
    recipe = Recipe({"all": ("weight",)}, None, None)
    with pytest.raises(ValueError, match="Linear has no blocks that can be checkpointed"):
        checkpointing.find(nn.Linear(2, 2), recipe)
    assert blocks_of(qformers.generator("blip2"))

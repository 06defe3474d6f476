"""prepare_finetuning: what it changes, what it leaves alone, what it costs, and that a refused request changes nothing."""

from __future__ import annotations

import copy
import math
import re

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

import mllm_fast
from mllm_fast.families.bitsandbytes import FusedLinear4bit
from mllm_fast.families.peft import FusedLoraLinear4bit
from mllm_fast.finetune import Lora, language_model_loss, prepare_finetuning
from mllm_fast.finetune import prepare as prepare_module
from mllm_fast.models.original_checkpoint import CheckpointMismatchError
from tests.families import llava_models
from tests.finetune.every_system import SYSTEMS, built, nf4
from tests.finetune.saved import Saved, saving
from tests.models import minigpt4_models, mplug_owl_models
from tests.quantization import systems as quantizable

bf16 = torch.bfloat16


def batch_of(name: str, dtype: torch.dtype = bf16) -> dict[str, Tensor]:
    batch = quantizable.inputs(name, dtype)
    return {**batch, "labels": batch["input_ids"]}


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name.replace(".base_layer", ""): p.dtype for name, p in model.named_parameters()}


def draw_lora(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


# What is cast, and what is not.


@pytest.mark.parametrize("name", ["blip2", "llava", "idefics"])
def test_only_what_is_trained_is_cast(name: str) -> None:
    model = nf4(name)
    before, weights = dtypes(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    part = "projection" if name == "llava" else "bridge"
    plan = prepare_finetuning(model, part)
    assert plan.trained
    assert all(p.dtype == torch.float32 for p in plan.trained.values())
    after = dtypes(model)
    assert {n: d for n, d in after.items() if n not in plan.trained} == {
        n: d for n, d in before.items() if n not in plan.trained
    }
    for n, p in model.named_parameters():
        assert torch.equal(p.to(weights[n].dtype), weights[n]), n
        assert p.requires_grad == (n in plan.trained), n


def test_the_norm_after_blip2s_vision_model_is_trained_in_fp32() -> None:
    plan = prepare_finetuning(nf4("blip2"), "bridge", trained_dtype=bf16)
    wide = {n for n, p in plan.trained.items() if p.dtype == torch.float32}
    assert wide == {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}
    assert {p.dtype for n, p in plan.trained.items() if n not in wide} == {bf16}


@pytest.mark.parametrize("fused_before", [False, True])
def test_lora_over_a_quantised_language_model(fused_before: bool) -> None:
    model = nf4("llava")
    if fused_before:
        mllm_fast.fuse(model, fixes="all")
    plan = prepare_finetuning(model, "projection+lora", lora=Lora(r=4, alpha=6))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert len(layers) == 2 * quantizable.LAYERS
    assert all(re.fullmatch(r"model\.language_model\.layers\.\d\.self_attn\.[qv]_proj", n) for n in layers)
    assert {type(m) for m in layers.values()} == {FusedLoraLinear4bit}
    assert {type(m.base_layer) for m in layers.values()} == {FusedLinear4bit}
    assert {m.scaling["default"] for m in layers.values()} == {1.5}
    assert not hasattr(model, "is_loaded_in_8bit")
    adapters = {n: p for n, p in plan.trained.items() if "lora_" in n}
    assert len(adapters) == 2 * len(layers)
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    with plan.autocast("cpu"):
        language_model_loss(model, batch_of("llava")).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in plan.trained.values())
    states = [mllm_fast.families.state_of(m) for m in model.modules()]
    assert {bool(s.options.fixes) for s in states if s is not None and s.shared is not None} == {fused_before}


def test_lora_equals_pefts() -> None:
    """On the same model, PEFT's own wrapper and class names, which match in the language model only here."""
    ours, theirs = llava_models.model().double(), llava_models.model().double()
    plan = prepare_finetuning(
        ours, "lora", lora=Lora(r=3, alpha=5, targets=("o_proj", "gate_proj")), trained_dtype=torch.float64
    )
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj", "gate_proj"])
    wrapped = peft.get_peft_model(theirs, config)
    draw_lora(ours), draw_lora(wrapped)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in llava_models.inputs().items()}
    batch["labels"] = batch["input_ids"]
    losses = [m(**batch).loss for m in (ours, wrapped)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    reference = {
        n.removeprefix("base_model.model."): p.grad for n, p in wrapped.named_parameters() if p.grad is not None
    }
    assert set(reference) == set(plan.trained)
    for n, p in plan.trained.items():
        torch.testing.assert_close(p.grad, reference[n])


def test_lora_stays_out_of_vision_and_bridge() -> None:
    """The vision models, Q-Formers and gated layers have layers of the same names."""
    for name, targets in (
        ("blip2", ("q_proj", "fc1")),
        ("idefics", ("q_proj", "down_proj")),
        ("mllama", ("q_proj",)),
        ("open_flamingo", ("q_proj",)),
        ("flamingo_hf", ("q_proj",)),
        ("mplug_owl", ("all-linear",)),
    ):
        model, batch = built(name)
        layers = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(targets)}
        plan = prepare_finetuning(model, "lora", lora=Lora(r=2, targets=targets))
        adapted = {n.split(".lora_")[0] for n in plan.trained}
        assert adapted
        assert not any(
            re.search(r"vision|qformer|gated|abstractor|perceiver|cross_attn|lm_head|blocks\.", n) for n in adapted
        )
        assert name == "mplug_owl" or adapted < layers or name == "open_flamingo", name
        SYSTEMS[name].loss(model, batch).backward()
        assert all(p.grad is not None for p in plan.trained.values())


def test_gpt2_has_other_linear_layers() -> None:
    plan = prepare_finetuning(mplug_owl_models.owl("gpt2"), "lora", lora=Lora(r=2, targets=("c_attn",)))
    assert len(plan.trained) == 4


# Modes.


def test_frozen_vision_stays_in_evaluation() -> None:
    for name in ("blip2", "llava", "open_flamingo", "mplug_owl"):
        model, _ = built(name)
        recipe = prepare_module.recipe_of(model)
        plan = prepare_finetuning(model, "projection" if name == "llava" else "bridge")
        for net in (model, copy.deepcopy(model)):
            vision = net.get_submodule(recipe.vision)
            assert net.train() is net
            assert not any(m.training for m in vision.modules())
            assert vision.train() is vision
            assert net.training
            assert net.get_submodule(recipe.language_model).training
        assert plan.model is model


def test_a_trained_vision_model_is_in_training_mode() -> None:
    model, _ = built("blip2")
    prepare_finetuning(model, "bridge")
    prepare_finetuning(model, "bridge+vision")
    assert model.vision_model.training
    prepare_finetuning(model, "bridge")
    assert not model.vision_model.training
    model.eval()
    prepare_finetuning(model, "vision")
    assert not model.vision_model.training


def test_minigpt4s_frozen_qformer_has_no_dropout() -> None:
    model = minigpt4_models.minigpt4(freeze_vision=False, freeze_qformer=False)
    prepare_finetuning(model, "projection")
    model.train()
    assert not any(m.training for m in (*model.vision_model.modules(), *model.qformer.modules()))
    assert model.language_projection.training


# What is kept for backward.


def test_nothing_is_kept_below_flamingos_first_block_or_in_vision() -> None:
    model = nf4("idefics")
    plan = prepare_finetuning(model, "bridge")
    # Its first block stands before layer 0; give it a place after two.
    inner = model.model
    inner.gated_cross_attn_layers[0].requires_grad_(False)
    inner.perceiver_resampler.requires_grad_(False)
    layers = {f"layer {i}": layer for i, layer in enumerate(inner.layers)}
    with plan.autocast("cpu"), saving(model, {**layers, "vision": inner.vision_model}) as saved:
        model(**batch_of("idefics")).loss.backward()
    assert {n for n in saved.bytes if n} == {"layer 2", "layer 3"}

    model, batch = built("open_flamingo")
    plan = prepare_finetuning(model, "bridge")
    layers = {f"layer {i}": m.decoder_layer for i, m in enumerate(model.lang_encoder._get_decoder_layers())}
    with saving(model, {**layers, "vision": model.vision_encoder}) as saved:
        language_model_loss(model, batch).backward()
    assert {n for n in saved.bytes if n} == {"layer 1", "layer 2", "layer 3"}


@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_nothing_is_kept_below_the_lowest_adapter(name: str) -> None:
    model = nf4(name)
    lm = model.model.language_model if name == "llava" else model.language_model.model.decoder
    targets = ("layers.2.self_attn.q_proj", "layers.3.self_attn.v_proj")
    plan = prepare_finetuning(model, "lora", lora=Lora(r=2, targets=targets))
    rest = {"vision": model.model.vision_tower if name == "llava" else model.vision_model}
    layers = {f"layer {i}": layer for i, layer in enumerate(lm.layers)}
    norm = lm.layers[2].input_layernorm if name == "llava" else lm.layers[2].self_attn_layer_norm
    with plan.autocast("cpu"), saving(model, {**layers, **rest, "norm": norm}) as saved:
        language_model_loss(model, batch_of(name)).backward()
    assert {n for n in saved.bytes if n} == {"layer 2", "layer 3"}


def test_the_vision_model_keeps_nothing_below_its_trained_norm() -> None:
    model, batch = built("blip2")
    prepare_finetuning(model, "bridge")
    with saving(model, {"encoder": model.vision_model.encoder}) as saved:
        SYSTEMS["blip2"].loss(model, batch).backward()
    assert "encoder" not in saved.bytes
    assert saved.total > 0
    prepare_finetuning(model, "bridge+vision")
    with saving(model, {"encoder": model.vision_model.encoder}) as saved:
        SYSTEMS["blip2"].loss(model, batch).backward()
    assert saved.bytes["encoder"] > 0


def test_the_loss_makes_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold keys and values of the layers that keep nothing."""
    calls: list[int] = []
    update = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", lambda *args: (calls.append(1), update(*args))[1])
    for name in ("llava", "blip2", "blip2_t5", "flamingo_hf", "minigpt4"):
        model, batch = built(name)
        prepare_finetuning(model, "projection" if name in ("llava", "minigpt4") else "bridge")
        loss = language_model_loss(model.eval(), batch)
        assert not calls, name
        torch.testing.assert_close(loss, SYSTEMS[name].loss(model, batch).float(), atol=1e-4, rtol=1e-4)
        assert calls, "the test sees nothing"
        calls.clear()


def test_the_meter_of_saved_tensors() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
    x = torch.randn(4, 8)
    with saving(net, {"linear": net[0]}) as saved:
        net(x)
    assert isinstance(saved, Saved)
    assert saved.bytes == {"linear": 4 * 8 * 4, "": 4 * 16 * 4}
    with saving(net, {"linear": net[0]}, known=[x]) as saved:
        net(x)
    assert saved.bytes == {"": 4 * 16 * 4}


# Again, with other parts.


def test_another_call_trains_other_parts() -> None:
    model = nf4("llava")
    before = dtypes(model)
    first = prepare_finetuning(model, "projection")
    second = prepare_finetuning(model, "lora", lora=Lora(r=2))
    assert not any("lora" in n for n in first.trained)
    assert all("lora_" in n for n in second.trained)
    assert {n: d for n, d in dtypes(model).items() if "lora" not in n} == before
    third = prepare_finetuning(model, "projection+lora")
    assert set(third.trained) == {*first.trained, *second.trained}
    fourth = prepare_finetuning(model, "projection")
    assert set(fourth.trained) == set(first.trained)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(first.trained)
    with fourth.autocast("cpu"):
        language_model_loss(model, batch_of("llava")).backward()


def test_a_part_that_is_trained_again_keeps_what_it_learned() -> None:
    model, _ = built("llava")
    model.to(bf16)
    weight = model.model.multi_modal_projector.linear_1.weight
    prepare_finetuning(model, "projection")
    with torch.no_grad():
        weight.fill_(1 + 2**-12)  # bf16 would round it
    prepare_finetuning(model, "projection+lora")
    assert weight.dtype == torch.float32
    assert weight[0, 0].item() == 1 + 2**-12
    prepare_finetuning(model, "lora")
    assert weight.dtype == bf16


def test_inside_pefts_wrapper() -> None:
    inner = llava_models.model().to(bf16)
    wrapped = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    plan = prepare_finetuning(wrapped, "projection+lora")
    assert all(n.startswith("base_model.model.") for n in plan.trained)
    assert sum("lora_A" in n for n in plan.trained) == 2
    assert sum("multi_modal_projector" in n for n in plan.trained) == 4


# The plan.


def test_the_table_counts_everything_once() -> None:
    model = nf4("blip2")
    dense = quantizable.blip2()
    plan = prepare_finetuning(model, "bridge+lora", lora=Lora(r=4), optimizer="adamw")
    rows = {(row.part, row.trained): row for row in plan.rows}
    adapters = sum(p.numel() for n, p in plan.trained.items() if "lora_" in n)
    assert sum(row.parameters for row in plan.rows) == sum(p.numel() for p in dense.parameters()) + adapters
    trained = sum(p.numel() for p in plan.trained.values())
    assert sum(row.parameters for row in plan.rows if row.trained) == trained
    assert sum(row.weights for row in plan.rows if row.trained) == 4 * trained
    assert sum(row.gradients for row in plan.rows) == 4 * trained
    assert sum(row.optimizer for row in plan.rows) == 8 * trained
    assert rows["bridge", True].parameters == trained - adapters
    assert rows["language model", False].dtypes[0] == "nf4"
    assert rows["vision", False].dtypes == ("bfloat16",)
    total = sum(row.weights for row in plan.rows)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert stored < total < 1.15 * stored  # the scales of the quantised weights are no parameters
    printed = str(plan)
    for text in ("bridge", "lora", "nf4, bfloat16", f"{trained:,} of", "optimiser (adamw)", "without activations"):
        assert text in printed


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_bytes_of_the_optimiser_are_those_of_the_optimiser(optimizer: str) -> None:
    model, _ = built("blip2")
    # A tensor above the size from which bitsandbytes quantises states.
    model.qformer.encoder.layer[0].attention.attention.query = nn.Linear(24, 24)
    extra = nn.Parameter(torch.randn(1, 300, 24))
    model.query_tokens = extra
    plan = prepare_finetuning(model, "bridge", optimizer=optimizer)  # type: ignore[arg-type]
    expected = sum(row.optimizer for row in plan.rows)
    small = sum(p.numel() for p in plan.trained.values() if p.numel() < 4096)
    assert extra.numel() >= 4096
    if optimizer == "adamw":
        adamw = torch.optim.AdamW(plan.trained.values())
        for p in plan.trained.values():
            p.grad = torch.zeros_like(p)
        adamw.step()
        states = [t for s in adamw.state.values() for name, t in s.items() if name != "step"]
        assert expected == sum(t.numel() * t.element_size() for t in states)
    else:
        assert expected == 8 * small + 2 * extra.numel() + 8 * math.ceil(extra.numel() / 256)


def test_saved_and_loaded_weights() -> None:
    first, second = nf4("blip2"), nf4("blip2")
    plans = [prepare_finetuning(m, "bridge+lora", lora=Lora(r=2)) for m in (first, second)]
    with torch.no_grad():
        for p in plans[0].trained.values():
            p.normal_()
    saved = plans[0].trained_state_dict()
    assert set(saved) == set(plans[0].trained)
    assert not any(t.requires_grad for t in saved.values())
    plans[1].load_trained(saved)
    assert all(torch.equal(p, plans[0].trained[n]) for n, p in plans[1].trained.items())
    before = {n: t.clone() for n, t in saved.items()}
    bad = {n: torch.zeros(3) if n == "query_tokens" else torch.zeros_like(t) for n, t in saved.items()}
    del bad["language_projection.bias"]
    with pytest.raises(
        CheckpointMismatchError,
        match=r"train='bridge\+lora'(.|\n)*missing: language_projection.bias\n.*shape of query_tokens",
    ):
        plans[1].load_trained(bad)
    assert all(torch.equal(p, before[n]) for n, p in plans[1].trained.items())


def test_no_autocast_where_nothing_is_wider() -> None:
    model, _ = built("llava")
    plan = prepare_finetuning(model, "projection")
    with plan.autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")

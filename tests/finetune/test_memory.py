"""The formulas for activations against what autograd saves: within 10 %, block by block and for whole steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mllm_fast
from mllm_fast.finetune import BatchShape, Lora, language_model_loss, prepare_finetuning, published
from mllm_fast.finetune.memory import decoder_layer_bytes
from mllm_fast.finetune.stages import prepare_stage
from mllm_fast.kernels.linear import onednn
from mllm_fast.models import Flamingo, FlamingoConfig
from mllm_fast.modules.gated_cross_attention import GatedCrossAttentionSpec
from tests.families.builders import of_inputs, of_model, randomise
from tests.finetune import systems
from tests.finetune.every_system import SYSTEMS, built
from tests.finetune.saved import Saved, saving
from tests.quantization import systems as quantizable

bf16, fp32 = torch.bfloat16, torch.float32
dtypes = pytest.mark.parametrize("dtype", [fp32, bf16], ids=["fp32", "bf16"])


def cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def close(estimate: int | None, measured: int, share: float = 0.1) -> None:
    assert estimate is not None
    assert abs(estimate - measured) <= share * measured, f"estimated {estimate}, measured {measured}"


def measure(model: nn.Module, plan: Any, modules: dict[str, nn.Module], loss: Any, known: list[Tensor]) -> Saved:
    with plan.autocast("cpu"), saving(model, modules, known) as saved:
        value = loss()
    value.backward()  # some of which keeps tensors too, for a moment
    return saved


def parts(plan: Any) -> dict[str, int | None]:
    return {row.part: row.activations for row in plan.rows}


def total(plan: Any) -> int:
    values = [row.activations for row in plan.rows]
    assert None not in values
    return sum(v for v in values if v is not None)


def known(batch: dict[str, Any]) -> list[Tensor]:
    return [v for v in batch.values() if isinstance(v, Tensor)]


def flamingo(
    samples: int, tokens: int, images: int, patches: int, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Blocks before layers 1 and 3 of four; the sizes differ from each other."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes))

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Linear(6, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.patches(x.permute(0, 2, 1, 3).flatten(2))

    config = FlamingoConfig(media_token_id=3, vision_dim=48, every=2, latents=5, resampler_depth=3, resampler_heads=2,
                            resampler_head_dim=16, heads=4, head_dim=24)  # fmt: skip
    torch.manual_seed(0)
    model = Flamingo(lm, Vision(), config).to(dtype).train()
    randomise(model)
    ids = torch.randint(5, 60, (samples, tokens))
    ids[:, :images] = 3
    batch = {"input_ids": ids, "images": torch.randn(samples, images, 2, patches, 3), "labels": ids}
    return model, cast(batch, dtype)


@dtypes
@pytest.mark.parametrize(("samples", "tokens", "images", "patches"), [(2, 40, 1, 9), (3, 17, 4, 30), (1, 90, 2, 5)])
def test_flamingo(samples: int, tokens: int, images: int, patches: int, dtype: torch.dtype) -> None:
    model, batch = flamingo(samples, tokens, images, patches, dtype)
    shape = BatchShape(samples, tokens, images, tokens - 1, patches)
    plan = prepare_finetuning(model, "bridge", batch=shape)
    modules = {"block 0": model.blocks[0], "block 1": model.blocks[1], "resampler": model.resampler}
    saved = measure(model, plan, {}, lambda: language_model_loss(model, batch), known(batch))
    close(total(plan), saved.total)
    saved = measure(model, plan, modules, lambda: language_model_loss(model, batch), known(batch))
    close(parts(plan)["bridge"], sum(saved.bytes[name] for name in modules))


@dtypes
def test_open_flamingo(dtype: torch.dtype) -> None:
    model = of_model().to(dtype).train()
    batch = cast(of_inputs(3, 30, 2), dtype)
    batch["labels"] = batch["lang_x"]
    plan = prepare_finetuning(model, "bridge", batch=BatchShape(3, 30, 2, 29, 4))
    saved = measure(model, plan, {}, lambda: language_model_loss(model, batch), known(batch))
    close(total(plan), saved.total)


@dtypes
@pytest.mark.parametrize("name", ["idefics", "mllama"])
def test_blocks_with_other_norms(name: str, dtype: torch.dtype) -> None:
    model, batch = built(name)
    model.to(dtype)
    ids, batch = batch["input_ids"], cast(batch, dtype)
    if name == "idefics":
        modules = {"0": model.model.gated_cross_attn_layers[0], "1": model.model.gated_cross_attn_layers[1]}
        modules["r"] = model.model.perceiver_resampler
        shape = BatchShape(*ids.shape, 3, patches=5)
    else:
        modules = {str(i): model.model.language_model.layers[i] for i in (1, 3)}
        modules["projection"] = model.model.multi_modal_projector
        shape = BatchShape(*ids.shape, 2, patches=20)
    plan = prepare_finetuning(model, "bridge", batch=shape)
    saved = measure(model, plan, modules, lambda: SYSTEMS[name].loss(model, batch), known(batch))
    measured = sum(saved.bytes.get(n, 0) for n in modules)
    estimate = parts(plan)["bridge"]
    close(estimate, measured)


@dtypes
@pytest.mark.parametrize(("samples", "dropout"), [(2, 0.0), (5, 0.0), (3, 0.1)])
def test_qformer(samples: int, dropout: float, dtype: torch.dtype) -> None:
    model = quantizable.blip2()
    for module in model.qformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.to(dtype).train()
    batch = {k: v.repeat(samples, *[1] * (v.ndim - 1))[:samples] for k, v in quantizable.inputs("blip2", dtype).items()}
    batch["labels"] = batch["input_ids"]
    plan = prepare_finetuning(model, "bridge", batch=BatchShape(samples, 10, 1, 9))
    modules = {"qformer": model.qformer, "projection": model.language_projection}
    modules["norm"] = model.vision_model.post_layernorm
    modules |= {f"layer {i}": layer for i, layer in enumerate(model.qformer.encoder.layer)}
    saved = measure(model, plan, modules, lambda: language_model_loss(model, batch), known(batch))
    close(parts(plan)["bridge"], sum(saved.bytes.get(n, 0) for n in modules))
    saved = measure(model, plan, {}, lambda: language_model_loss(model, batch), known(batch))
    close(total(plan), saved.total)


@dtypes
@pytest.mark.parametrize(("targets", "train"), [
    (("q_proj", "v_proj"), "lora"), ("all-linear", "projection+lora"), (("layers.2.self_attn.q_proj",), "lora"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["nf4", None])
def test_lora(targets: tuple[str, ...], train: str, kind: str | None, dtype: torch.dtype) -> None:
    model = quantizable.llava().to(dtype).train()
    if kind is not None:
        mllm_fast.quantize_llm(model, kind, compute_dtype=dtype)
    batch = {k: v.repeat(3, *[1] * (v.ndim - 1)) for k, v in quantizable.inputs("llava", dtype).items()}
    batch["labels"] = batch["input_ids"]
    shape = BatchShape(6, 10, 1, 9)
    plan = prepare_finetuning(model, train, lora=Lora(r=4, targets=targets), batch=shape)
    saved = measure(model, plan, {}, lambda: language_model_loss(model, batch), known(batch))
    close(total(plan), saved.total)


# Stages whose parts all have formulas, and the systems that they train.
STAGES = {"flamingo-bridge": "flamingo", "blip2-stage2": "blip2-opt", "minigpt4-projection": "minigpt4",
          "llava-stage1": "llava", "llava-stage2": "llava", "mplug-owl-lora": "mplug-owl"}  # fmt: skip


@dtypes
@pytest.mark.parametrize("stage", STAGES)
def test_the_first_batch_of_a_stage(stage: str, dtype: torch.dtype) -> None:
    """Captions of different lengths: the attention of the language models is given a mask."""
    model, processor = systems.SYSTEMS[STAGES[stage]]()
    model.to(dtype)
    if dtype == bf16:
        mllm_fast.quantize_llm(model, "nf4")
    samples = systems.samples(3)
    run = prepare_stage(stage, model=model, processor=processor, data=samples, batch_size=3, steps=1)
    batch = run.collate(samples)
    assert not batch["attention_mask"].all()
    saved = measure(model.train(), run.plan, {}, lambda: run.stage.loss(model, batch)["loss"], known(batch))
    close(total(run.plan), saved.total, 0.05)


def test_stages_without_a_formula() -> None:
    assert set(published.STAGES) - set(STAGES) == {"blip2-stage1"}


@dtypes
@pytest.mark.parametrize("padded", [False, True])
def test_grouped_keys_of_a_padded_batch(padded: bool, dtype: torch.dtype) -> None:
    """With a mask, too, they are kept as they are, and the lowest layer that keeps anything keeps the mask for all."""
    model, _ = flamingo(3, 40, 1, 9, dtype)
    assert model.lm.config.num_key_value_heads < model.lm.config.num_attention_heads
    ids = torch.randint(5, 60, (3, 40))
    ids[:, 0] = 3
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "images": torch.randn(3, 1, 2, 9, 3, dtype=dtype), "labels": ids}
    plan = prepare_finetuning(model, "bridge", batch=BatchShape(3, 40, 1, 39, 9, padded=padded))
    layers = {str(i): layer for i, layer in enumerate(model.lm.model.layers)}
    saved = measure(model, plan, layers, lambda: language_model_loss(model, batch), known(batch))
    for layer, elements in (("1", 120 * 40 if padded else 0), ("2", 0)):
        assert saved.bytes[layer] == decoder_layer_bytes(120, 64, 64, 32, 160, 4, 0, dtype.itemsize, mask=elements)


@dtypes
def test_checkpointing(dtype: torch.dtype) -> None:
    """What is kept is the blocks' inputs; the estimate has the largest block on top, which is computed again."""
    model, batch = flamingo(2, 60, 2, 9, dtype)
    shape = BatchShape(2, 60, 2, 59, 9)
    estimates = {}
    for how in ("none", "recompute", "offload"):
        estimates[how] = total(prepare_finetuning(model, "bridge", batch=shape, checkpointing=how))
    assert estimates["offload"] < estimates["recompute"] < estimates["none"]
    plan = prepare_finetuning(model, "bridge", batch=shape, checkpointing="recompute")
    inputs: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0].numel() * args[0].element_size())

    for block in model.blocks:
        block.register_forward_pre_hook(count, with_kwargs=True)
    for layer in model.lm.model.layers[1:]:
        layer.register_forward_pre_hook(count, with_kwargs=True)
    with plan.autocast("cpu"):
        language_model_loss(model, batch)
    assert estimates["recompute"] - estimates["offload"] == sum(inputs)


def test_what_no_formula_is_for_is_left_open() -> None:
    for name, train, open_parts in (
        ("blip2", "bridge+vision", {"vision"}),
        ("instructblip", "bridge", {"bridge"}),
        ("mplug_owl", "bridge", {"bridge"}),
        ("blip", "decoder", {"decoder"}),
        ("blip2_t5", "bridge", {"language model"}),
        # What is frozen between a vision model that is trained and the loss keeps something, too.
        ("blip2", "vision", {"vision", "bridge"}),
        ("flamingo_hf", "vision", {"vision", "bridge"}),
        ("mllama", "projection", {"language model"}),
    ):
        model, _ = built(name)
        plan = prepare_finetuning(model, train, batch=BatchShape(2, 9, patches=4))
        assert {part for part, value in parts(plan).items() if value is None} == open_parts, name
        assert "?" in str(plan)
        assert "not known" in str(plan)


@dtypes
@pytest.mark.parametrize(("samples", "tokens", "images", "patches"), [(2, 40, 1, 9), (3, 17, 4, 30)])
@pytest.mark.parametrize("kind", ["nf4", None])
@pytest.mark.parametrize("wide", [False, True])
def test_frozen_gated_blocks_under_lora(
    samples: int, tokens: int, images: int, patches: int, kind: str | None, wide: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The whole step; `wide`: the bridge in fp32 over a language model in `dtype`."""
    if torch.backends.mkldnn.is_available():
        monkeypatch.setattr(onednn, "_mkl_is_slow", lambda: True)  # where some machines compute in fp32
    model, batch = flamingo(samples, tokens, images, patches, dtype)
    if wide:
        model.resampler.float()
        model.blocks.float()
    if kind is not None:
        mllm_fast.quantize_llm(model, kind, compute_dtype=dtype)
    shape = BatchShape(samples, tokens, images, tokens - 1, patches)
    plan = prepare_finetuning(model, "lora", lora=Lora(r=4), batch=shape)
    saved = measure(model, plan, {}, lambda: language_model_loss(model, batch), known(batch))
    close(total(plan), saved.total)
    modules = {str(i): block for i, block in enumerate(model.blocks)}
    saved = measure(model, plan, modules, lambda: language_model_loss(model, batch), known(batch))
    close(parts(plan)["bridge"], sum(saved.bytes[name] for name in modules), 0.03)


@dtypes
@pytest.mark.parametrize(("name", "train"), [
    ("open_flamingo", "lora"), ("open_flamingo", "embeddings"), ("flamingo_hf", "lora"), ("idefics", "lora"),
    ("mllama", "lora"), ("mllama", "projection"),
])  # fmt: skip
def test_frozen_gated_blocks_of_other_systems(name: str, train: str, dtype: torch.dtype) -> None:
    model, batch = built(name)
    model.to(dtype)
    ids, batch = batch["lang_x" if name == "open_flamingo" else "input_ids"], cast(batch, dtype)
    images, patches = {"mllama": (2, 20), "idefics": (3, 5)}.get(name, (2, 4))
    plan = prepare_finetuning(model, train, lora=Lora(r=2) if train == "lora" else None,
                              batch=BatchShape(*ids.shape, images, patches=patches))  # fmt: skip
    specs = {n: getattr(m.__dict__.get("_mllm_fast"), "spec", None) for n, m in model.named_modules()}
    gated = {n: model.get_submodule(n) for n, spec in specs.items() if isinstance(spec, GatedCrossAttentionSpec)}
    saved = measure(model, plan, gated, lambda: SYSTEMS[name].loss(model, batch), known(batch))
    measured = sum(saved.bytes.get(n, 0) for n in gated)
    assert measured
    # Where the gradient comes from the media alone, the lowest block keeps nothing of its text's norm.
    close(parts(plan)["bridge"], measured, 0.1 if train == "projection" else 0.02)


def test_gated_blocks_below_everything_that_is_trained() -> None:
    """No gradient passes them; the blocks stand before layers 1 and 3 (Flamingo), and 0 and 2 (IDEFICS)."""
    for name, path, layer, known in (
        ("flamingo_hf", "layers.3.self_attn.q_proj", 3, True), ("flamingo_hf", "layers.2.self_attn.q_proj", 2, False),
        ("idefics", "layers.2.self_attn.q_proj", 2, True), ("idefics", "layers.1.self_attn.q_proj", 1, False),
    ):  # fmt: skip
        model, batch = built(name)
        lora = Lora(r=2, targets=(path,))
        plan = prepare_finetuning(model, "lora", lora=lora, batch=BatchShape(2, 9, patches=4))
        assert (parts(plan)["bridge"] == 0) == known, (name, path)
        layers = model.model.layers if name == "idefics" else model.model.lm.model.layers
        gated = model.model.gated_cross_attn_layers if name == "idefics" else model.model.blocks
        with saving(model, {"gated": gated[1], "layer": layers[layer]}) as saved:
            SYSTEMS[name].loss(model, batch)
        assert ("gated" in saved.bytes) != known, (name, path)
        assert "layer" in saved.bytes


def test_the_table_with_a_batch() -> None:
    model, _ = flamingo(1, 8, 1, 4, bf16)
    plan = prepare_finetuning(model, "bridge", batch=BatchShape(1, 8, 1, patches=4))
    assert "activations" in str(plan)
    assert "without activations" not in str(plan)
    assert parts(prepare_finetuning(model, "bridge"))["bridge"] is None
    # Without images a vision model of unknown patches does not matter; with them it does.
    assert parts(prepare_finetuning(model, "bridge", batch=BatchShape(1, 8, 1)))["bridge"] is None

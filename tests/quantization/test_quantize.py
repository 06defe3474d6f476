"""quantize_llm: the bytes that transformers would make, all or nothing, and a model that others recognise."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import mllm_fast
from mllm_fast.quantization import NothingToQuantizeError, UnmatchedNameError
from mllm_fast.quantization.selection import quantized_layers
from tests.families import builders
from tests.families.quantized_layers import assert_equal_bytes, tensors
from tests.models import helpers
from tests.quantization import systems

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nf4": ({"kind": "nf4"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4 nested": (
        {"kind": "fp4", "double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    ),
    "int8": ({"kind": "int8"}, {"load_in_8bit": True}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_the_bytes_that_transformers_makes(kind: str, tmp_path: Path) -> None:
    ours, theirs = KINDS[kind]
    model = systems.llava().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    skip = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    if "load_in_4bit" in theirs:
        theirs = theirs | {"bnb_4bit_compute_dtype": torch.bfloat16}  # transformers' default is fp32
    config = BitsAndBytesConfig(**theirs, llm_int8_skip_modules=skip)
    upstream = type(model).from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    report = mllm_fast.quantize_llm(model, **ours)
    assert_equal_bytes(tensors(model), tensors(upstream))
    assert len(report.quantized) == 7 * systems.LAYERS
    assert model.config.quantization_config.to_dict() == config.to_dict() | {
        "llm_int8_skip_modules": model.config.quantization_config.llm_int8_skip_modules
    }
    assert set(model.config.quantization_config.llm_int8_skip_modules) == set(skip)
    for name in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert getattr(model, name, None) == getattr(upstream, name, None), name
    for path, layer in quantized_layers(model).items():
        mine, other = vars(layer), vars(upstream.get_submodule(path))
        assert mine.keys() - {"_mllm_fast"} == other.keys() - {"_is_hf_initialized"}
        assert isinstance(layer, type(upstream.get_submodule(path)))


def test_report() -> None:
    model = systems.llava().to(torch.bfloat16)
    total = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    report = mllm_fast.quantize_llm(model, "nf4", double_quant=True)
    weights = systems.LAYERS * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert sum(row.bytes_before for row in report.quantized) == 2 * weights
    blocks = weights // 64
    maps = len(report.quantized) * (16 * 4 + 256 * 4 + 4 + 4)
    assert sum(row.bytes_after for row in report.quantized) == weights // 2 + blocks + maps
    assert report.bytes_before == total
    assert report.bytes_after == total - 2 * weights + weights // 2 + blocks + maps
    text = str(report)
    assert "quantised 28 linear layers" in text
    assert "model.language_model.layers.*.mlp.up_proj" in text
    assert "128 x 64" in text
    assert "outside the language model" in text
    again = mllm_fast.quantization_report(model)
    assert again.quantized == report.quantized
    assert again.bytes_before == total
    empty = mllm_fast.quantization_report(systems.llama())
    assert (empty.quantized, empty.bytes_before) == ([], empty.bytes_after)


def test_options() -> None:
    model = systems.llama()
    mllm_fast.quantize_llm(model, "fp4", blocksize=128, compute_dtype=torch.float16, skip=["mlp"])
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.quant_state.blocksize == 128
    assert layer.weight.quant_type == "fp4"
    assert layer.compute_dtype == torch.float16
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert mllm_fast.quantize_llm(systems.llama()).quantized[0].kind == "nf4"
    default = systems.llama()
    mllm_fast.quantize_llm(default)
    assert default.model.layers[0].self_attn.q_proj.compute_dtype == torch.bfloat16


def test_llm_int8_on_request() -> None:
    """Bit for bit what bitsandbytes computes in eval mode, activations quantised."""
    model, exact = systems.llama().bfloat16(), systems.llama().bfloat16()
    mllm_fast.quantize_llm(model, "int8", outliers="llm_int8")
    mllm_fast.quantize_llm(exact, "int8")
    upstream = copy.deepcopy(model)
    mllm_fast.unfuse(upstream)
    given = systems.inputs("llama")
    with torch.no_grad():
        expected = upstream(**given).logits
        assert torch.equal(model(**given).logits, expected)
        assert not torch.equal(exact(**given).logits, expected)


def test_a_second_call_quantises_the_rest() -> None:
    model = systems.llava()
    mllm_fast.quantize_llm(model, "int8", skip=["mlp"])
    assert len(mllm_fast.quantize_llm(model, "int8").quantized) == 28
    with pytest.raises(NothingToQuantizeError, match="28 layers are quantised already"):
        mllm_fast.quantize_llm(model, "int8")
    with pytest.raises(ValueError, match="has layers in int8; a checkpoint can hold one kind"):
        mllm_fast.quantize_llm(model, "nf4", include=["lm_head"])


def _bad_dtype(model: nn.Module) -> None:
    model.model.layers[2].mlp.down_proj.double()


def _hooked(model: nn.Module) -> None:
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda *_: None)


def _adapted(model: nn.Module) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["v_proj"]), model)


def _meta(model: nn.Module) -> None:
    model.model.layers[2].to("meta")


@pytest.mark.parametrize(
    ("break_", "options", "message"),
    [
        (_bad_dtype, {}, "layers.2.mlp.down_proj is in torch.float64"),
        (_hooked, {}, "layers.2.mlp.down_proj has hooks"),
        (_adapted, {}, "v_proj.base_layer lies inside a PEFT adapter; quantise the model first"),
        (_meta, {}, "meta device"),
        (None, {"skip": ["nothing_like_it"]}, "no module"),
        (None, {"kind": "nf3"}, "unknown kind 'nf3'; choose one of 'nf4', 'fp4', 'int8'"),
        (None, {"kind": "int8", "double_quant": True, "blocksize": 32}, "double_quant, blocksize is for nf4 and fp4"),
        (None, {"outliers": "llm_int8"}, "is for int8"),
        (None, {"kind": "int8", "outliers": "some"}, "expected None or 'llm_int8'"),
        (None, {"blocksize": 48}, "expected one of 32, 64"),
        (None, {"compute_dtype": torch.float64}, "expected bf16, fp16 or fp32"),
    ],
)
def test_all_or_nothing(break_: Any, options: dict[str, Any], message: str) -> None:
    model = systems.llama()
    if break_ is not None:
        break_(model)
    types = {name: type(m) for name, m in model.named_modules()}
    attributes = set(vars(model))
    with pytest.raises((ValueError, UnmatchedNameError), match=message):
        mllm_fast.quantize_llm(model, **options)
    assert {name: type(m) for name, m in model.named_modules()} == types
    assert set(vars(model)) == attributes
    assert not hasattr(model.config, "quantization_config")


def test_failing_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = systems.llama(), []
    original = bnb.functional.quantize_4bit

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise MemoryError("no room")
        return original(*args, **kwargs)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", failing)
    before = tensors(model)
    with pytest.raises(MemoryError):
        mllm_fast.quantize_llm(model)
    assert_equal_bytes(tensors(model), before)
    assert not quantized_layers(model)


def test_the_layers_are_frozen_and_run_our_computation() -> None:
    model = systems.llava().train()
    mllm_fast.quantize_llm(model)
    for layer in quantized_layers(model).values():
        assert type(layer).__qualname__ == "FusedLinear4bit"
        assert layer.training
        assert not [p for p in layer.parameters() if p.requires_grad]
    assert model.lm_head.weight.requires_grad
    report = mllm_fast.fuse(model)  # the rest; one context for all
    assert any(row.now == "FusedLlavaModel" for row in report.fused)
    mllm_fast.unfuse(model)
    assert {type(layer) for layer in quantized_layers(model).values()} == {bnb.nn.Linear4bit}


def test_a_layer_that_is_registered_twice() -> None:
    model = builders.of_model()
    mllm_fast.quantize_llm(model)
    for index, block in enumerate(model.lang_encoder.old_decoder_blocks):
        again = model.lang_encoder.model.layers[index].decoder_layer
        assert again.mlp.up_proj is block.mlp.up_proj
        assert type(block.mlp.up_proj).__name__ == "Linear4bit"


def test_conv1d() -> None:
    """GPT-2's layers have their weights the other way round."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=50)
    model = builders.randomise(GPT2LMHeadModel(config)).eval()
    dense, ids = copy.deepcopy(model), torch.arange(8).view(1, 8)
    mllm_fast.quantize_llm(model, "int8")
    with torch.no_grad():
        ours, theirs = model(ids).logits, dense(ids).logits
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.999


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_language_model_inside_our_own_system(kind: str, tmp_path: Path) -> None:
    """Flamingo is no transformers model; its language model is, and saves itself."""
    model = helpers.flamingo()
    dense = copy.deepcopy(model)
    mllm_fast.quantize_llm(model, kind)
    model.lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert_equal_bytes(tensors(again), tensors(model.lm))
    assert not quantized_layers(dense)
    assert not [path for path in quantized_layers(model) if not path.startswith("lm.")]


@kinds
def test_the_whole_state_dict_loads_strictly(kind: str) -> None:
    model, other = systems.llava(), builders.randomise(systems.llava(), seed=4)
    for each in (model, other):
        mllm_fast.quantize_llm(each, **KINDS[kind][0])
    given = systems.inputs("llava")
    with torch.no_grad():
        other(**given)
        other.load_state_dict(tensors(model))
        assert torch.equal(other(**given).logits, model(**given).logits)
    assert_equal_bytes(tensors(other), tensors(model))


def test_lora_afterwards() -> None:
    """PEFT takes its own bitsandbytes layers for it, and trains through the quantised weights."""
    model = systems.llava()
    mllm_fast.quantize_llm(model, "nf4", compute_dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    layer = wrapped.base_model.model.model.language_model.layers[0].self_attn.q_proj
    assert type(layer) is peft.tuners.lora.bnb.Linear4bit
    mllm_fast.fuse(wrapped)
    assert type(layer).__qualname__ == "FusedLoraLinear4bit"
    given = systems.inputs("llava")
    wrapped(**given, labels=given["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad and "language_model" in n}
    assert len(grads) == 2 * 2 * systems.LAYERS
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert all(g.abs().sum() > 0 for n, g in grads.items() if "lora_B" in n)
    with pytest.raises(NothingToQuantizeError, match="quantised already"):
        mllm_fast.quantize_llm(wrapped)


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mllm_fast.quantize_llm(systems.llama(), "int8")
        mllm_fast.quantize_llm(systems.llama(), "nf4")

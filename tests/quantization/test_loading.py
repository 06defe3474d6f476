"""load: what quantize_llm makes, streamed from disk; saved and read back bit for bit; clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlavaForConditionalGeneration

import mllm_fast
from mllm_fast.quantization import ModelNotFoundError, NothingToQuantizeError, UnmatchedNameError
from mllm_fast.quantization.selection import quantized_layers
from tests.families import qformers
from tests.families.quantized_layers import assert_equal_bytes, error, tensors
from tests.models import minigpt4_models, mplug_owl_models
from tests.quantization import systems

KINDS: dict[str, dict[str, Any]] = {"nf4": {}, "nf4 nested": {"double_quant": True}, "fp4": {}, "int8": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    systems.llava().bfloat16().save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def types(model: nn.Module) -> dict[str, str]:
    return {path: type(layer).__qualname__ for path, layer in quantized_layers(model).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_quantising_in_memory(kind: str, folder: Path) -> None:
    llm, options = kind.split()[0], KINDS[kind]
    expected = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    mllm_fast.quantize_llm(expected, llm, **options)
    mllm_fast.fuse(expected)
    model = mllm_fast.load(folder, llm, **options)
    assert_equal_bytes(tensors(model), tensors(expected))
    assert types(model) == types(expected)
    assert type(model) is type(expected)
    assert not model.training
    given = systems.inputs("llava", torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected(**given).logits)
    ours, theirs = (m.config.quantization_config.to_dict() for m in (model, expected))
    assert ours == theirs
    assert mllm_fast.quantization_report(model).quantized == mllm_fast.quantization_report(expected).quantized


@pytest.mark.parametrize("kind", KINDS)
def test_saved_after_inference_and_read_back_bit_for_bit(kind: str, folder: Path, tmp_path: Path) -> None:
    model = mllm_fast.load(folder, kind.split()[0], **KINDS[kind])
    given = systems.inputs("llava", torch.bfloat16)
    before = tensors(model)
    ids = model.generate(**given, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        expected = model(**given).logits
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]
    for llm in (None, kind.split()[0]):
        again = mllm_fast.load(tmp_path, llm)
        assert_equal_bytes(tensors(again), before)
        assert types(again) == types(model)
        with torch.no_grad():
            assert torch.equal(again(**given).logits, expected)
        assert torch.equal(again.generate(**given, max_new_tokens=5, do_sample=False), ids)
    # By transformers alone, too.
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert_equal_bytes(tensors(plain), before)


SYSTEMS = {
    "blip2": lambda: qformers.generator("blip2"),
    "blip2-t5": lambda: qformers.generator("blip2", "t5"),
    "instructblip": lambda: qformers.generator("instructblip"),
    "instructblipvideo": lambda: qformers.generator("instructblipvideo"),
    "idefics": systems.idefics,
    "mplug_owl": mplug_owl_models.owl,
    "minigpt4": minigpt4_models.minigpt4,
    "llama": systems.llama,
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system(name: str, tmp_path: Path) -> None:
    expected = SYSTEMS[name]()
    expected.save_pretrained(tmp_path)
    mllm_fast.quantize_llm(expected)
    model = mllm_fast.load(tmp_path, "nf4", dtype=torch.float32)
    assert types(model) == types(expected)
    assert_equal_bytes(tensors(model), tensors(expected))
    model.save_pretrained(tmp_path / "quantised")
    assert_equal_bytes(tensors(mllm_fast.load(tmp_path / "quantised", dtype=torch.float32)), tensors(expected))


def test_gpt2_is_loaded_the_right_way_round(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=50))
    model.save_pretrained(tmp_path)
    mllm_fast.quantize_llm(model, "nf4")
    assert_equal_bytes(tensors(mllm_fast.load(tmp_path, "nf4", dtype=torch.float32)), tensors(model))


def test_what_is_quantised_by_name(folder: Path, tmp_path: Path) -> None:
    model = mllm_fast.load(folder, "nf4", skip=["layers.0", "o_proj"], include=["multi_modal_projector"])
    names = {path.removeprefix("model.") for path in quantized_layers(model)}
    assert "multi_modal_projector.linear_1" in names
    assert not [n for n in names if ".0." in n or n.endswith("o_proj")]
    model.save_pretrained(tmp_path)
    assert types(mllm_fast.load(tmp_path)) == types(model)
    for options in ({"skip": ["vision_towers"]}, {"include": ["nothing"]}):
        with pytest.raises(UnmatchedNameError):
            mllm_fast.load(folder, "nf4", **options)
    with pytest.raises(NothingToQuantizeError, match="no gated"):
        mllm_fast.load(folder, "nf4", gated_layers=True)


def test_dtypes(folder: Path) -> None:
    model = mllm_fast.load(folder, "nf4", dtype=torch.float16)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float16}
    assert {layer.compute_dtype for layer in quantized_layers(model).values()} == {torch.bfloat16}
    assert mllm_fast.load(folder, "int8", dtype=None).dtype == torch.bfloat16
    model = mllm_fast.load(folder, "nf4", compute_dtype=torch.float32)
    assert {layer.compute_dtype for layer in quantized_layers(model).values()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dtypes_of_a_quantised_checkpoint(kind: str, folder: Path, tmp_path: Path) -> None:
    """Fine-tuning leaves such folders: what was trained is fp32 there, beside bf16."""
    model: Any = mllm_fast.load(folder, kind)
    model.model.multi_modal_projector.float()
    model.save_pretrained(tmp_path)
    expected = tensors(mllm_fast.load(folder, kind))
    for dtype in (torch.bfloat16, torch.float32):
        again = mllm_fast.load(tmp_path, dtype=dtype)
        codes = {id(layer.weight) for layer in quantized_layers(again).values()}
        assert {p.dtype for p in again.parameters() if p.is_floating_point() and id(p) not in codes} == {dtype}
        with torch.no_grad():
            again(**systems.inputs("llava", dtype))
    assert_equal_bytes(tensors(mllm_fast.load(tmp_path)), expected)
    as_saved = {p.dtype for p in mllm_fast.load(tmp_path, dtype=None).parameters() if p.is_floating_point()}
    assert as_saved == {torch.float32, torch.bfloat16}


def test_parts_that_are_kept_in_fp32_stay(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm_fast.load(folder, "nf4", dtype=torch.float32).save_pretrained(tmp_path)  # type: ignore[operator]
    monkeypatch.setattr(LlavaForConditionalGeneration, "_keep_in_fp32_modules_strict", ["linear_2"])
    model: Any = mllm_fast.load(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.model.multi_modal_projector.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"linear_2.weight", "linear_2.bias"}


def test_without_quantising_and_without_fusing(folder: Path) -> None:
    model = mllm_fast.load(folder)
    assert type(model).__qualname__ == "FusedLlavaForConditionalGeneration"
    assert not quantized_layers(model)
    plain = mllm_fast.load(folder, "int8", fuse=False, device="cpu")
    assert type(plain) is LlavaForConditionalGeneration
    assert set(types(plain).values()) == {"FusedLinear8bitLt"}
    report = mllm_fast.fuse(mllm_fast.load(folder, device_map="cpu", fuse=False), level=0)
    assert report.fused
    fixed = mllm_fast.load(folder, "nf4", level=2, fixes="all", prepack=True)
    assert fixed._mllm_fast.options.level == 2
    replayed = mllm_fast.load(folder, device_map="cpu", cuda_graphs=True)
    assert replayed._mllm_fast.options.cuda_graphs and not fixed._mllm_fast.options.cuda_graphs


def test_outliers(folder: Path) -> None:
    model = mllm_fast.load(folder, "int8", outliers="llm_int8")
    specs = {layer._mllm_fast.spec.outliers for layer in quantized_layers(model).values()}
    assert specs == {"llm_int8"}


def _write(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_clear_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"nothing is no folder, and neither .* 'hf download nobody/nothing'"
    ) as e:
        mllm_fast.load("nobody/nothing", "nf4")
    assert "\n" not in str(e.value)
    with pytest.raises(ModelNotFoundError, match=r"holds no model: expected config.json and") as e:
        mllm_fast.load(tmp_path)
    assert "\n" not in str(e.value)
    with pytest.raises(ModelNotFoundError, match="is a file; expected the folder"):
        mllm_fast.load(folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        mllm_fast.load(_write(tmp_path / "weightless", config), "nf4")
    with pytest.raises(ValueError, match="names NoSuchModel, which transformers"):
        mllm_fast.load(_write(tmp_path / "unknown", config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match="quantised with gptq"):
        mllm_fast.load(_write(tmp_path / "gptq", config | {"quantization_config": {"quant_method": "gptq"}}), "nf4")
    with pytest.raises(ValueError, match="both device and device_map"):
        mllm_fast.load(folder, device="cpu", device_map="auto")
    with pytest.raises(
        ValueError, match="CUDA graphs need a GPU, but the model is to run on cpu; choose device 'cuda'"
    ):
        mllm_fast.load(folder, device="cpu", cuda_graphs=True)
    with pytest.raises(ValueError, match="which fuse=False leaves out"):
        mllm_fast.load(folder, device="cuda", fuse=False, cuda_graphs=True)
    with pytest.raises(ValueError, match="llm is None, so nothing is quantised"):
        mllm_fast.load(folder, skip=["q_proj"])
    with pytest.raises(ValueError, match="unknown kind 'nf5'"):
        mllm_fast.load(folder, "nf5")  # type: ignore[arg-type]
    mllm_fast.load(folder, "int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(
        ValueError, match="is quantised to int8 already; load it with llm=None or llm='int8', not 'nf4'"
    ):
        mllm_fast.load(tmp_path / "int8", "nf4")


_MEASURE = """
import gc, sys, threading, time
import mllm_fast, transformers
transformers.logging.disable_progress_bar()

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.0005)

for kind in ("nf4", "int8"):
    mllm_fast.load(sys.argv[1], kind)  # what is allocated once
    gc.collect()
    start, peak, done = anonymous(), [0], False
    thread = threading.Thread(target=watch)
    thread.start()
    model = mllm_fast.load(sys.argv[2], kind)
    done = True
    thread.join()
    print(peak[0] - start, mllm_fast.quantization_report(model).bytes_after)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_memory(folder: Path, tmp_path: Path) -> None:
    """The peak is the quantised model and at most one file of the checkpoint."""
    model = systems.llava(hidden_size=256, intermediate_size=768, num_hidden_layers=24).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="8MB")
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    shard = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert whole > 30e6
    # Blocks of the size of these weights are given back to the system, so that what is free does not count.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", _MEASURE, str(folder), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    for line in output.splitlines()[-2:]:
        peak, quantised = map(int, line.split())
        assert quantised < 0.6 * whole
        assert peak < quantised + shard


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_onto_a_gpu(kind: Literal["nf4", "int8"], folder: Path, tmp_path: Path) -> None:
    model = mllm_fast.load(folder, kind, device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    given = {name: value.cuda() for name, value in systems.inputs("llava", torch.bfloat16).items()}
    with torch.no_grad():
        logits = model(**given).logits
        exact = systems.dense(model.to("cpu")).cuda()(**given).logits
    assert error(logits, exact.double()) < 5e-2
    model.to("cuda").save_pretrained(tmp_path)
    assert_equal_bytes(tensors(mllm_fast.load(tmp_path, device="cuda")), tensors(model))

"""MiniGPT-4 against the original's equations, derived again in fp64 (its code does not import here): rows, splice, losses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import mllm_fast
from mllm_fast.families import state_of
from mllm_fast.models import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from tests.families.instruments import Results, assert_same, backward_results, check_precision, recording
from tests.models.minigpt4_models import (
    IMAGE,
    IMAGE_SIZE,
    QUERIES,
    VISION_FFN,
    config,
    inputs,
    llama,
    minigpt4,
    original_files,
    original_prompt,
    original_rows,
    padded_left,
    processor,
    text_config,
    tokenizer,
    write_files,
)

kinds = pytest.mark.parametrize("has_qformer", [True, False], ids=["qformer", "patches"])
levels = pytest.mark.parametrize("level", [None, 0, 1, 2], ids=["unfused", "level0", "level1", "level2"])


def fused(model: nn.Module, level: int | None = 1) -> Any:
    """A fused copy; None: the model itself."""
    if level is not None:
        model = copy.deepcopy(model)
        mllm_fast.fuse(model, level=level)
    return model


def original(folder: Path, has_qformer: bool = True) -> tuple[MiniGPT4ForConditionalGeneration, dict[str, Any]]:
    """A model from files in the original's layout, in fp64, and the files' tensors."""
    files = original_files(has_qformer=has_qformer)
    given = write_files(folder, files, llama())
    return MiniGPT4ForConditionalGeneration.from_original(
        **given, config=config(has_qformer=has_qformer)
    ).double(), files


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(count)]


@levels
@kinds
def test_rows_of_images(tmp_path: Path, has_qformer: bool, level: int | None) -> None:
    model, files = original(tmp_path, has_qformer)
    pixels = inputs()["pixel_values"]
    out = fused(model, level).get_image_features(pixels.double())
    assert_same({"rows": out.pooler_output.detach()}, {"rows": original_rows(files, pixels)}, 1e-12)


@kinds
def test_the_norm_after_the_vision_model(tmp_path: Path, has_qformer: bool) -> None:
    """LAVIS's plain LayerNorm: another eps than transformers', also after saving and loading."""
    model, _ = original(tmp_path / "a", has_qformer)
    model.save_pretrained(tmp_path / "b")
    for other in (model, MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "b")):
        assert other.vision_model.post_layernorm.eps == 1e-5
        assert other.vision_model.encoder.layers[0].layer_norm1.eps == 1e-6


@pytest.mark.parametrize("level", [None, 1], ids=["unfused", "fused"])
@kinds
def test_ragged_batch(tmp_path: Path, has_qformer: bool, level: int | None) -> None:
    """Logits of prompts with two images, one, and none, padded left, against the original's pieces put together."""
    model, files = original(tmp_path, has_qformer)
    p = processor("vicuna" if has_qformer else "llama2")
    prompts = [p.instruct("Which is this?", images=2), p.instruct("What?"), p.instruct("Say hi", images=0)]
    given = p([pictures(2), pictures(1, seed=1), []], prompts)
    rows, lm = original_rows(files, given["pixel_values"]), model.language_model
    owned = (rows[:2], rows[2:], [])
    batch = padded_left(
        [original_prompt(lm, tokenizer(), prompt, own) for prompt, own in zip(prompts, owned, strict=True)]
    )
    assert torch.equal(given["attention_mask"], batch["attention_mask"])
    expected = lm(**batch, position_ids=batch["attention_mask"].cumsum(1).sub(1).clamp(min=0)).logits
    ours, seen = fused(model, level), given["attention_mask"].bool()
    got = ours(**given | {"pixel_values": given["pixel_values"].double()}).logits
    # Llama's norms compute in fp32.
    torch.testing.assert_close(got[seen], expected[seen], atol=2e-5, rtol=2e-5)
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    without = ours(**text, image_features=torch.zeros_like(rows)).logits
    assert ((got - without)[:2, -1].abs().amax(dim=-1) > 1e-2).all(), "the images matter"
    assert (got - without)[2, -1].abs().max() < 1e-5


def original_loss(lm: Any, prompts: list[str], answers: list[str], rows: list[list[Tensor]], limit: int) -> Tensor:
    """The original's training pass: bos, prompt, answer; each answer is padded before its prompt's padding follows."""
    words, tok = lm.get_input_embeddings().weight, tokenizer()
    inside = []
    for prompt, own in zip(prompts, rows, strict=True):
        pieces = [
            words[torch.tensor(tok(piece, add_special_tokens=False)["input_ids"], dtype=torch.long)]
            for piece in prompt.split("<ImageHere>")
        ]
        inside.append(torch.cat([part for i, piece in enumerate(pieces) for part in (piece, *own[i : i + 1])]))
    ids = [tok(answer + "###", add_special_tokens=False)["input_ids"][:limit] for answer in answers]
    longest, most = max(map(len, inside)), max(map(len, ids))
    samples, masks, targets = [], [], []
    for prompt, answer in zip(inside, ids, strict=True):
        padded = answer + [tok.pad_token_id] * (most - len(answer))
        rest = longest - len(prompt)
        samples.append(torch.cat([words[:2][1:], prompt, words[torch.tensor(padded)], words[:1].expand(rest, -1)]))
        masks.append([1] * (1 + len(prompt) + len(answer)) + [0] * (most - len(answer) + rest))
        goal = [-100 if i == tok.pad_token_id else i for i in padded]
        targets.append([-100] * (1 + len(prompt)) + goal + [-100] * rest)
    return lm(inputs_embeds=torch.stack(samples), attention_mask=torch.tensor(masks), labels=torch.tensor(targets)).loss


@pytest.mark.parametrize("level", [None, 1], ids=["unfused", "fused"])
def test_training(tmp_path: Path, level: int | None) -> None:
    """The loss and the projection's gradients; frozen parts get none, and drop nothing out."""
    model, files = original(tmp_path)
    p, limit = processor(), 12
    prompts = [p.instruct("Describe this."), p.instruct("Which of both?", images=2), p.instruct("Hi", images=0)]
    answers = ["a $$ sign", "The second, and more than that", "Hm"]
    batch = p.training_batch([pictures(1), pictures(2), []], prompts, answers, max_answer_tokens=limit)
    ours = fused(model, level).freeze().train()
    assert not ours.qformer.training
    assert not ours.vision_model.training
    assert ours.language_projection.training
    loss = ours(**batch | {"pixel_values": batch["pixel_values"].double()}).loss
    loss.backward()
    assert {name for name, parameter in ours.named_parameters() if parameter.grad is not None} == {
        "language_projection.linear.weight",
        "language_projection.linear.bias",
    }

    leaves = {
        name: files["projection"][name].double().requires_grad_() for name in ("llama_proj.weight", "llama_proj.bias")
    }
    rows = original_rows(files | {"projection": leaves}, batch["pixel_values"])
    expected = original_loss(model.language_model, prompts, answers, [list(rows[:1]), list(rows[1:]), []], limit)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, leaf in leaves.items():
        found = ours.get_parameter(name.replace("llama_proj", "language_projection.linear")).grad
        torch.testing.assert_close(found, leaf.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@kinds
def test_precision(has_qformer: bool, dtype: torch.dtype) -> None:
    """Rows, and gradients of what is trained, fused: at most twice the unfused model's own error."""

    def run(model: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        model.freeze().to(dtype).zero_grad()
        pixels = (
            torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed)).bfloat16().half()
        )
        return backward_results(model.get_image_features(pixels.to(dtype)).pooler_output, {}, model)

    def build(seed: int) -> nn.Module:
        return minigpt4(seed=seed, has_qformer=has_qformer)

    check_precision(build, mllm_fast.fuse, run, dtype)


def test_what_fuse_does() -> None:
    model = minigpt4()
    report = mllm_fast.fuse(model)
    assert {"qformer", "language_projection"} <= {row.path for row in report.fused}
    assert type(model.language_projection).__name__ == "MiniGPT4Projection"
    assert "norm_linear" in next(row.kernels for row in report.fused if row.path == "language_projection")
    mllm_fast.unfuse(model)
    assert not any(state_of(module) for module in model.modules())
    without = minigpt4(has_qformer=False)
    assert "language_projection" in [row.path for row in mllm_fast.fuse(without).fused]


def test_the_queries_are_one_row_in_memory() -> None:
    """What is the same for all images is computed once: the first layer's self-attention projects QUERIES rows."""
    ours = fused(minigpt4())
    with recording() as seen, torch.no_grad():
        ours.get_image_features(inputs()["pixel_values"])
    assert min(gemm.m for gemm in seen.gemms) == QUERIES
    shapes: list[tuple[int, ...]] = []
    ours.qformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["query_embeds"].stride()), with_kwargs=True
    )
    ours.get_image_features(inputs()["pixel_values"])
    assert shapes[0][0] == 0
    assert any(gemm.k == VISION_FFN for gemm in seen.gemms)


@kinds
def test_save_and_load(tmp_path: Path, has_qformer: bool) -> None:
    model = minigpt4(has_qformer=has_qformer)
    given = inputs(model.config.rows_per_image)
    expected = model(**given).logits
    fused(model).save_pretrained(tmp_path)
    processor("vicuna" if has_qformer else "llama2").save_pretrained(tmp_path)
    assert sorted(file.suffix for file in tmp_path.iterdir() if "model" in file.name) == [".safetensors"]
    for cls in (MiniGPT4ForConditionalGeneration, AutoModelForImageTextToText, AutoModel):
        again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is MiniGPT4ForConditionalGeneration
        assert not any(info.values()), info
        assert torch.equal(again.eval()(**given).logits, expected)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(again(**given).logits, expected)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MiniGPT4Config
    before = model.config.to_dict()
    after = {
        name: value
        for name, value in loaded.to_dict().items()
        if name not in ("architectures", "dtype", "_name_or_path")
    }
    assert after == {name: before[name] for name in after}


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_other_language_models(tmp_path: Path, kind: str) -> None:
    """Also those whose head is their embeddings, or that count positions by themselves."""
    model, given = minigpt4(kind), inputs()
    model.save_pretrained(tmp_path)
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**given).logits, model(**given).logits)
    mask = given["attention_mask"][0].bool()
    alone = model(given["input_ids"][:1, mask], given["pixel_values"][:2]).logits
    padded = {name: torch.nn.functional.pad(given[name][:1], (3, 0)) for name in ("input_ids", "attention_mask")}
    shifted = model(**padded, pixel_values=given["pixel_values"][:2]).logits
    torch.testing.assert_close(shifted[:, -alone.shape[1] :], alone, atol=1e-4, rtol=1e-4)
    head = again.get_output_embeddings().weight
    assert (head is again.get_input_embeddings().weight) == again.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """In fp16 the Q-Former keeps its fp32 weights, as in the original and in transformers' BLIP-2."""
    minigpt4().save_pretrained(tmp_path)
    model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    kept = torch.float32 if dtype == torch.float16 else dtype
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (kept if name.startswith(("query_tokens", "qformer.")) else dtype), name
    given = inputs()
    for each in (model, fused(model)):
        out = each(**given)
        assert out.logits.dtype == dtype
        assert out.logits.isfinite().all()


def test_device_map_splits_between_layers() -> None:
    """accelerate is told which modules stay whole: the parts' layers, the language model's and the projection."""
    from accelerate import infer_auto_device_map

    model = minigpt4()
    whole = set(model._no_split_modules)
    assert {"LlamaDecoderLayer", "Blip2EncoderLayer", "MiniGPT4Projection"} <= whole
    size = sum(parameter.nbytes for parameter in model.parameters())
    places = infer_auto_device_map(
        model, {0: size // 2, "cpu": size, "disk": size}, no_split_module_classes=list(whole)
    )
    assert len(set(places.values())) > 1
    assert not any(name.startswith("vision_model.encoder.layers.0.self_attn") for name in places)


def test_gradients_with_checkpointing() -> None:
    """Nothing of the frozen parts is recomputed, and the projection's gradients stay what they are."""
    model = fused(minigpt4()).freeze().train()
    given = inputs()
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    model(**given).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    calls: list[int] = []
    model.qformer.register_forward_hook(lambda *_: calls.append(1))
    model(**given).loss.backward()
    assert calls == [1]
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected, 1e-5)


def test_labels_are_never_image_tokens() -> None:
    model, given = minigpt4(), inputs()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    expected = model(**given, labels=labels.masked_fill(labels == IMAGE, -100)).loss
    assert torch.equal(model(**given, labels=labels).loss, expected)


def test_what_is_refused() -> None:
    model, given = minigpt4(), inputs()
    with pytest.raises(ValueError, match=r"has shape \(1, 3, 28, 28\); expected \[images, 3, 56, 56\]"):
        model.get_image_features(torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match=r"hold 15 image tokens .* but 4 images need 3 each, 12 in all"):
        model(**given | {"pixel_values": given["pixel_values"][:4]})
    with pytest.raises(ValueError, match="70 pixels has 25 patches, which do not divide into rows of 4"):
        MiniGPT4Config({"image_size": 70}, text_config=text_config(), has_qformer=False)
    with pytest.raises(ValueError, match="T5Config, of an encoder-decoder model"):
        MiniGPT4Config(text_config={"model_type": "t5"})


def test_released_sizes() -> None:
    """The trained parameters of the released models: 3,149,824 with a Q-Former (7B), 23.07 M without."""
    with torch.device("meta"):
        made = MiniGPT4ForConditionalGeneration(MiniGPT4Config())
        patches = MiniGPT4ForConditionalGeneration(MiniGPT4Config(has_qformer=False))
    counts = [sum(p.numel() for p in model.language_projection.parameters()) for model in (made, patches)]
    assert counts == [3_149_824, 5632 * 4096 + 4096]
    assert (made.config.rows_per_image, patches.config.rows_per_image) == (32, 64)
    assert sum(p.numel() for p in made.qformer.parameters()) == 105_137_664
    assert MiniGPT4Config({"image_size": 448}, has_qformer=False).rows_per_image == 256
    assert made.freeze().language_projection.linear.weight.requires_grad
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == 3_149_824

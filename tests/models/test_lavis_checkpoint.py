"""LAVIS's files of BLIP-2's second stage and of InstructBLIP, written here in its layout from a model with known outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mllm_fast
from mllm_fast.models.lavis_checkpoint import LavisMismatchError, load_lavis, save_lavis
from mllm_fast.models.original_checkpoint import UnreadableCheckpointError
from tests.families.qformers import QUERIES, generator, prompt
from tests.models.lavis_files import copied, norm, qformer, tensors, vision

# What LAVIS's classes call the language model: Blip2OPT, Blip2T5, Blip2VicunaInstruct, Blip2T5Instruct.
KINDS = {
    ("blip2", "opt"): "opt",
    ("blip2", "t5"): "t5",
    ("instructblip", "llama"): "llm",
    ("instructblip", "t5"): "t5",
    ("instructblipvideo", "llama"): "llm",
}
CASES = [(name, language) for name, language in KINDS]


def lavis_file(model: Any, name: str, language: str, *, whole: bool) -> dict[str, Tensor]:
    """As LAVIS's runner saves it: without what is frozen by its first name, with buffers; `whole`: everything was trained."""
    kind = KINDS[name, language]
    embeddings = None if name == "blip2" else model.qformer.embeddings
    layernorm = model.qformer.layernorm if embeddings is None else embeddings.layernorm
    state = qformer(model.qformer, layernorm, embeddings) | norm(model.vision_model)
    state |= {"query_tokens": model.query_tokens} | tensors({f"{kind}_proj": model.language_projection})
    if language == "llama":
        state["llm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    lm = model.language_model.state_dict()
    if whole:
        state |= vision(model.vision_model)
    else:
        first = {n for n, _ in model.language_model.named_parameters()}
        lm = {n: value for n, value in lm.items() if n not in first}
        assert bool(lm) is (language != "llama")  # the tied names
    return copied(state | {f"{kind}_model.{n}": value for n, value in lm.items()})


def logits(model: nn.Module, name: str, language: str) -> Tensor:
    inputs = prompt(name)
    if language == "t5":
        inputs["labels"] = inputs["input_ids"][:, -5:].contiguous()
    with torch.no_grad():
        out: Tensor = model(**{n: v.float() if v.is_floating_point() else v for n, v in inputs.items()}).logits
    return out


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("name", "language"), CASES)
def test_a_file_of_lavis_there_and_back(tmp_path: Path, name: str, language: str, whole: bool) -> None:
    trained, fresh = generator(name, language, 1), generator(name, language, 2)
    written = lavis_file(trained, name, language, whole=whole)
    torch.save({"model": written, "epoch": 3, "scaler": None}, tmp_path / "checkpoint.pth")
    if not whole:
        after: Any = trained.vision_model.post_layernorm
        own = {n: value for n, value in trained.vision_model.state_dict().items() if "post_layernorm" not in n}
        fresh.vision_model.load_state_dict(own, strict=False)
        fresh.language_model.load_state_dict(trained.language_model.state_dict())
        assert not torch.equal(fresh.vision_model.post_layernorm.weight, after.weight)
    if fused := whole and name == "blip2":
        mllm_fast.fuse(fresh)
    report = load_lavis(fresh, tmp_path / "checkpoint.pth")
    assert report.kept == (() if whole else ("vision model", "language model"))
    assert ("no vision model and no language model in the checkpoint" in str(report)) is not whole
    for n, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[n], value), n
    # The norm after LAVIS's vision model has another eps than transformers builds.
    ours, other = logits(fresh, name, language), logits(trained, name, language)
    trained.vision_model.post_layernorm.eps = 1e-5
    theirs = logits(trained, name, language)
    assert not torch.equal(theirs, other)
    assert fresh.vision_model.post_layernorm.eps == 1e-5
    if fused:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ours, theirs)
    file = save_lavis(fresh, tmp_path / "back.safetensors", vision=whole, language_model=whole)
    back = load_file(file)
    tied = {f"{KINDS[name, language]}_model.{n}" for n in trained.language_model.state_dict()} if not whole else set()
    assert set(back) == {n for n in written if not n.endswith(("position_ids", "inv_freq"))} - tied
    assert all(torch.equal(value, written[n]) for n, value in back.items())
    assert load_lavis(generator(name, language, 3), file).kept == report.kept


def test_what_does_not_fit_is_listed_and_changes_nothing(tmp_path: Path) -> None:
    written = lavis_file(generator("blip2", "opt", 1), "blip2", "opt", whole=False)
    written["t5_proj.bias"] = written.pop("opt_proj.bias")  # of another language model, if of the same width
    written["query_tokens"] = torch.zeros(1, QUERIES + 1, 24)
    written["opt_model.model.decoder.layers.0.fc1.bias"] = torch.zeros(64)
    torch.save({"model": written}, tmp_path / "file.pth")
    model = generator("blip2", "opt", 2)
    before = copied(model.state_dict())
    with pytest.raises(LavisMismatchError) as caught:
        load_lavis(model, tmp_path / "file.pth")
    for line in (
        "missing: language_projection.bias",
        "unexpected: t5_proj.bias",
        "missing: language_model.model.decoder.layers.0.fc1.weight",
        f"shape of query_tokens: the checkpoint has (1, {QUERIES + 1}, 24), the model has (1, {QUERIES}, 24)",
    ):
        assert f"\n  {line}" in str(caught.value)
    # InstructBLIP's text half has no place in BLIP-2.
    written = lavis_file(generator("instructblip", "t5", 1), "instructblip", "t5", whole=False)
    with pytest.raises(LavisMismatchError, match=r"unexpected: embeddings\.word_embeddings\.weight"):
        load_lavis(model, written)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert model.vision_model.post_layernorm.eps == 1e-6


def test_what_is_refused(tmp_path: Path) -> None:
    model = generator("blip2", "opt", 1)
    with pytest.raises(ValueError, match=r"no checkpoints of a Linear; expected one of Blip2Stage1, Blip2For"):
        load_lavis(nn.Linear(2, 2), {})
    torch.save({"model": {"query_tokens": Path("x")}}, tmp_path / "code.pth")
    with pytest.raises(UnreadableCheckpointError, match="a pickle can run code"):
        load_lavis(model, tmp_path / "code.pth")
    file = save_lavis(model, tmp_path / "mine.pth")
    assert not any(name.startswith(("visual_encoder.", "opt_model.")) for name in torch.load(file)["model"])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_lavis(model, file)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=r"language_model.*q_proj"), model)
    save_lavis(model, file, overwrite=True)
    with pytest.raises(ValueError, match="merge LoRA"):
        save_lavis(model, file, language_model=True, overwrite=True)

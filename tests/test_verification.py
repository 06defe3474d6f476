"""verify: passes for models that fusing leaves alone but for rounding, and fails for one that it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mllm_fast
from mllm_fast import verification
from mllm_fast.families import llava, state_of
from mllm_fast.verification import VerifyReport, verify
from tests.families import builders, llava_models, qformers


def case(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "llava":
        return llava_models.model(), llava_models.inputs()
    if name == "idefics":
        return builders.idefics(), builders.idefics_inputs()
    if name == "open_flamingo":
        return builders.of_model(), builders.of_inputs()
    return qformers.generator(name), qformers.prompt(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava", "idefics", "open_flamingo", "blip2", "instructblip"])
def test_passes(name: str, dtype: torch.dtype) -> None:
    model, inputs = case(name)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    report = verify(model.to(dtype).eval(), inputs)
    assert report.passed, str(report)
    assert report.fused > 0
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert "logits" in [output.name for output in report.outputs]
    assert report.new_tokens > 0
    assert all(output.unfused_error > 0 for output in report.outputs if output.name == "logits")
    assert not any(state_of(module) for module in model.modules())


def test_a_changed_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = case("llava")
    cls = llava.FusedLlavaMultiModalProjector
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args: forward(self, *args) * 1.001)
    report = verify(model, inputs)
    assert not report.passed
    assert "FAILED" in str(report)
    monkeypatch.setattr(cls, "forward", lambda self, *args: forward(self, *args) * float("nan"))
    assert not verify(model, inputs, new_tokens=0).passed


def test_a_fused_model_stays_fused_and_the_mode_stays(tmp_path: Path) -> None:
    model, inputs = case("llava")
    mllm_fast.fuse(model)
    model.train()
    report = verify(model, inputs, new_tokens=3)
    assert report.passed
    assert model.training
    assert any(state_of(module) for module in model.modules())
    saved = json.loads(report.save(tmp_path / "deep" / "report.json").read_text())
    assert saved["passed"] is True
    assert saved["versions"]["torch"] == torch.__version__
    assert {"name", "ratio", "unfused_error", "fused_error"} <= saved["outputs"][0].keys()


def test_a_report_comes_back_and_says_what_a_bug_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, inputs = case("llava")
    report = verify(model, inputs, new_tokens=2)
    again = VerifyReport.from_json(report.save(tmp_path / "report.json").read_text())
    assert again == report
    assert str(again) == str(report)
    assert report.model_class.endswith("modeling_llava.LlavaForConditionalGeneration")
    assert report.options.startswith("level 1")
    assert len(report.modules) == report.fused
    assert {"FusedLlavaModel", "FusedLlavaMultiModalProjector"} <= {row.now for row in report.modules}
    assert all(row.kernels and row.was.startswith("transformers.") for row in report.modules)
    assert report.machine["system"] and report.machine["cpu"] and report.versions["torch"] in str(report)

    def fail(self: nn.Module, *args: Any) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(llava.FusedLlavaMultiModalProjector, "forward", fail)
    broken = verify(model, inputs, new_tokens=2)
    assert not broken.passed
    assert "a kernel failed" in str(broken)
    assert "FAILED" in str(broken)
    assert "Traceback" in broken.error
    assert str(VerifyReport.from_json(broken.to_json())) == str(broken)
    assert not any(state_of(module) for module in model.modules())
    for text in ("{", "[]", '{"model": 1}', "null"):
        with pytest.raises(ValueError, match="no report of `mllm-fast verify`"):
            VerifyReport.from_json(text)


def test_tokens_count_up_to_the_first_difference() -> None:
    unfused, fused = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 9, 3], [4, 5, 6]])
    assert verification._same(unfused, fused) == (6, 4)
    assert verification._same(unfused, fused[:, :2]) == (6, 3)


def test_nothing_to_fuse() -> None:
    with pytest.raises(mllm_fast.NothingToFuseError):
        verify(nn.Linear(2, 2), {"input": torch.zeros(1, 2)})

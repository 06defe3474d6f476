"""Every stage runs: trains what it should and nothing else, with the published settings, and the loss falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mllm_fast
from mllm_fast.finetune import Lora
from mllm_fast.finetune.data import Sample
from mllm_fast.finetune.stages import STAGES, Stage, prepare_stage, run_stage, stage_named
from tests.finetune import systems

# stage -> system, and what the names of all trained parameters hold.
CASES = {
    "flamingo-bridge": ("flamingo", (".resampler.", ".blocks.")),
    "blip2-stage1": ("blip2-stage1", ("retrieval.", "lm_head.", "temperature")),
    "blip2-stage2": ("blip2-opt", ("qformer.", "query_tokens", "language_projection.", "post_layernorm.")),
    "minigpt4-projection": ("minigpt4", ("language_projection.",)),
    "llava-stage1": ("llava", ("multi_modal_projector.",)),
    "llava-stage2": ("llava", ("multi_modal_projector.", ".lora_A.", ".lora_B.")),
    "mplug-owl-lora": ("mplug-owl", (".lora_A.", ".lora_B.")),
}
BUILD = {**systems.SYSTEMS, "blip2-stage1": systems.blip2_stage1}


def test_there_is_a_case_for_every_stage() -> None:
    assert set(CASES) == set(STAGES)


@pytest.mark.parametrize("name", CASES)
def test_a_stage_trains_its_parts_and_nothing_else(name: str, tmp_path: Path) -> None:
    system, parts = CASES[name]
    model, processor = BUILD[system]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # The same batch again and again: its loss has to fall.
    data = systems.samples(3)
    result = run_stage(
        name, model=model, processor=processor, data=data, output=tmp_path / "run", batch_size=3, steps=6, weight_decay=0.0,
        learning_rate=3e-3, warmup_steps=0, progress=False,
    )  # fmt: skip
    assert result.losses[-1] < result.losses[0]
    state = load_file(tmp_path / "run" / "trained.safetensors")
    names = {key.replace(".base_layer", "") for key in model.state_dict()}
    assert set(state) <= set(model.state_dict())
    assert set(state)
    assert all(any(part in f".{key}" for part in parts) for key in state), sorted(state)
    for part in parts:
        assert any(part in f".{key}" for key in state), part
    after = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    assert set(before) <= names
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved <= set(state)
    assert moved or "lora" in STAGES[name].train


@pytest.mark.parametrize("name", CASES)
def test_settings_are_the_published_ones(name: str) -> None:
    stage = STAGES[name]
    settings = stage.training_settings(10**8)
    for key, value in stage.settings.items():
        assert getattr(settings, key) == value
    assert settings.steps == int(stage.epochs * 10**8 / settings.batch_size)
    if stage.warmup:
        assert settings.warmup_steps == round(stage.warmup * settings.steps)
    # In a short run the published warm-up would never end.
    assert stage.training_settings(1000, steps=40, batch_size=8).warmup_steps <= 4
    assert stage.training_settings(1000, steps=40, batch_size=8, warmup_steps=30).warmup_steps == 30
    assert stage.training_settings(10**8, processes=4).batch_size * 4 == settings.batch_size
    assert stage.training_settings(1000, batch_size=8, epochs=2, accumulation=5).steps == 50


def test_a_learning_rate_keeps_its_ratio_to_the_lowest() -> None:
    stage = STAGES["blip2-stage1"]
    assert stage.training_settings(1000, learning_rate=3e-4).minimum_learning_rate == pytest.approx(3e-5)
    assert stage.training_settings(1000, learning_rate=3e-4, minimum_learning_rate=0.0).minimum_learning_rate == 0
    assert stage.training_settings(1000, schedule="constant").minimum_learning_rate == 0


def test_over_a_quantised_language_model(tmp_path: Path) -> None:
    model, processor = systems.llava()
    mllm_fast.quantize_llm(model, "nf4", compute_dtype=torch.float32)
    result = run_stage(
        "llava-stage2", model=model, processor=processor, data=systems.samples(3), output=tmp_path / "run", batch_size=3,
        steps=6, learning_rate=3e-3, lora=Lora(r=4, targets=("all-linear",)), progress=False,
    )  # fmt: skip
    assert result.losses[-1] < result.losses[0]
    state = load_file(tmp_path / "run" / "trained.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert any("gate_proj.lora_A" in key for key in state)
    assert all(value.shape[0] == 4 for key, value in state.items() if "lora_A" in key)


def test_evaluation_and_resuming(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "learning_rate": 1e-3, "progress": False, "log_every": 1}

    def run(steps: int, output: str, **more: Any) -> Any:
        torch.manual_seed(0)
        model, processor = systems.minigpt4()
        samples = systems.samples(6)
        return run_stage(
            "minigpt4-projection", model=model, processor=processor, data=samples[:4], held_out=samples[4:],
            output=tmp_path / output, steps=steps, schedule="constant", warmup_steps=0, **options, **more,
        )  # fmt: skip

    whole = run(6, "whole", features=tmp_path / "features")
    assert whole.best is not None
    run(3, "parts", features=tmp_path / "features")
    assert run(6, "parts", features=tmp_path / "features", resume=True).losses == whole.losses


def test_the_table_has_the_shape_of_a_batch() -> None:
    model, processor = systems.flamingo()
    run = prepare_stage(
        "flamingo-bridge", model=model, processor=processor, data=systems.samples(4), batch_size=2, epochs=3
    )
    assert run.settings.steps == 6
    assert "bridge" in str(run.plan)
    assert "yes" in str(run.plan)


@pytest.mark.parametrize("system", ["blip2-t5", "instructblip-t5"])
def test_captions_longer_than_what_is_asked(system: str, tmp_path: Path) -> None:
    """An encoder-decoder's labels are as long as its captions, however short its input is."""
    model, processor = systems.SYSTEMS[system]()
    picture = systems.samples(1)[0].images
    data = [Sample(picture, "what is the picture of the image. " * 3, "") for _ in range(2)]
    result = run_stage(
        "blip2-stage2", model=model, processor=processor, data=data, output=tmp_path / "run", batch_size=2, steps=2,
        learning_rate=1e-3, warmup_steps=0, progress=False,
    )  # fmt: skip
    assert result.losses[-1] < result.losses[0]


def test_held_out_pairs_that_fill_no_batch(tmp_path: Path) -> None:
    """Alone in a batch, a pair would have nothing to be told from: the third one is left out."""
    model, processor = systems.blip2_stage1()
    data = systems.samples(5)
    options: dict[str, Any] = {"batch_size": 2, "steps": 1, "progress": False}

    def run(held_out: list[Sample], name: str) -> Any:
        torch.manual_seed(0)
        model, processor = systems.blip2_stage1()
        return run_stage(
            "blip2-stage1", model=model, processor=processor, data=data[:2], held_out=held_out, output=tmp_path / name,
            **options,
        )  # fmt: skip

    three, two = run(data[2:], "three"), run(data[2:4], "two")
    assert three.best == two.best is not None
    given: dict[str, Any] = {"model": model, "processor": processor, "data": data[:2], "held_out": data[2:3]}
    with pytest.raises(ValueError, match=r"has 1 row\(s\); the loss compares the rows of a batch .* at least 2"):
        run_stage("blip2-stage1", output=tmp_path / "one", **given, **options)


def test_samples_of_ones_own(tmp_path: Path) -> None:
    model, processor = systems.llava()
    batch = prepare_stage(
        "llava-stage1", model=model, processor=processor, data=systems.samples(2), batch_size=2
    ).collate(systems.samples(2))  # fmt: skip
    stage = Stage("mine", ("LlavaForConditionalGeneration",), "projection", {"batch_size": 1}, 2, "nowhere")
    result = run_stage(
        stage, model=model, processor=None, data=[0, 1], output=tmp_path / "run", progress=False,
        collate=lambda rows: {name: value[rows] for name, value in batch.items()},
    )  # fmt: skip
    assert result.step == 4


def test_what_it_refuses() -> None:
    model, processor = systems.llava()
    given: dict[str, Any] = {"model": model, "processor": processor, "data": systems.samples(2), "batch_size": 2}
    for stage, more, says in (
        ("llava-stage", {}, "no stage 'llava-stage'; did you mean 'llava-stage[12]'\\? Stages are flamingo-bridge"),
        ("xyz", {}, "no stage 'xyz'; Stages are"),
        ("blip2-stage1", {}, "'blip2-stage1' trains Blip2Stage1, and the model is a .*Llava.* has llava-stage1, llava-stage2"),
        ("llava-stage1", {"data": []}, "the data set is empty"),
        ("llava-stage1", {"learning_rat": 1}, "no setting 'learning_rat'; did you mean 'learning_rate'"),
        ("llava-stage1", {"steps": 1, "epochs": 1}, "both epochs and steps"),
        ("llava-stage1", {"batch_size": 9}, "2 samples, and an update takes 9"),
        ("llava-stage1", {"train": "bridge"}, "train names 'bridge'; this system has projection"),
        ("llava-stage1", {"lora": Lora()}, "lora is given"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            prepare_stage(stage, **{**given, **more})
    with pytest.raises(ValueError, match="and the model is a Linear, which has no stage"):
        prepare_stage("llava-stage1", **{**given, "model": nn.Linear(2, 2)})
    assert stage_named("llava-stage1").plain

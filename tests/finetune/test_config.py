"""Configurations: every key and type is checked, and an error says which, where, and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm_fast.finetune import Lora
from mllm_fast.finetune.config import ConfigError, FinetuneConfig, read_config

WHOLE = """
stage: llava-stage2
model: ./model
llm: nf4
dtype: bfloat16
device: cpu
data: {path: pictures, captions: other.csv, held_out: 0.1, seed: 3, check: no}
output: runs/one
train: lora
lora: {r: 4, alpha: 8, targets: [q_proj, v_proj]}
trained_dtype: float32
checkpointing: recompute
prompt: ""
max_caption_tokens: 40
features: cache
settings: {learning_rate: 1e-4, steps: 10, batch_size: 2, max_grad_norm: null, betas: [0.9, 0.98], schedule: linear}
"""
LEAST = "stage: llava-stage1\nmodel: org/name\ndata: {path: org/data}\noutput: /runs/one\n"


def read(folder: Path, text: str) -> FinetuneConfig:
    path = folder / "config.yaml"
    path.write_text(text)
    return read_config(path)


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    config = read(tmp_path, WHOLE)
    assert config.stage == "llava-stage2"
    assert config.lora == Lora(r=4, alpha=8.0, targets=("q_proj", "v_proj"))
    assert config.data.held_out == 0.1
    assert config.data.check is False
    assert config.prompt == ""
    # YAML itself reads 1e-4 as a text.
    assert config.settings == {
        "learning_rate": 1e-4, "steps": 10, "batch_size": 2, "max_grad_norm": None, "betas": (0.9, 0.98), "schedule": "linear",
    }  # fmt: skip
    # Paths are from the file's folder, whatever the working directory; what is written as one is one.
    assert config.model == str(tmp_path / "model")
    assert config.data.path == str(tmp_path / "pictures")
    assert config.output == str(tmp_path / "runs/one")
    assert config.features == str(tmp_path / "cache")


def test_all_linear_layers(tmp_path: Path) -> None:
    assert "targets: [q_proj, v_proj]" in WHOLE
    config = read(tmp_path, WHOLE.replace("targets: [q_proj, v_proj]", "targets: all-linear"))
    assert config.lora == Lora(r=4, alpha=8.0, targets=("all-linear",))


def test_the_least(tmp_path: Path) -> None:
    config = read(tmp_path, LEAST)
    assert (config.model, config.data.path, config.output) == ("org/name", "org/data", "/runs/one")
    assert (config.llm, config.lora, config.features, config.settings) == (None, None, None, {})
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    assert read(tmp_path, LEAST).model == str(tmp_path / "org" / "name")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("stage: llava", "stag: llava", "unknown key stag; did you mean stage?"),
        ("llm: nf4", "llm: nf5", "llm is 'nf5' (str); expected one of nf4, fp4, int8"),
        ("dtype: bfloat16", "dtype: 3", "dtype is 3 (int); expected one of float32, bfloat16, float16"),
        ("train: lora", "train: [lora]", "train is ['lora'] (list); expected a text"),
        ("held_out: 0.1", "held_out: much", "data.held_out is 'much' (str); expected a number"),
        ("held_out: 0.1", "heldout: 0.1", "unknown key data.heldout; did you mean data.held_out?"),
        ("check: no", "check: 1", "data.check is 1 (int); expected true or false"),
        ("seed: 3", "seed: true", "data.seed is True (bool); expected a whole number"),
        ("data: {path: pictures, captions", "data: {captions", "data.path is missing; expected path, captions,"),
        ("lora: {r: 4", "lora: {rank: 4", "unknown key lora.rank"),
        ("lora: {r: 4", "lora: {r: 0", "lora: LoRA needs r >= 1"),
        ("targets: [q_proj, v_proj]", "targets: q_proj", "lora.targets is 'q_proj' (str); expected a list, each of it a text"),
        ("[q_proj, v_proj]", "[q_proj, 3]", "lora.targets[1] is 3 (int); expected a text"),
        ("steps: 10", "step: 10", "unknown key settings.step; did you mean settings.steps?"),
        ("steps: 10", "steps: 10.5", "settings.steps is 10.5 (float); expected a whole number"),
        ("learning_rate: 1e-4", "learning_rate: fast", "settings.learning_rate is 'fast' (str); expected a number"),
        ("learning_rate: 1e-4", "learning_rate: yes", "settings.learning_rate is True (bool); expected a number"),
        ("schedule: linear", "schedule: round", "settings.schedule is 'round' (str); expected one of cosine, linear"),
        ("max_caption_tokens: 40", "max_caption_tokens: many", "max_caption_tokens is 'many' (str); expected a whole number"),
        ("output: runs/one", "output:", "output is empty; expected a text"),
        ("data: {path: pictures, captions: other.csv, held_out: 0.1, seed: 3, check: no}", "data: pictures",
         "data is 'pictures' (str); expected keys with values: path, captions,"),
        ("train: lora", "train: lora\nstage: llava-stage1", "the key 'stage' stands there twice"),
        ("train: lora", "train: {lora", "is not YAML that can be read"),
        ("train: lora", "train: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_errors_name_the_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = WHOLE.replace(old, new)
    assert text != WHOLE
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert says in str(error.value)
    assert str(tmp_path / "config.yaml") in str(error.value)


def test_what_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.yaml does not exist"):
        read_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="the file is empty; expected keys with values: stage, model"):
        read(tmp_path, "")
    with pytest.raises(ConfigError, match="model, data, output is missing"):
        read(tmp_path, "stage: x")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not YAML that can be read"):
        read_config(tmp_path / "config.yaml")

"""mPLUG-Owl's files: the original's layout, written here name by name, and transformers' conventions for saving."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPTNeoXConfig,
    LlamaConfig,
)

import mllm_fast
from mllm_fast.models.mplug_owl import (
    MplugOwlConfig,
    MplugOwlForConditionalGeneration,
    load_original,
)
from mllm_fast.models.original_checkpoint import CheckpointMismatchError, read_checkpoint
from tests.models.mplug_owl_models import inputs, original_abstractor, original_vision, owl

WIDTH, VISION_FFN, ABSTRACTOR_FFN, TEXT, TEXT_FFN, WORDS, QUERIES = 32, 56, 40, 48, 64, 60, 3


def original_state(seed: int = 0) -> dict[str, Tensor]:
    """The parameters of an original checkpoint, with what older versions of transformers saved beside them."""
    shapes: dict[str, tuple[int, ...]] = {"query_tokens": (1, QUERIES, WIDTH)}

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, width: int, bias: bool = True) -> None:
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias")[: 1 + bias]})

    at = "vision_model.embeddings."
    shapes |= {f"{at}cls_token": (1, 1, WIDTH), f"{at}position_embedding": (1, 5, WIDTH)}
    shapes[f"{at}patch_embed.weight"] = (WIDTH, 3, 14, 14)
    norm(f"{at}pre_layernorm", WIDTH)
    for layer in range(2):
        at = f"vision_model.encoder.layers.{layer}."
        linear(f"{at}self_attn.query_key_value", 3 * WIDTH, WIDTH)
        linear(f"{at}self_attn.dense", WIDTH, WIDTH)
        linear(f"{at}mlp.fc1", VISION_FFN, WIDTH)
        linear(f"{at}mlp.fc2", WIDTH, VISION_FFN)
        norm(f"{at}input_layernorm", WIDTH)
        norm(f"{at}post_attention_layernorm", WIDTH)
    norm("vision_model.post_layernorm", WIDTH)
    for layer in range(3):
        at = f"abstractor.encoder.layers.{layer}.crossattention."
        for part in ("attention.query", "attention.key", "attention.value", "output.out_proj"):
            linear(f"{at}{part}", WIDTH, WIDTH)
        for part in ("norm1", "normk", "output.norm2"):
            norm(f"{at}{part}", WIDTH)
        linear(f"{at}output.mlp.w1", ABSTRACTOR_FFN, WIDTH)
        linear(f"{at}output.mlp.w3", ABSTRACTOR_FFN, WIDTH)
        linear(f"{at}output.mlp.w2", WIDTH, ABSTRACTOR_FFN)
        norm(f"{at}output.mlp.ffn_ln", ABSTRACTOR_FFN)
    linear("abstractor.visual_fc", TEXT, WIDTH)
    shapes["abstractor.vit_eos"] = (1, 1, TEXT)
    for layer in range(2):
        at = f"language_model.model.layers.{layer}."
        linear(f"{at}self_attn.q_proj", TEXT, TEXT, bias=False)
        linear(f"{at}self_attn.k_proj", TEXT // 2, TEXT, bias=False)
        linear(f"{at}self_attn.v_proj", TEXT // 2, TEXT, bias=False)
        linear(f"{at}self_attn.o_proj", TEXT, TEXT, bias=False)
        linear(f"{at}mlp.gate_proj", TEXT_FFN, TEXT, bias=False)
        linear(f"{at}mlp.up_proj", TEXT_FFN, TEXT, bias=False)
        linear(f"{at}mlp.down_proj", TEXT, TEXT_FFN, bias=False)
        norm(f"{at}input_layernorm", TEXT, bias=False)
        norm(f"{at}post_attention_layernorm", TEXT, bias=False)
        shapes[f"{at}self_attn.rotary_emb.inv_freq"] = (6,)
    shapes["language_model.model.embed_tokens.weight"] = (WORDS, TEXT)
    norm("language_model.model.norm", TEXT, bias=False)
    linear("language_model.lm_head", WORDS, TEXT, bias=False)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def original_config(**abstractor: Any) -> dict[str, Any]:
    """`config.json` as transformers 4.28 wrote it: whole sub-configurations, settings of generation among them."""
    every = {
        "_name_or_path": "", "architectures": None, "bad_words_ids": None, "chunk_size_feed_forward": 0, "do_sample": False,
        "early_stopping": False, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "max_length": 20,
        "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "num_beams": 1, "output_attentions": False,
        "output_hidden_states": False, "pruned_heads": {}, "return_dict": True, "temperature": 1.0, "top_k": 50,
        "tie_word_embeddings": True, "torch_dtype": None, "torchscript": False, "transformers_version": "4.28.0.dev0",
    }  # fmt: skip
    vision = {
        "model_type": "mplug_owl_vision_model", "hidden_size": WIDTH, "intermediate_size": VISION_FFN, "num_channels": 3,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-06, "attention_dropout": 0.0, "initializer_range": 0.02, "initializer_factor": 1.0,
        "projection_dim": 768, "use_flash_attn": False,
    }  # fmt: skip
    own = {
        "model_type": "mplug_owl_visual_abstract", "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": ABSTRACTOR_FFN, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
        "layer_norm_eps": 1e-06, "encoder_hidden_size": WIDTH, **abstractor,
    }  # fmt: skip
    text = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": WORDS, "hidden_size": TEXT,
        "intermediate_size": TEXT_FFN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-06, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "use_cache": True,
        "torch_dtype": "float16",
    }  # fmt: skip
    return {
        "architectures": ["MplugOwlForConditionalGeneration"], "initializer_factor": 1.0, "initializer_range": 0.02,
        "is_encoder_decoder": False, "model_type": "mplug-owl", "num_query_tokens": QUERIES, "text_config": every | text,
        "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": None,
        "use_decoder_only_language_model": True, "vision_config": every | vision,
        "visual_abstractor_config": every | own,
    }  # fmt: skip


def write(folder: Path, state: dict[str, Tensor], kind: str = "bin", **abstractor: Any) -> Path:
    """A folder in the original layout."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(original_config(**abstractor)))
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = list(state)
        shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, own in shards.items():
            torch.save({name: state[name] for name in own}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the buffers."""
    return {name: value for name, value in state.items() if not name.endswith("inv_freq")}


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == parameters(state).keys()
    for name, value in parameters(state).items():
        assert torch.equal(own[name], value), name


# the original's layout


@pytest.mark.parametrize("kind", ["bin", "shards", "safetensors"])
def test_an_original_checkpoint(tmp_path: Path, kind: str) -> None:
    state = original_state()
    folder = write(tmp_path / "owl", state, kind)
    model = MplugOwlForConditionalGeneration.from_original(folder)
    assert_holds(model, state)
    assert not model.training
    pixels = inputs()["pixel_values"]
    wide = {name: value.double() for name, value in state.items()}
    expected = original_abstractor(wide, original_vision(wide, pixels.double()))
    torch.testing.assert_close(
        model.double().get_image_features(pixels.double()).pooler_output, expected, atol=1e-9, rtol=1e-9
    )
    assert model.language_model.config.num_key_value_heads == 2
    assert model.dtype == torch.float64


def test_it_saves_back(tmp_path: Path) -> None:
    state = original_state()
    model = MplugOwlForConditionalGeneration.from_original(write(tmp_path / "owl", state))
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == parameters(state).keys()
    assert all(torch.equal(saved[name], value) for name, value in parameters(state).items())
    assert not list((tmp_path / "again").glob("*.bin"))
    assert_holds(MplugOwlForConditionalGeneration.from_original(tmp_path / "again"), state)
    # The original reads the same configuration.
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["model_type"] == "mplug-owl"
    for part in ("vision_config", "visual_abstractor_config"):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps"):
            assert written[part][name] == original_config()[part][name]
    assert written["text_config"]["model_type"] == "llama"
    assert written["num_query_tokens"] == QUERIES


def test_the_width_of_the_weights_counts(tmp_path: Path) -> None:
    """Released weights have another width than the original's default configuration says."""
    state = original_state()
    folder = write(tmp_path / "owl", state, intermediate_size=4096)
    assert AutoConfig.from_pretrained(folder).visual_abstractor_config.intermediate_size == 4096
    assert_holds(MplugOwlForConditionalGeneration.from_original(folder), state)


def test_auto_classes(tmp_path: Path) -> None:
    state = original_state()
    folder = write(tmp_path / "owl", state)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is MplugOwlConfig
    assert config.rows_per_image == QUERIES + 1
    for cls in (AutoModelForImageTextToText, AutoModel, MplugOwlForConditionalGeneration):
        model = cls.from_pretrained(folder)
        assert type(model) is MplugOwlForConditionalGeneration
        assert_holds(model, state)
    assert MplugOwlForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["llama", "gpt2", "opt"])
def test_save_and_load(tmp_path: Path, text: str) -> None:
    """Over any language model, also those whose head is their embeddings."""
    model, given = owl(text), inputs()
    fused = copy.deepcopy(model)
    mllm_fast.fuse(fused)
    fused.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MplugOwlForConditionalGeneration"]
    for again in (
        MplugOwlForConditionalGeneration.from_pretrained(tmp_path),
        MplugOwlForConditionalGeneration.from_original(tmp_path),
    ):
        assert torch.equal(again(**given).logits, model(**given).logits)


def test_a_new_model_is_initialised() -> None:
    torch.manual_seed(0)
    model = MplugOwlForConditionalGeneration(MplugOwlConfig.from_dict(original_config()))
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert p.std() < 0.1 or p.ndim == 4, name
    assert (model.query_tokens[0, 0] != model.query_tokens[0, 1]).any(), "queries that are all the same stay so"
    for p in (model.abstractor.vit_eos, model.query_tokens, model.vision_model.embeddings.cls_token):
        assert 0.01 < p.std() < 0.03


# devices


def test_device_maps(tmp_path: Path) -> None:
    model, given = owl(), inputs()
    model.save_pretrained(tmp_path / "owl")
    expected = model(**given).logits
    whole = MplugOwlForConditionalGeneration.from_pretrained(tmp_path / "owl", device_map="auto")
    mllm_fast.fuse(whole)
    torch.testing.assert_close(whole(**given).logits, expected, atol=1e-4, rtol=1e-4)
    parts = {"vision_model": "cpu", "query_tokens": "cpu", "abstractor": "disk", "language_model": "cpu"}
    parts["vision_model.encoder.layers.1"] = "disk"
    del parts["vision_model"]
    parts |= dict.fromkeys(
        ("vision_model.embeddings", "vision_model.encoder.layers.0", "vision_model.post_layernorm"), "cpu"
    )
    spread = MplugOwlForConditionalGeneration.from_original(
        tmp_path / "owl", device_map=parts, offload_folder=tmp_path / "offload"
    )
    assert spread.abstractor.visual_fc.weight.device.type == "meta"
    torch.testing.assert_close(spread(**given).logits, expected, atol=1e-4, rtol=1e-4)
    mllm_fast.fuse(spread)
    torch.testing.assert_close(spread(**given).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(
        spread.generate(**given, max_new_tokens=3, do_sample=False),
        model.generate(**given, max_new_tokens=3, do_sample=False),
    )


def test_layers_that_are_not_split() -> None:
    assert owl()._no_split_modules == {
        "MplugOwlVisionEmbeddings", "MplugOwlVisionEncoderLayer", "MplugOwlVisualAbstractorLayer", "LlamaDecoderLayer",
    }  # fmt: skip


# what does not fit


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = original_state()
    del state["abstractor.vit_eos"], state["language_model.lm_head.weight"]
    state["query_tokens"] = torch.zeros(1, QUERIES + 1, WIDTH)
    state["vision_model.encoder.layers.0.temporal.ln.weight"] = torch.zeros(WIDTH)
    folder = write(tmp_path / "owl", state)
    listed = [
        "missing: abstractor.vit_eos",
        "missing: language_model.lm_head.weight",
        "unexpected: vision_model.encoder.layers.0.temporal.ln.weight",
        "shape of query_tokens: the checkpoint has (1, 4, 32), the model has (1, 3, 32)",
    ]
    with pytest.raises(CheckpointMismatchError) as caught:
        MplugOwlForConditionalGeneration.from_original(folder)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == listed
    model = owl()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_original(model, folder)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == listed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Payload:
    """What a pickle may run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


def test_files_that_are_no_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        read_checkpoint(tmp_path / "none.bin")
    with pytest.raises(FileNotFoundError, match=r"no weights in .*; expected model.safetensors or pytorch_model.bin"):
        MplugOwlForConditionalGeneration.from_original(tmp_path)
    folder = write(tmp_path / "owl", original_state(), "shards")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lacks pytorch_model-00002-of-00002.bin, which pytorch_model.bin.index"
    ):
        MplugOwlForConditionalGeneration.from_original(folder)
    torch.save({"model": original_state(), "hook": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="nothing else is loaded, because a pickle can run code; convert it to safe"):
        read_checkpoint(tmp_path / "bad.pth")
    assert "this must not run" not in capsys.readouterr().out
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list; expected a mapping from names to tensors"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_checkpoint(tmp_path / "empty.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_trainers_put_parameters_below_a_key(tmp_path: Path, zipped: bool) -> None:
    state = original_state()
    saved = {"model": state, "optimizer": {"lr": 0.1, "state": torch.zeros(3)}, "epoch": 3}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    for meta in (False, True):
        read = read_checkpoint(tmp_path / "a.pth", meta=meta)
        assert {name: value.shape for name, value in read.items()} == {name: v.shape for name, v in state.items()}
        assert all(value.is_meta == meta for value in read.values())
    model = owl()
    load_original(model, tmp_path / "a.pth")
    assert_holds(model, state)


def test_default_configuration_is_the_released_model() -> None:
    config = MplugOwlConfig()
    assert (config.rows_per_image, config.image_token_id) == (65, -1)
    assert type(config.text_config) is LlamaConfig
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    given = MplugOwlConfig(text_config={"model_type": "gpt_neox", "hidden_size": 128})
    assert type(given.text_config) is GPTNeoXConfig
    assert type(AutoModelForCausalLM.from_config(owl("mpt").config.text_config)).__name__ == "MptForCausalLM"

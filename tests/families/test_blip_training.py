"""HF BLIP: checkpointing, dropout, wrapped and hooked children, and the way back."""

from __future__ import annotations

import copy
import pickle

import bitsandbytes
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import (
    BlipForImageTextRetrieval,
)

import mllm_fast
from mllm_fast import ops
from tests.families.blip_models import (
    ALL_KEYS_VALUES,
    IMAGE,
    LABELS,
    LAYERS,
    TEXT,
    TOKENS,
    check_generation,
    image_reader,
    inputs,
    model,
    run_text,
    task,
    text_model,
    twins,
)
from tests.families.instruments import (
    assert_same,
    recording,
)

# training


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    fused, upstream = twins(model().double().train())
    for m in (fused, upstream):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    fused.text_decoder.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: calls.append(1))
    assert_same(task(fused, labels=LABELS), task(upstream, labels=LABELS), 1e-9)
    assert len(calls) == 2


def test_checkpointed_layers_do_not_hold_image_keys_and_values() -> None:
    held = []
    for checkpointing in (False, True):
        fused, _ = twins(text_model().train())
        if checkpointing:
            fused.encoder.gradient_checkpointing = True
            for layer in fused.encoder.layer:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
                    f, *a, use_reentrant=False
                )
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            fused(input_ids=torch.randint(3, 90, (1, 5)), encoder_hidden_states=torch.randn(1, TOKENS, IMAGE))
        held.append(sum(t.numel() for t in saved if t.numel() == TOKENS * TEXT))
    assert held[0] >= TOKENS * ALL_KEYS_VALUES
    assert held[1] == 0


@pytest.mark.parametrize("order", ["fuse_first", "wrap_first"])
def test_checkpoint_wrappers(order: str) -> None:
    def wrap(m: nn.Module) -> None:
        layers = tuple(m.text_decoder.bert.encoder.layer)
        apply_activation_checkpointing(m, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda x: x in layers)
        assert isinstance(m.text_decoder.bert.encoder.layer[0], CheckpointWrapper)

    upstream = model().double().train()
    fused = copy.deepcopy(upstream)
    for step in (mllm_fast.fuse, wrap) if order == "fuse_first" else (wrap, mllm_fast.fuse):
        step(fused)
    wrap(upstream)
    assert_same(task(fused, labels=LABELS), task(upstream, labels=LABELS), 1e-9)
    with recording() as seen:
        task(fused, labels=LABELS)
    assert seen.count("_softmax") == 0, "upstream's attention ran"


def test_hidden_dropout_draws_upstreams_numbers() -> None:
    results = []
    for m in twins(model(hidden_dropout_prob=0.2).double().train()):
        torch.manual_seed(4)
        results.append(task(m, labels=LABELS))
    assert_same(*results, 1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_dropout(checkpointing: bool) -> None:
    """Another pattern than upstream's: a function of the seed, recomputed alike, and right on average."""
    fused, _ = twins(text_model(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.1).double().train())
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(run_text(fused, "decoder"))
    assert_same(runs[0], runs[1], 0.0)
    assert not torch.equal(runs[0]["output"], runs[2]["output"])
    for layer in fused.encoder.layer:
        layer.gradient_checkpointing = checkpointing
        layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
    torch.manual_seed(1)
    assert_same(run_text(fused, "decoder"), runs[0], 1e-10)


def test_attention_dropout_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = twins(model(attention_probs_dropout_prob=0.3))
    fused.vision_model.encoder.layers[0].self_attn.dropout.p = 0.4
    seen: list[float] = []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: seen.append(k["dropout_p"]) or attention(*a, **k))
    fused.eval()(**inputs())
    assert set(seen) == {0.0}
    seen.clear()
    fused.train()(**inputs())
    assert seen == [0.4, 0.0] + [0.3] * 2 * LAYERS


# wrapped children, hooks, and the way back


def add_lora(m: nn.Module) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]), m)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("order", ["fuse_first", "wrap_first"])
def test_lora(order: str) -> None:
    upstream = model().double()
    fused = copy.deepcopy(upstream)
    add_lora(upstream)
    for step in (mllm_fast.fuse, add_lora) if order == "fuse_first" else (add_lora, mllm_fast.fuse):
        step(fused)
    ours = task(fused, labels=LABELS)
    assert any("lora_B" in name for name in ours)
    assert_same(ours, task(upstream, labels=LABELS), 1e-9)
    check_generation(fused, upstream, inputs() | {"pixel_values": inputs()["pixel_values"].double(), "num_beams": 3})
    image = torch.randn(2, TOKENS, IMAGE).double()
    with torch.no_grad(), recording() as seen:
        fused.text_decoder(input_ids=inputs()["input_ids"], encoder_hidden_states=image)
    keys = [g.n for g in seen.gemms if g.k == IMAGE and g.n not in (TEXT, 4)]
    assert keys == [LAYERS * TEXT], "the keys of all layers are still one GEMM"


def test_a_packed_child_is_called() -> None:
    upstream = model()
    for layer in upstream.text_decoder.bert.encoder.layer:
        for path in ("attention.self.query", "crossattention.self.value", "output.dense"):
            old = layer.get_submodule(path)
            new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, new.to("cpu"))
    fused, upstream = twins(upstream)
    calls: list[int] = []
    packed = type(fused.text_decoder.bert.encoder.layer[0].output.dense)
    assert issubclass(packed, bitsandbytes.nn.Linear8bitLt)
    forward = packed.forward
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(packed, "forward", lambda *a: calls.append(1) or forward(*a))
        ours = fused(**inputs()).logits
        assert len(calls) == 3 * LAYERS
        torch.testing.assert_close(ours, upstream(**inputs()).logits, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("path", ["attention", "crossattention.self", "intermediate", "output", "attention.output"])
def test_a_hooked_container_runs_upstreams_code(path: str) -> None:
    fused, upstream = twins(model().double())
    given = inputs(left=2) | {"pixel_values": inputs()["pixel_values"].double()}
    handles, calls = [], []
    for m in (fused, upstream):
        part = m.text_decoder.bert.encoder.layer[1].get_submodule(path)
        handles.append(part.register_forward_hook(lambda *_: calls.append(1)))
    torch.testing.assert_close(fused(**given).logits, upstream(**given).logits, atol=1e-9, rtol=1e-9)
    assert len(calls) == 2
    for handle in handles:
        handle.remove()
    with recording() as seen:
        fused(**given)
    assert seen.count("_softmax") == 0


def test_other_requests_run_upstreams_code() -> None:
    fused, upstream = twins(text_model().double())
    ids, image = torch.randint(3, 90, (2, 5)), torch.randn(2, TOKENS, IMAGE).double()
    dense = torch.zeros(2, 1, 5, 5).double().masked_fill_(torch.rand(2, 1, 5, 5) < 0.3, -1e9)
    for m in (fused, upstream):
        m.encoder.layer[0].chunk_size_feed_forward = 0
    for kwargs in ({"attention_mask": dense}, {"attention_mask": torch.ones(2, 4)}):
        results = []
        for m in (fused, upstream):
            try:
                results.append(m(input_ids=ids, encoder_hidden_states=image, **kwargs).last_hidden_state)
            except Exception as error:
                results.append(type(error))
        torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9) if isinstance(results[0], Tensor) else None
        assert type(results[0]) is type(results[1])
    for m in (fused, upstream):
        for layer in m.encoder.layer:
            layer.chunk_size_feed_forward = 5
    assert_same(image_reader(fused, image, ids), image_reader(upstream, image, ids))


def test_fuse_and_back() -> None:
    upstream = model(BlipForImageTextRetrieval)
    fused = copy.deepcopy(upstream)
    report = mllm_fast.fuse(fused)
    assert {row.now for row in report.fused} == {
        "FusedBlipForImageTextRetrieval", "FusedBlipTextModel", "FusedBlipTextLayer", "FusedBlipAttention",
    }  # fmt: skip
    assert report.left_alone == []
    assert list(fused.state_dict()) == list(upstream.state_dict())
    assert isinstance(fused, BlipForImageTextRetrieval)
    assert fused.__class__.__name__ == "BlipForImageTextRetrieval"
    given = inputs()
    expected = fused(**given).itm_score
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(clone(**given).itm_score, expected, atol=0, rtol=0)
    mllm_fast.unfuse(fused)
    for (name, ours), theirs in zip(fused.named_modules(), upstream.modules(), strict=True):
        assert type(ours) is type(theirs), name
        assert "_mllm_fast" not in ours.__dict__, name
    torch.testing.assert_close(fused(**given).itm_score, upstream(**given).itm_score, atol=0, rtol=0)

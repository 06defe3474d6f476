"""Gradients after prepare_finetuning: those of the model as it came, in fp64, and in NF4 and bf16 no worse than upstream's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import mllm_fast
from mllm_fast.finetune import Lora, language_model_loss, prepare_finetuning
from mllm_fast.quantization import adopt
from tests.families.instruments import assert_same
from tests.finetune.every_system import SYSTEMS, built
from tests.finetune.test_prepare import batch_of, bf16, draw_lora, nf4


@pytest.mark.parametrize(("name", "train"), [
    ("open_flamingo", "bridge"), ("flamingo_hf", "bridge+embeddings"), ("idefics", "bridge"), ("mllama", "bridge"),
    ("idefics2", "bridge"), ("blip2", "bridge"), ("blip2_t5", "bridge"), ("instructblip", "projection"),
    ("llava", "projection+language_model"), ("blip", "decoder+vision"), ("blip_vqa", "encoder"), ("minigpt4", "projection"),
    ("mplug_owl", "bridge"), ("flamingo_pytorch", "bridge"),
])  # fmt: skip
def test_gradients_equal_those_of_the_model_as_it_came(name: str, train: str) -> None:
    ours, batch = built(name)
    theirs = copy.deepcopy(ours)
    for p in theirs.parameters():
        p.requires_grad_(True)
    for model in (ours, theirs):
        model.double().eval()
    batch = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    plan = prepare_finetuning(ours, train, trained_dtype=torch.float64)
    for model in (ours, theirs):
        SYSTEMS[name].loss(model, batch).backward()
    reference = dict(theirs.named_parameters())
    grads = [{n: p.grad for n, p in plan.trained.items()}, {n: reference[n].grad for n in plan.trained}]
    # transformers computes RMS norms in fp32 whatever the dtype, and Idefics2's resampler has many.
    assert_same(*grads, tolerance=1e-5 if name == "idefics2" else 1e-6)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize(("name", "train"), [
    ("blip2", "bridge"), ("blip2", "bridge+lora"), ("llava", "projection+lora"), ("idefics", "bridge"),
    ("idefics", "bridge+lora"),
])  # fmt: skip
def test_a_step_under_the_plans_autocast(name: str, train: str) -> None:
    """fp32 bridge and LoRA, bf16 and NF4 rest: every gradient errs at most twice as much as with upstream's blocks."""
    model, lora = nf4(name), Lora(r=4) if "lora" in train else None
    exact = copy.deepcopy(model)
    for p in exact.parameters():
        p.data = p.data.float() if p.dtype == bf16 else p.data  # transformers refuses to cast a quantised model
    for layer in exact.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.float32
    plan, reference = (prepare_finetuning(m, train, lora=lora) for m in (model, exact))
    draw_lora(model), draw_lora(exact)
    assert plan.compute_dtype == bf16
    assert reference.compute_dtype == torch.float32
    theirs = copy.deepcopy(model)
    mllm_fast.unfuse(theirs)
    adopt(theirs)  # bitsandbytes' own layers do not take these widths
    grads = []
    for own, net, dtype in ((True, model, bf16), (False, theirs, bf16), (False, exact, torch.float32)):
        with (reference if net is exact else plan).autocast("cpu"):
            assert torch.is_autocast_enabled("cpu") == (net is not exact)
            loss = language_model_loss(net, batch_of(name)) if own else net(**batch_of(name, dtype)).loss
        loss.backward()
        grads.append({n: p.grad for n, p in net.named_parameters() if p.requires_grad})
    ours, others, true = grads
    assert ours.keys() == others.keys() == true.keys() == plan.trained.keys()
    for n, expected in true.items():
        assert ours[n].dtype == torch.float32
        assert rms(ours[n] - expected) <= 2 * rms(others[n] - expected) + 1e-5 * rms(expected), n

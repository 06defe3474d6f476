"""Whatever was done to a model before, the fused model computes what its unfused copy does: nothing stale, in any order."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import mllm_fast
from tests.robustness import sequences
from tests.robustness.sequences import SYSTEMS, dtype_of, fused, logits, lora_layers, unfused_copy

seeds = st.integers(0, 9)
OPTIONS = st.fixed_dictionaries({"level": st.sampled_from([0, 1, 2]), "prepack": st.booleans()})


class Life(RuleBasedStateMachine):
    """One model of `system`. `changed` lets the invariant run the model only after something was done to it."""

    system: str

    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.kind = SYSTEMS[self.system]
        self.model: nn.Module = self.kind.build().eval()
        self.seed = 0
        self.options: dict[str, Any] = {"level": 1, "prepack": False}
        mllm_fast.fuse(self.model, **self.options)

    @rule(options=OPTIONS)
    @precondition(lambda self: not fused(self.model))
    def fuse(self, options: dict[str, Any]) -> None:
        self.options = options
        mllm_fast.fuse(self.model, **options)

    @rule()
    @precondition(lambda self: fused(self.model))
    def unfuse(self) -> None:
        mllm_fast.unfuse(self.model)

    @rule(seed=seeds)
    def other_inputs(self, seed: int) -> None:
        self.seed = seed

    @rule()
    def train(self) -> None:
        """In fp32 or wider: the gradients are upstream's too."""
        twin = unfused_copy(self.model)
        inputs = self.kind.inputs(self.seed)
        ours, theirs = sequences.train_step(self.model, inputs), sequences.train_step(twin, inputs)
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        if dtype_of(self.model).itemsize < 4:
            return
        # One scale for all: a gradient that is 0 but for rounding has none of its own.
        scale = max(g.abs().max().item() for g in theirs.values())
        for name, gradient in theirs.items():
            error = (ours[name] - gradient).abs().max().item()
            assert error <= 1e-4 * scale, f"d {name}: off by {error:.2e} at a scale of {scale:.2e}"

    @rule(trained=st.sampled_from(["all", "none", "every other"]))
    def freeze(self, trained: str) -> None:
        for i, p in enumerate(self.model.parameters()):
            p.requires_grad_(trained == "all" or (trained == "every other" and i % 2 == 0))
        if trained == "none":  # or there is nothing to take a step with
            list(self.model.parameters())[-1].requires_grad_(True)

    @rule(seed=seeds, assign=st.booleans())
    def load_state_dict(self, seed: int, assign: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Of a plain model of the same seed, so that weights do not wander off.
        state = self.kind.build().state_dict() if not lora_layers(self.model) else self.model.state_dict()
        state = {name: t.to(dtype_of(self.model)) if t.is_floating_point() else t for name, t in state.items()}
        self.model.load_state_dict(sequences.perturb(state, generator), assign=assign)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)

    @rule()
    @precondition(lambda self: not lora_layers(self.model))
    def to_meta_and_back(self) -> None:
        self.model = sequences.through_meta(self.model)

    @rule(seed=seeds)
    @precondition(lambda self: not lora_layers(self.model))
    def lora_on(self, seed: int) -> None:
        sequences.add_lora(self.model, self.kind.lora, seed)

    @rule(on=st.booleans())
    @precondition(lambda self: lora_layers(self.model))
    def lora_switch(self, on: bool) -> None:
        for _, layer in lora_layers(self.model):
            layer.enable_adapters(on)

    @rule(merged=st.booleans())
    @precondition(lambda self: lora_layers(self.model))
    def lora_merge_in_place(self, merged: bool) -> None:
        for _, layer in lora_layers(self.model):
            if merged and not layer.merged:
                layer.merge()
            elif layer.merged and not merged:
                layer.unmerge()

    @rule()
    @precondition(
        lambda self: lora_layers(self.model) and not any(layer.merged for _, layer in lora_layers(self.model))
    )
    def lora_merge_and_unload(self) -> None:
        sequences.merge_lora(self.model)

    @rule()
    def pickle(self) -> None:
        self.model = sequences.through_pickle(self.model)

    @rule()
    def deepcopy(self) -> None:
        self.model = copy.deepcopy(self.model)

    @rule()
    @precondition(lambda self: not lora_layers(self.model))
    def save_and_load(self) -> None:
        was_fused = fused(self.model)
        self.model = sequences.through_files(self.model)
        if was_fused:
            mllm_fast.fuse(self.model, **self.options)

    @rule()
    @precondition(lambda self: fused(self.model))
    def generate(self) -> None:
        inputs = sequences.cast(self.kind.inputs(self.seed), dtype_of(self.model))
        with torch.inference_mode():
            self.model.generate(**inputs, max_new_tokens=2, do_sample=False)  # type: ignore[operator]

    @rule(dtype=st.sampled_from([torch.bfloat16, None]))
    @precondition(lambda self: dtype_of(self.model) == torch.float32)
    def autocast(self, dtype: torch.dtype | None) -> None:
        """What such a pass keeps must not serve one without."""
        context = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
        with torch.no_grad(), context:
            self.model(**self.kind.inputs(self.seed))

    @invariant()
    def computes_what_its_unfused_copy_computes(self) -> None:
        if not hasattr(self, "model") or not fused(self.model):
            return
        inputs, dtype = self.kind.inputs(self.seed), dtype_of(self.model)
        twin = unfused_copy(self.model)
        with mllm_fast.backend("torch"):
            ours, theirs = logits(self.model, inputs), logits(twin, inputs)
        if dtype.itemsize >= 4:
            # Norms of transformers compute in fp32 whatever the dtype.
            error, allowed = (ours - theirs).abs().max(), 1e-3 if dtype == torch.float32 else 1e-5
        else:
            exact = logits(twin.float(), inputs)
            error, allowed = (ours - exact).square().mean().sqrt(), 2 * (theirs - exact).square().mean().sqrt() + 1e-2
        scale = max(theirs.abs().max().item(), 1.0)
        assert theirs.isfinite().all(), "the weights wandered off: this run shows nothing"
        assert error <= allowed * scale, f"off by {error:.2e} at a scale of {scale:.2e} in {dtype}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_any_sequence(system: str) -> None:
    machine = type(f"Life of {system}", (Life,), {"system": system})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=6, stateful_step_count=14, phases=(Phase.generate,))
    )

"""`fuse`, `unfuse` and the report: what they promise about any model."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.blocks import KINDS, BlockKind
from tests.families.builders import (
    MEDIA_DIM,
    TEXT_DIM,
    idefics,
    idefics_inputs,
    luc_resampler,
    of_block,
    of_blocks,
    of_inputs,
    of_model,
    of_resampler,
    palm,
)

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], int]] = {
    # build, run, fused modules (resampler and gated blocks)
    "open_flamingo": (of_model, lambda m: m(**of_inputs()).logits, 3),
    "flamingo_pytorch": (
        palm,
        lambda m: m(of_inputs()["lang_x"], images=torch.linspace(-1, 1, 560).view(2, 2, 7, 20)),
        3,
    ),
    "idefics": (idefics, lambda m: m(**idefics_inputs()).logits, 3),
    "idefics_patches": (lambda: idefics(resampler=False), lambda m: m(**idefics_inputs()).logits, 2),
}
models = pytest.mark.parametrize("name", MODELS)
RESAMPLERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "open_flamingo": (of_resampler, (2, 2, 1, 7, MEDIA_DIM)),
    "flamingo_pytorch": (luc_resampler, (2, 2, 7, MEDIA_DIM)),
    "idefics": (lambda: idefics().model.perceiver_resampler, (4, 7, MEDIA_DIM)),
}
resamplers = pytest.mark.parametrize("name", RESAMPLERS)


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def surface(model: nn.Module) -> dict[str, Any]:
    """Everything that people address by name: modules, parameters, buffers, and which object each is."""
    return {
        "modules": {name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: id(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "keys": list(model.state_dict()),
    }


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules(remove_duplicate=False)}


def modules_of(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that a row of the report is about: one path, or all paths of a module registered several times."""
    return [model if part in ("", "(the model itself)") else model.get_submodule(part) for part in path.split(", ")]


# the report


@models
def test_report_of_a_model(name: str) -> None:
    build, _, count = MODELS[name]
    model = build()
    was = classes(model)
    report = mllm_fast.fuse(model)
    rows = [row for row in report.fused if "Resampler" in row.was or "GatedCrossAttention" in row.was]
    found = [modules_of(model, row.path) for row in rows]
    assert len(found) == len({id(modules[0]) for modules in found}) == count
    for row, modules in zip(rows, found, strict=True):
        assert all(m is modules[0] for m in modules)
        assert type(modules[0]).__mro__[1].__name__ in row.was
        assert type(modules[0]).__name__ in row.now
    table = " ".join(str(report).split())
    assert "lang_encoder" not in [m for m, _ in model.named_modules()] or "perceiver" in table
    swapped = {id(model.get_submodule(path)): path for path, cls in classes(model).items() if cls is not was[path]}
    for path in swapped.values():
        assert issubclass(type(model.get_submodule(path)), was[path])
    listed = {id(modules_of(model, row.path)[0]) for row in report.fused}
    assert swapped.keys() == listed, "the report and the swapped modules differ"


@kinds
def test_report_of_a_bare_block(kind: BlockKind) -> None:
    block = kind.build()
    was = type(block)
    report = mllm_fast.fuse(block)
    assert len(report.fused) == 1
    assert modules_of(block, report.fused[0].path) == [block]
    assert type(block) is not was and issubclass(type(block), was) and isinstance(block, was)
    assert was.__name__ in report.fused[0].was
    assert str(report).strip()


@resamplers
def test_report_of_a_bare_resampler(name: str) -> None:
    resampler = RESAMPLERS[name][0]()
    was = type(resampler)
    report = mllm_fast.fuse(resampler)
    assert [modules_of(resampler, row.path) for row in report.fused] == [[resampler]]
    assert type(resampler) is not was and isinstance(resampler, was)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.MultiheadAttention(8, 2)],
    ids=["linear", "sequential", "attention"],
)
def test_nothing_to_fuse(model: nn.Module) -> None:
    before = classes(model)
    with pytest.raises(mllm_fast.NothingToFuseError) as caught:
        mllm_fast.fuse(model)
    message = str(caught.value).lower().replace("-", "_")
    for known in ("open_flamingo", "flamingo_pytorch", "idefics"):
        assert known in message, f"the error does not name {known}"
    assert classes(model) == before


@models
def test_fusing_twice_changes_nothing_and_says_so(name: str) -> None:
    build, run, _ = MODELS[name]
    model = build()
    first = mllm_fast.fuse(model)
    out = run(model)
    state, before = classes(model), surface(model)
    second = mllm_fast.fuse(model)
    assert classes(model) == state
    assert surface(model) == before
    assert not second.fused
    again = {row.path: row.reason for row in second.left_alone}
    for row in first.fused:
        assert "already fused" in again[row.path].lower()
    assert "already fused" in str(second).lower()
    assert torch.equal(run(model), out)


# the swap


@models
def test_state_dict_and_names_stay(name: str) -> None:
    build, run, _ = MODELS[name]
    model = build()
    run(model)  # FlamingoPaLM registers buffers in its first forward
    before = surface(model)
    values = {k: v.clone() for k, v in model.state_dict().items()}
    mllm_fast.fuse(model)
    assert surface(model) == before
    with torch.no_grad():
        run(model)
    assert surface(model) == before, "a forward pass left something registered"
    after = model.state_dict()
    assert all(torch.equal(after[k], values[k]) for k in values)
    fresh = build()
    run(fresh)
    fresh.load_state_dict(after)
    model.load_state_dict(values)


@models
def test_unfuse_is_the_identity(name: str) -> None:
    build, run, _ = MODELS[name]
    model = build()
    out = run(model)
    before, was = surface(model), classes(model)
    attributes = {path: set(vars(m)) for path, m in model.named_modules()}
    mllm_fast.fuse(model)
    run(model)
    mllm_fast.unfuse(model)
    assert classes(model) == was
    assert surface(model) == before
    assert {path: set(vars(m)) for path, m in model.named_modules()} == attributes, "private state was left behind"
    assert torch.equal(run(model), out)
    assert mllm_fast.fuse(model).fused


@kinds
def test_unfuse_of_a_bare_block(kind: BlockKind) -> None:
    block, (x, media, locations) = kind.build(), kind.inputs()
    was, out = type(block), kind.call(block, x, media, locations)
    mllm_fast.fuse(block)
    kind.call(block, x, media, locations)
    mllm_fast.unfuse(block)
    assert type(block) is was
    assert torch.equal(kind.call(block, x, media, locations), out)


def test_both_registrations_of_an_open_flamingo_block_are_swapped() -> None:
    model = of_model()
    mllm_fast.fuse(model)
    layers = [layer.gated_cross_attn_layer for layer in model.lang_encoder._get_decoder_layers()]
    assert [b for b in layers if b is not None] == of_blocks(model)
    assert all(a is b for a, b in zip((b for b in layers if b is not None), of_blocks(model), strict=True))
    assert all(hasattr(b, "_use_gradient_checkpointing") for b in of_blocks(model))


def test_no_third_party_class_is_written_to() -> None:
    from builders import GatedCrossAttentionBlock, PerceiverResampler
    from transformers.models.idefics import modeling_idefics, perceiver

    watched = [GatedCrossAttentionBlock, PerceiverResampler, perceiver.IdeficsPerceiverResampler, nn.Module, nn.Linear]
    watched += [c for c in vars(modeling_idefics).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    before = [dict(vars(c)) for c in watched]
    for build, run, _ in MODELS.values():
        model = build()
        mllm_fast.fuse(model)
        run(model)
    assert [dict(vars(c)) for c in watched] == before


@kinds
def test_swapped_classes_are_importable(kind: BlockKind) -> None:
    block = kind.build()
    mllm_fast.fuse(block)
    cls = type(block)
    found: Any = importlib.import_module(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part)
    assert found is cls


def _through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kinds
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, _through_pickle, _through_torch_save], ids=["deepcopy", "pickle", "torch_save"]
)
def test_copies_of_a_fused_block_are_fused(kind: BlockKind, copier: Callable[[nn.Module], nn.Module]) -> None:
    fused, upstream = twins(kind.build(), fixes="all")
    x, media, locations = kind.inputs()
    size = len(pickle.dumps(upstream))
    with torch.no_grad():
        expected = kind.call(fused, x, media, locations)
        copied = copier(fused)
        assert type(copied) is type(fused)
        assert torch.equal(kind.call(copied, x, media, locations), expected)
    assert len(pickle.dumps(fused)) < size + 4096, "cached tensors were saved with the module"
    mllm_fast.unfuse(copied)
    assert type(copied) is type(upstream)


@resamplers
def test_copies_of_a_fused_resampler_are_fused(name: str) -> None:
    build, shape = RESAMPLERS[name]
    fused, upstream = twins(build())
    x = torch.randn(shape)
    with torch.no_grad():
        expected = fused(x)
        for copier in (copy.deepcopy, _through_pickle, _through_torch_save):
            copied = copier(fused)
            assert type(copied) is type(fused)
            assert torch.equal(copied(x), expected)
    assert len(pickle.dumps(fused)) < len(pickle.dumps(upstream)) + 4096, "derived weights were saved with the module"


@models
def test_a_copied_model_can_be_unfused_alone(name: str) -> None:
    build, run, _ = MODELS[name]
    fused, upstream = twins(build())
    copied = copy.deepcopy(fused)
    mllm_fast.unfuse(copied)
    assert classes(copied) == classes(upstream)
    assert classes(fused) != classes(upstream)
    assert torch.equal(run(copied), run(upstream))


def test_two_models_fused_with_different_options() -> None:
    upstream = of_block()
    strict, plain = copy.deepcopy(upstream), copy.deepcopy(upstream)
    mllm_fast.fuse(strict, fixes=("index_beyond_images",))
    mllm_fast.fuse(plain, level=0)
    x, media = torch.randn(1, 4, TEXT_DIM), torch.randn(1, 1, 4, MEDIA_DIM)
    locations = torch.tensor([[True, False, True, False]])
    for _ in range(2):
        outputs = [b(x, media, media_locations=locations) for b in (strict, plain, upstream)]
        torch.testing.assert_close(outputs[1], outputs[2])
        torch.testing.assert_close(outputs[0][:, :2], outputs[2][:, :2])
        assert not torch.allclose(outputs[0][:, 2:], outputs[2][:, 2:], atol=1e-3)


@models
def test_forcing_the_torch_backend(name: str) -> None:
    build, run, _ = MODELS[name]
    fused, upstream = twins(build())
    with mllm_fast.backend("torch"):
        ours = run(fused)
    torch.testing.assert_close(ours, run(upstream), atol=1e-4, rtol=1e-4)


@models
def test_equal_inputs_give_bitwise_equal_outputs(name: str) -> None:
    build, run, _ = MODELS[name]
    fused, _ = twins(build())
    assert torch.equal(run(fused), run(fused))
    with torch.no_grad():
        assert torch.equal(run(fused), run(fused))


@kinds
def test_inputs_are_not_written_to(kind: BlockKind) -> None:
    fused, _ = twins(kind.build())
    x, media, locations = kind.inputs()
    kept = [t.clone() for t in (x, media, locations)]
    versions = [t._version for t in (x, media, locations)]
    kind.call(fused, x, media, locations)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, media, locations), strict=True))
    assert [t._version for t in (x, media, locations)] == versions

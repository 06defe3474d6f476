"""Nothing derived (media K and V, stacked or folded weights) may outlive what it was derived from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.blocks import KINDS, TOKENS, BlockKind
from tests.families.builders import MEDIA_DIM, idefics, luc_resampler, of_resampler

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def twins(upstream: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream) with equal weights."""
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **options)
    return fused, upstream


def check(kind: BlockKind, modules: tuple[nn.Module, nn.Module], x: Tensor, media: Tensor, locations: Tensor) -> None:
    """Prefill, and decode where the system has it, without gradients: the fused block equals upstream."""
    with torch.no_grad():
        for decode in (False, True) if kind.has_decode else (False,):
            text = x[:, :1] if decode else x
            ours, theirs = (kind.call(m, text, media, locations, decode=decode) for m in modules)
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


# the media change


@kinds
def test_media_modified_in_place(kind: BlockKind) -> None:
    modules, (x, media, locations) = twins(kind.build()), kind.inputs()
    check(kind, modules, x, media, locations)
    media[0, 0].add_(1.0)
    check(kind, modules, x, media, locations)
    media.normal_()
    check(kind, modules, x, media, locations)


@kinds
def test_media_modified_in_place_under_inference_mode(kind: BlockKind) -> None:
    """Inference tensors have no version counter."""
    modules = twins(kind.build())
    with torch.inference_mode():
        x, media, locations = kind.inputs()
        check(kind, modules, x, media, locations)
        media[0, 0].add_(1.0)
        check(kind, modules, x, media, locations)


@kinds
def test_new_media_at_the_address_of_the_old(kind: BlockKind) -> None:
    """The allocator hands a freed block out again: neither address, shape nor version tells two images apart."""
    modules = twins(kind.build())
    addresses = set()
    for seed in range(12):
        x, media, locations = kind.inputs(seed=seed)
        addresses.add(media.data_ptr())
        check(kind, modules, x, media, locations)
        del x, media, locations
    assert len(addresses) < 12, "the allocator reused nothing: this test shows nothing"


@kinds
def test_views_of_one_storage(kind: BlockKind) -> None:
    """Windows of equal shape at different offsets, and the same memory with other strides."""
    modules = twins(kind.build())
    x, _, locations = kind.inputs()
    store = torch.randn(2, 4, TOKENS, kind.media_dim)
    for media in (
        store[:, :2],
        store[:, 1:3],
        store[:, 2:],
        store[:, :2].transpose(0, 1),
        store[:1, :2].expand(2, -1, -1, -1),
    ):
        check(kind, modules, x, media, locations)


@kinds
def test_two_sets_of_media_alternate(kind: BlockKind) -> None:
    modules = twins(kind.build())
    first, second = kind.inputs(seed=1), kind.inputs(seed=2, images=3)
    for _ in range(3):
        check(kind, modules, *first)
        check(kind, modules, *second)


@kinds
def test_batches_of_media_that_share_a_prefix(kind: BlockKind) -> None:
    """Dropping images, dropping rows, adding rows and swapping rows: each makes other media."""
    modules = twins(kind.build())
    x, media, locations = kind.inputs(images=3)
    check(kind, modules, x, media, locations)
    check(kind, modules, x, media[:, :2].clone(), locations)
    check(kind, modules, x[:1], media[:1].clone(), locations[:1])
    check(kind, modules, x, media.flip(0), locations.flip(0))
    check(kind, modules, torch.cat([x, x]), torch.cat([media, media + 1]), torch.cat([locations, locations]))
    check(kind, modules, x, media, locations)


# gradients and modes after a cached pass


@kinds
@pytest.mark.parametrize("before", ["no_grad", "inference_mode", "autocast"])
def test_gradients_after_a_pass_without(kind: BlockKind, before: str) -> None:
    """What a pass without gradients kept must not enter one with: twice, since a graph can be walked only once."""
    modules, (x, media, locations) = twins(kind.build()), kind.inputs()
    fused, upstream = modules
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(before)
    with context() if context else torch.autocast("cpu", torch.bfloat16):
        kind.call(fused, x, media, locations)
    for _ in range(2):
        for module in modules:
            kind.call(module, x, media, locations).square().mean().backward()
        for (name, p), q in zip(fused.named_parameters(), upstream.parameters(), strict=True):
            assert p.grad is not None, name
            torch.testing.assert_close(p.grad, q.grad, atol=2e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}")
    check(kind, modules, x, media, locations)


@kinds
def test_media_that_start_to_need_gradients(kind: BlockKind) -> None:
    modules, (x, media, locations) = twins(kind.build()), kind.inputs()
    check(kind, modules, x, media, locations)
    media.requires_grad_()
    grads = [torch.autograd.grad(kind.call(m, x, media, locations).square().mean(), media)[0] for m in modules]
    torch.testing.assert_close(*grads)


@kinds
def test_precision_of_a_call_does_not_leak_into_the_next(kind: BlockKind) -> None:
    modules, (x, media, locations) = twins(kind.build()), kind.inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        kind.call(modules[0], x, media, locations)
    check(kind, modules, x, media, locations)
    for module in modules:
        module.double()
    check(kind, modules, x.double(), media.double(), locations)
    for module in modules:
        module.float()
    check(kind, modules, x, media, locations)


# the weights change


def _step(module: nn.Module) -> None:
    """One optimiser step along a fixed gradient."""
    generator = torch.Generator().manual_seed(5)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def _load(module: nn.Module) -> None:
    module.load_state_dict({k: v * 1.25 + 0.05 for k, v in module.state_dict().items()})


def _load_assigned(module: nn.Module) -> None:
    module.load_state_dict({k: v * 1.25 + 0.05 for k, v in module.state_dict().items()}, assign=True)


def _new_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data * 1.25 + 0.05


def _new_parameters(module: nn.Module) -> None:
    for child in module.modules():
        for name, p in list(child.named_parameters(recurse=False)):
            setattr(child, name, nn.Parameter(p.detach() * 1.25 + 0.05))


def _new_children(module: nn.Module) -> None:
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            replacement = nn.Linear(child.in_features, child.out_features, bias=False)
            replacement.weight.data.copy_(child.weight.data * 1.25 + 0.05)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, replacement)


@torch.no_grad()
def _in_place(module: nn.Module) -> None:
    for p in module.parameters():
        p.mul_(1.25).add_(0.05)


@torch.no_grad()
def _one_in_place(module: nn.Module) -> None:
    """Only the first parameter of each child: a key over one weight of several would miss it."""
    for child in module.modules():
        for p in list(child.parameters(recurse=False))[:1]:
            p[0].add_(0.3)


CHANGES: list[Callable[[nn.Module], None]] = [
    _step, _load, _load_assigned, _new_data, _new_parameters, _new_children, _in_place, _one_in_place,
]  # fmt: skip
changes = pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))


@kinds
@changes
def test_block_after_its_weights_changed(kind: BlockKind, change: Callable[[nn.Module], None]) -> None:
    modules, (x, media, locations) = twins(kind.build()), kind.inputs()
    check(kind, modules, x, media, locations)
    for module in modules:
        change(module)
    check(kind, modules, x, media, locations)


RESAMPLERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "open_flamingo": (of_resampler, (2, 2, 1, 7, MEDIA_DIM)),
    "flamingo_pytorch": (luc_resampler, (2, 2, 7, MEDIA_DIM)),
    "idefics": (lambda: idefics(qk_norms=False).model.perceiver_resampler, (4, 7, MEDIA_DIM)),
    "idefics_qk_norms": (lambda: idefics().model.perceiver_resampler, (4, 7, MEDIA_DIM)),
}
resamplers = pytest.mark.parametrize("name", RESAMPLERS)


@resamplers
@changes
def test_resampler_after_its_weights_changed(name: str, change: Callable[[nn.Module], None]) -> None:
    build, shape = RESAMPLERS[name]
    modules, x = twins(build()), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(modules[0](x), modules[1](x), atol=2e-5, rtol=2e-5)
        for module in modules:
            change(module)
        torch.testing.assert_close(modules[0](x), modules[1](x), atol=2e-5, rtol=2e-5)


@resamplers
def test_resampler_gradients_after_requires_grad_flips(name: str) -> None:
    """Frozen for a pass, trained for the next: the stacked weights must enter the graph again, twice in a row."""
    build, shape = RESAMPLERS[name]
    modules, x = twins(build()), torch.randn(shape)
    for trained in (False, True, False, True, True):
        for module in modules:
            module.requires_grad_(trained).zero_grad()
            inputs = x.clone().requires_grad_()
            module(inputs).square().mean().backward()
        for (parameter, p), q in zip(modules[0].named_parameters(), modules[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), parameter
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, atol=2e-5, rtol=2e-4)


@resamplers
def test_resampler_training_steps(name: str) -> None:
    build, shape = RESAMPLERS[name]
    modules = twins(build().double())
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in modules]
    for _ in range(4):
        x = torch.randn(shape, dtype=torch.float64)
        losses = []
        for module, optimiser in zip(modules, optimisers, strict=True):
            optimiser.zero_grad()
            loss = module(x).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)


@kinds
def test_functional_call_with_other_weights(kind: BlockKind) -> None:
    """`torch.func.functional_call` lends the module other parameters for one call."""
    modules, (x, media, locations) = twins(kind.build()), kind.inputs()
    check(kind, modules, x, media, locations)
    lent = {name: p.detach() * 1.25 + 0.05 for name, p in modules[1].named_parameters()}
    with torch.no_grad():
        outputs = [
            kind.call(lambda *a, m=m, **k: torch.func.functional_call(m, lent, a, k), x, media, locations)
            for m in modules
        ]
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=2e-5)
    check(kind, modules, x, media, locations)


@kinds
def test_copies_are_independent(kind: BlockKind) -> None:
    modules, (x, media, locations) = twins(kind.build()), kind.inputs()
    check(kind, modules, x, media, locations)
    copies = (copy.deepcopy(modules[0]), copy.deepcopy(modules[1]))
    for module in copies:
        _in_place(module)
    check(kind, copies, x, media, locations)
    check(kind, modules, x, media, locations)

"""Children that something else wraps, packs or listens to are called, not read; before fusing or after."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import mllm_fast
from mllm_fast.modules import children
from tests.families.blocks import KINDS, BlockKind
from tests.families.builders import MEDIA_DIM, idefics, idefics_inputs, of_inputs, of_model, of_resampler, randomise
from tests.families.instruments import recording
from tests.families.quantized_layers import exact_weight

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
orders = pytest.mark.parametrize("fuse_first", [True, False], ids=["fuse_first", "wrap_first"])


def results(kind: BlockKind, block: nn.Module, x: Tensor, media: Tensor, locations: Tensor) -> dict[str, Tensor]:
    """Output and gradients, and the output without gradients twice: the second may come from a cache."""
    leaves = {"x": x.clone().requires_grad_(), "media": media.clone().requires_grad_()}
    block.zero_grad()
    out = kind.call(block, leaves["x"], leaves["media"], locations)
    out.square().mean().backward()
    got = {"output": out.detach()} | {f"d {n}": t.grad for n, t in leaves.items()}
    got |= {f"d {n}": p.grad for n, p in block.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for turn in ("first", "second"):
            got[turn] = kind.call(block, x, media, locations)
    return got


def check(kind: BlockKind, fused: nn.Module, upstream: nn.Module) -> None:
    inputs = kind.inputs()
    ours, theirs = results(kind, fused, *inputs), results(kind, upstream, *inputs)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=3e-5, rtol=3e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def wrapped_twins(kind: BlockKind, wrap: Callable[[nn.Module], Any], fuse_first: bool) -> tuple[nn.Module, nn.Module]:
    """(fused, upstream), both with `wrap` applied, in either order."""
    upstream = kind.build()
    fused = copy.deepcopy(upstream)
    wrap(upstream)
    for step in (mllm_fast.fuse, wrap) if fuse_first else (wrap, mllm_fast.fuse):
        step(fused)
    return fused, upstream


def child(block: nn.Module, path: str) -> nn.Module:
    return block.get_submodule(path)


# LoRA


def add_lora(block: nn.Module, *targets: str) -> None:
    """LoRA of rank 4 on every projection named, with B drawn instead of 0, so that it matters."""
    names = [t.rpartition(".")[2] for t in targets]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=names), block)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


@orders
@pytest.mark.parametrize("target", ["query", "key_value", "output", "all"])
@kinds
def test_lora(kind: BlockKind, target: str, fuse_first: bool) -> None:
    every = (kind.query, *kind.key_value, kind.output)
    targets = {"query": (kind.query,), "key_value": kind.key_value, "output": (kind.output,), "all": every}[target]
    fused, upstream = wrapped_twins(kind, lambda block: add_lora(block, *targets), fuse_first)
    assert any("lora_A" in name for name, _ in fused.named_parameters())
    check(kind, fused, upstream)


@kinds
def test_lora_that_is_trained_or_switched_off_between_calls(kind: BlockKind) -> None:
    """Same media throughout: the adapter's state is no parameter of the base projection."""
    fused, upstream = wrapped_twins(kind, lambda block: add_lora(block, *kind.key_value), True)
    x, media, locations = kind.inputs()

    def layers(block: nn.Module) -> list[Any]:
        return [m for m in block.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]

    def scale_b(block: nn.Module) -> None:
        with torch.no_grad():
            for name, p in block.named_parameters():
                if "lora_B" in name:
                    p.mul_(3)

    changes: list[Callable[[nn.Module], Any]] = [
        lambda block: None,
        scale_b,
        lambda block: [layer.enable_adapters(False) for layer in layers(block)],
        lambda block: [layer.enable_adapters(True) for layer in layers(block)],
        lambda block: [layer.set_scale("default", 0.5) for layer in layers(block)],
        lambda block: [layer.merge() for layer in layers(block)],
        lambda block: [layer.unmerge() for layer in layers(block)],
    ]
    with torch.no_grad():
        for i, change in enumerate(changes):
            for block in (fused, upstream):
                change(block)
            outputs = [kind.call(block, x, media, locations) for block in (fused, upstream)]
            torch.testing.assert_close(*outputs, atol=5e-5, rtol=5e-5, msg=lambda m, i=i: f"after change {i}: {m}")


@orders
def test_peft_model_around_open_flamingo(fuse_first: bool) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        add_lora(model, "to_q", "to_kv", "q_proj", "v_proj")
        return model

    upstream = of_model()
    fused = copy.deepcopy(upstream)
    wrap(upstream)
    for step in (mllm_fast.fuse, wrap) if fuse_first else (wrap, mllm_fast.fuse):
        step(fused)
    inputs = of_inputs()
    torch.testing.assert_close(fused(**inputs).logits, upstream(**inputs).logits, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 5, "pad_token_id": 0, "num_beams": 2}
    assert fused.generate(**inputs, **options).tolist() == upstream.generate(**inputs, **options).tolist()


def test_fuse_of_a_peft_model() -> None:
    """`get_peft_model` puts the model two levels down."""
    torch.manual_seed(0)
    model = idefics()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    randomise(wrapped)
    expected = wrapped(**idefics_inputs()).logits
    report = mllm_fast.fuse(wrapped)
    assert report.fused
    torch.testing.assert_close(wrapped(**idefics_inputs()).logits, expected, atol=1e-3, rtol=1e-4)
    with wrapped.disable_adapter():
        plain = wrapped(**idefics_inputs()).logits
    mllm_fast.unfuse(wrapped)
    with wrapped.disable_adapter():
        torch.testing.assert_close(plain, wrapped(**idefics_inputs()).logits, atol=1e-4, rtol=1e-4)


# hooks


def _paths(kind: BlockKind) -> list[str]:
    inner = "cross_attn" if kind.name == "idefics" else "attn"
    return [
        kind.query,
        *kind.key_value,
        kind.output,
        kind.feed_forward,
        kind.norm,
        inner,
        kind.feed_forward.partition(".")[0],
    ]


def _hooked_paths() -> list[Any]:
    return [pytest.param(kind, path, id=f"{kind}-{path}") for kind in KINDS for path in _paths(kind)]


@orders
@pytest.mark.parametrize(("kind", "path"), _hooked_paths())
def test_forward_hooks_of_children_are_called_and_may_change_the_output(
    kind: BlockKind, path: str, fuse_first: bool
) -> None:
    def double(_: nn.Module, args: Any, out: Any) -> Any:
        calls.append(path)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    calls: list[str] = []
    fused, upstream = wrapped_twins(kind, lambda block: child(block, path).register_forward_hook(double), fuse_first)
    inputs = kind.inputs()
    for _ in range(2):  # a hook must also fire where a result could be taken from a cache
        calls.clear()
        ours = kind.call(fused, *inputs)
        assert len(calls) == 1
        torch.testing.assert_close(ours, kind.call(upstream, *inputs), atol=3e-5, rtol=3e-4)


@pytest.mark.parametrize(
    "path_of", [lambda k: k.query, lambda k: k.key_value[0], lambda k: k.norm], ids=["query", "key", "norm"]
)
@kinds
def test_forward_pre_hooks_of_children(kind: BlockKind, path_of: Callable[[BlockKind], str]) -> None:
    def wrap(block: nn.Module) -> None:
        child(block, path_of(kind)).register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))

    check(kind, *wrapped_twins(kind, wrap, True))


@kinds
def test_backward_hooks_of_children(kind: BlockKind) -> None:
    def wrap(block: nn.Module) -> None:
        child(block, kind.output).register_full_backward_hook(lambda _, grads, __: (grads[0] * 3,))

    check(kind, *wrapped_twins(kind, wrap, False))


@kinds
def test_a_hook_added_after_a_cached_pass(kind: BlockKind) -> None:
    fused, upstream = wrapped_twins(kind, lambda block: None, True)
    inputs = kind.inputs()
    with torch.no_grad():
        kind.call(fused, *inputs)
        handles = [
            child(b, kind.key_value[-1]).register_forward_hook(lambda _, __, out: out + 1) for b in (fused, upstream)
        ]
        torch.testing.assert_close(kind.call(fused, *inputs), kind.call(upstream, *inputs), atol=3e-5, rtol=3e-4)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(kind.call(fused, *inputs), kind.call(upstream, *inputs), atol=3e-5, rtol=3e-4)


@kinds
def test_hooks_of_the_block_itself(kind: BlockKind) -> None:
    seen: list[str] = []

    def wrap(block: nn.Module) -> None:
        block.register_forward_pre_hook(lambda *_: seen.append("before"))
        block.register_forward_hook(lambda _, __, out: out * 2)

    check(kind, *wrapped_twins(kind, wrap, True))
    assert seen


def test_hooks_inside_the_resampler() -> None:
    upstream = of_resampler()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused)
    x = torch.randn(2, 2, 1, 7, MEDIA_DIM)
    for path in (
        "layers.1.0.to_kv",
        "layers.0.0.norm_media",
        "layers.2.1.1",
        "layers.0.0.to_q",
        "layers.1.0",
        "layers.2.1",
        "norm",
    ):
        for module in (fused, upstream):
            module.get_submodule(path).register_forward_hook(lambda _, __, out: out * 1.5)
        torch.testing.assert_close(fused(x), upstream(x), atol=3e-5, rtol=3e-4, msg=lambda m, path=path: f"{path}: {m}")


# packed and reparametrised weights


@orders
@pytest.mark.parametrize(
    "path_of", [lambda k: k.query, lambda k: k.key_value[0], lambda k: k.feed_forward], ids=["query", "key", "ffn"]
)
@kinds
def test_4_bit_children(kind: BlockKind, path_of: Callable[[BlockKind], str], fuse_first: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def pack(block: nn.Module) -> None:
        parent, _, last = path_of(kind).rpartition(".")
        linear = child(block, path_of(kind))
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            linear.weight.detach().clone(), requires_grad=False, quant_type="nf4"
        )
        setattr(child(block, parent), last, packed.to("cpu"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused, upstream = wrapped_twins(kind, pack, fuse_first)
        if not fuse_first:  # the packed layer is swapped as well
            # Blocks of 64 straddle rows of 48 (the media's width), where bitsandbytes goes wrong on CPUs.
            packed = child(upstream, path_of(kind))
            dense = nn.Linear(packed.in_features, packed.out_features, bias=False)
            dense.weight = nn.Parameter(exact_weight(packed, torch.float32))
            upstream.set_submodule(path_of(kind), dense)
        inputs = kind.inputs()
        with torch.no_grad():
            for _ in range(2):
                ours, theirs = (kind.call(block, *inputs) for block in (fused, upstream))
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@orders
@pytest.mark.parametrize(
    "path_of", [lambda k: k.query, lambda k: k.key_value[-1], lambda k: k.output], ids=["query", "value", "output"]
)
@kinds
def test_weight_norm_on_children(kind: BlockKind, path_of: Callable[[BlockKind], str], fuse_first: bool) -> None:
    def wrap(block: nn.Module) -> None:
        torch.nn.utils.parametrizations.weight_norm(child(block, path_of(kind)))

    fused, upstream = wrapped_twins(kind, wrap, fuse_first)
    check(kind, fused, upstream)
    for block in (fused, upstream):
        with torch.no_grad():
            child(block, path_of(kind)).parametrizations.weight.original0.mul_(2)
    check(kind, fused, upstream)


@kinds
def test_a_child_that_its_owner_gave_a_bias(kind: BlockKind) -> None:
    """Projections have no bias upstream, but people replace them."""

    def wrap(block: nn.Module) -> None:
        for path in (kind.query, kind.key_value[0], kind.output, kind.feed_forward):
            linear = child(block, path)
            linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features))

    check(kind, *wrapped_twins(kind, wrap, True))
    check(kind, *wrapped_twins(kind, wrap, False))


# accelerate


class CountingHook(ModelHook):
    """Does what device-placement hooks do: sees each call, and may change its arguments."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


@kinds
def test_accelerate_hook_before_fuse(kind: BlockKind) -> None:
    """The hook put a `forward` on the instance, which hides the class's: the fused block must run behind it."""
    upstream = kind.build()
    fused, hook = copy.deepcopy(upstream), CountingHook()
    add_hook_to_module(fused, hook)
    mllm_fast.fuse(fused)
    x, media, locations = kind.inputs(images=3)
    with torch.no_grad():
        torch.testing.assert_close(kind.call(fused, x, media, locations), kind.call(upstream, x, media, locations))
        assert hook.calls == 1
        with recording() as cached:
            kind.call(fused, x, media, locations)
        with recording() as whole:
            kind.call(upstream, x, media, locations)
    assert hook.calls == 2
    assert whole.work(kind.media_dim) - cached.work(kind.media_dim) == kind.media_work(2, 3), "the drop-in did not run"
    mllm_fast.unfuse(fused)
    assert type(fused) is type(upstream)
    assert torch.equal(kind.call(fused, x, media, locations), kind.call(upstream, x, media, locations))
    assert hook.calls == 3
    remove_hook_from_module(fused)
    assert torch.equal(kind.call(fused, x, media, locations), kind.call(upstream, x, media, locations))


@kinds
def test_accelerate_hook_removed_or_added_while_fused(kind: BlockKind) -> None:
    fused, upstream = wrapped_twins(kind, lambda block: add_hook_to_module(block, CountingHook()), False)
    remove_hook_from_module(fused)
    check(kind, fused, upstream)
    hook = CountingHook()
    add_hook_to_module(fused, hook)
    check(kind, fused, upstream)
    assert hook.calls
    mllm_fast.unfuse(fused)
    assert type(fused) is type(kind.build())
    x, media, locations = kind.inputs()
    assert torch.equal(kind.call(fused, x, media, locations), kind.call(upstream, x, media, locations))


def test_a_weight_that_is_no_parameter_is_not_read() -> None:
    """A tensor in a parameter's place is not in the tables that are looked into: the child is called."""
    for make, read in ((nn.LayerNorm, children.read_norm), (lambda n: nn.Linear(n, n), children.readable_linear)):
        for name in ("weight", "bias"):
            module = make(3)
            assert read(module)
            value = getattr(module, name).detach() + 1
            delattr(module, name)
            setattr(module, name, value)
            assert not read(module)

"""PEFT's LoRA over quantised layers: base product and low-rank term in one op, and PEFT's own forward for the rest."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.families import peft as family
from tests.families.quantized_layers import draw, error, exact_weight, layer4, layer8, tensors

kinds = pytest.mark.parametrize("kind", ["nf4", "int8"])


class Net(nn.Module):
    """Just enough of a model for PEFT to adapt."""

    def __init__(self, kind: str, compute_dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = kind == "nf4", kind == "int8"
        self.q_proj = layer8(seed=seed) if kind == "int8" else layer4(
            seed=seed, compute_dtype=compute_dtype, dtype=torch.float32
        )  # fmt: skip

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.q_proj(x, **kwargs)


def adapted(kind: str, compute_dtype: torch.dtype = torch.float32, *, seed: int = 0, **options: Any) -> Net:
    net = Net(kind, compute_dtype, seed)
    add(net, "default", **options)
    return net


def add(net: nn.Module, name: str, **options: Any) -> None:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | options)
    torch.manual_seed(len(name))
    peft.inject_adapter_in_model(config, net, name)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.normal_(std=0.3)


def fused(net: nn.Module) -> Any:
    ours = copy.deepcopy(net)
    report = mllm_fast.fuse(ours)
    assert {row.now for row in report.fused} in (
        {"FusedLoraLinear4bit", "FusedLinear4bit"},
        {"FusedLoraLinear8bitLt", "FusedLinear8bitLt"},
    )
    return ours


def results(net: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    net.zero_grad()
    y = net(x, **kwargs)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad}
    return found | {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, reference in theirs.items():
        assert ours[name].dtype == reference.dtype, name
        assert error(ours[name], reference.double()) < tolerance, name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time that base and term were computed by one op."""
    seen: list[Any] = []
    original: Callable[..., Tensor] = family.frozen_linear

    def counted(*args: Any) -> Tensor:
        seen.append(args)
        return original(*args)

    monkeypatch.setattr(family, "frozen_linear", counted)
    return seen


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_gradients(kind: str, training: bool, calls: list[Any]) -> None:
    upstream = adapted(kind, use_rslora=True)
    ours = fused(upstream).train(training)
    x = draw(2, 5, 128, dtype=torch.float32)
    close(results(ours, x), results(upstream.train(), x))
    assert len(results(ours, x)) == 4
    assert len(calls) == 2
    assert list(ours.state_dict()) == list(upstream.state_dict())
    assert isinstance(ours.q_proj, type(upstream.q_proj))


@kinds
def test_half_precision(kind: str, calls: list[Any]) -> None:
    """bf16 around fp32 adapters, as QLoRA trains: at most twice PEFT's own error, for the output and every gradient."""
    theirs: dict[str, float] = {}
    mine: dict[str, float] = {}
    for seed in range(4):
        upstream = adapted(kind, torch.bfloat16, seed=seed)
        ours, x = fused(upstream), draw(40, 128, seed=seed)
        plain = nn.Linear(128, 64)
        plain.weight = nn.Parameter(exact_weight(upstream.q_proj.base_layer), requires_grad=False)
        plain.bias = nn.Parameter(upstream.q_proj.base_layer.bias.double(), requires_grad=False)
        reference = copy.deepcopy(upstream).double()
        reference.q_proj.base_layer = plain
        true = results(reference, x.double())
        for errors, net in ((theirs, upstream), (mine, ours)):
            for name, value in results(net, x).items():
                errors[name] = errors.get(name, 0) + error(value, true[name].double())
    assert mine.keys() == theirs.keys()
    for name, total in theirs.items():
        assert mine[name] <= 2 * total, name
    assert calls


def _two_active(net: nn.Module) -> None:
    add(net, "second")
    net.q_proj.set_adapter(["default", "second"])


def _hook(path: str) -> Callable[[nn.Module], Any]:
    return lambda net: net.get_submodule(path).register_forward_hook(lambda _, __, y: y * 2)


def _merged(net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.q_proj.merge()


FALLBACKS: dict[str, Callable[[nn.Module], Any]] = {
    "disabled": lambda net: net.q_proj.enable_adapters(False),
    "merged": _merged,
    "two adapters": _two_active,
    "no active adapter": lambda net: net.q_proj.set_adapter([]),
    "hook on A": _hook("q_proj.lora_A.default"),
    "hook on the base": _hook("q_proj.base_layer"),
    "no cast": lambda net: setattr(net.q_proj, "cast_input_dtype_enabled", False),
}


@kinds
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_peft_does_itself(kind: str, name: str, calls: list[Any]) -> None:
    upstream = adapted(kind)
    ours, x = fused(upstream), draw(5, 128, dtype=torch.float32)
    for net in (ours, upstream):
        FALLBACKS[name](net)
    if name == "no cast":
        for net in (ours, upstream):
            net.q_proj.lora_A["default"].double()
            net.q_proj.lora_B["default"].double()
            with pytest.raises(RuntimeError):
                net(x)
        return
    close(results(ours, x), results(upstream, x))
    assert not calls


@kinds
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True, "bias": "none"}], ids=["dora", "bias"])
def test_variants(kind: str, options: dict[str, Any], calls: list[Any]) -> None:
    upstream = adapted(kind, **options)
    ours, x = fused(upstream), draw(5, 128, dtype=torch.float32)
    close(results(ours, x), results(upstream, x), 1e-5)
    assert not calls


@kinds
def test_mixed_batches_and_unmerging(kind: str) -> None:
    upstream = adapted(kind)
    add(upstream, "second")
    ours, x = fused(upstream), draw(3, 128, dtype=torch.float32)
    names = ["default", "second", "__base__"]
    close(results(ours, x, adapter_names=names), results(upstream, x, adapter_names=names))
    for net in (ours, upstream):
        _merged(net)
        with pytest.raises(ValueError, match="merged adapters"):
            net(x, adapter_names=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for net in (ours, upstream):
            net.q_proj.unmerge()
    close(results(ours, x), results(upstream, x))


@kinds
def test_dropout(kind: str, calls: list[Any]) -> None:
    """Of the term alone, and only in training."""
    upstream = adapted(kind, lora_dropout=0.25)
    ours, x = fused(upstream), draw(3, 128, dtype=torch.float32)
    with torch.no_grad():
        base = upstream.q_proj.base_layer.train()(x)
        term = ours.q_proj.lora_B["default"](ours.q_proj.lora_A["default"](x)) * ours.q_proj.scaling["default"]
    y = results(ours.eval(), x)["y"]
    assert error(y, (base + term).double()) < 1e-5
    ours.train()
    torch.manual_seed(0)
    first = results(ours, x)["y"]
    torch.manual_seed(0)
    assert torch.equal(results(ours, x)["y"], first)
    assert not torch.allclose(first, y)
    mean = torch.stack([results(ours, x)["y"] for _ in range(400)]).mean(0) - base
    assert error(mean, term.double()) < 0.1
    ours.q_proj.lora_dropout["default"].p = 1.0
    assert error(results(ours, x)["y"], base.double()) < 1e-5
    assert len(calls) > 400


def test_autocast(calls: list[Any]) -> None:
    """As PEFT: adapters in autocast's type; another input type is left to PEFT."""
    upstream = adapted("nf4", torch.bfloat16)
    ours = fused(upstream)
    with torch.autocast("cpu", torch.bfloat16):
        close(results(ours, draw(4, 128)), results(upstream, draw(4, 128)), 1e-2)
        assert len(calls) == 1
        close(
            results(ours, draw(4, 128, dtype=torch.float32)), results(upstream, draw(4, 128, dtype=torch.float32)), 1e-2
        )
        assert len(calls) == 1


@kinds
def test_adapters_after_fusing(kind: str, calls: list[Any]) -> None:
    ours, twin = Net(kind), Net(kind)
    mllm_fast.fuse(ours)
    for net in (ours, twin):
        add(net, "default")
    assert type(ours.q_proj).__module__.startswith("peft")
    x = draw(3, 128, dtype=torch.float32)
    close(results(ours, x), results(twin, x))
    assert not calls
    mllm_fast.fuse(ours)
    close(results(ours, x), results(twin, x))
    assert calls
    mllm_fast.unfuse(ours)
    assert not [m for m in ours.modules() if "_mllm_fast" in vars(m)]
    assert tensors(ours).keys() == tensors(twin).keys()


@kinds
def test_inference_without_a_graph(kind: str, calls: list[Any]) -> None:
    """On a CPU the base layer's own inference path is faster than one op for both."""
    upstream = adapted(kind, torch.bfloat16)
    ours, x = fused(upstream).eval(), draw(3, 128)
    expected = results(upstream.train(), x)["y"]
    with torch.no_grad():
        assert error(ours(x), expected.double()) < 1e-2
    assert not calls


@kinds
def test_compiles_without_a_break(kind: str) -> None:
    ours, x = fused(adapted(kind)), draw(3, 128, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    close({k.replace("_orig_mod.", ""): v for k, v in results(compiled, x).items()}, results(ours, x), 1e-5)
    torch.compiler.reset()

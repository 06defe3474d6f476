"""OPT's decoder layers, frozen and trained through: as for LLaMA's, with biases, layer norms and an MLP without a gate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mllm_fast
from mllm_fast.families.decoder_layers import _OPT, _calls
from mllm_fast.finetune import Lora, prepare_finetuning
from mllm_fast.finetune.memory import decoder_layer_bytes
from mllm_fast.kernels.quantized_linear import Projection
from mllm_fast.modules.decoder_layer import Call, mlp_residual, projection_residual
from tests.families.frozen_decoders import (
    KINDS,
    OPT_SIZES,
    SIX,
    adapted,
    close,
    fused,
    hooked,
    inputs,
    layers_of,
    results,
)
from tests.families.quantized_layers import error
from tests.finetune.every_system import SYSTEMS, built
from tests.finetune.saved import saving


def opt(kind: str = "nf4", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return adapted("OPT", kind, dtype, **{"targets": SIX} | options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new"])
def test_values_and_gradients(activation: str, kind: str, calls: list[Any]) -> None:
    upstream = opt(kind, activation=activation)
    ours = fused(upstream)
    expected = results(upstream, inputs())
    assert len(expected) == 2 + 2 * 2 * len(SIX)
    close(results(ours, inputs()), expected, 1e-5)  # of queries they are small beside what they are sums of
    assert len(calls) == 2


def test_in_fp64(calls: list[Any]) -> None:
    upstream = opt("dense", torch.float64).double()
    given = inputs(torch.float64)
    close(results(fused(upstream), given), results(upstream, given), 1e-12)
    assert len(calls) == 2


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("fc2",), ("out_proj", "fc1")], ids=str)
def test_some_adapters(targets: tuple[str, ...], calls: list[Any]) -> None:
    upstream = opt(targets=targets)
    given = inputs(padded=False)
    close(results(fused(upstream), given), results(upstream, given))
    assert len(calls) == 2


def _no_worse(ours: Any, upstream: Any, exact: Any, dtype: torch.dtype) -> None:
    """Over some draws: in one, a few units of a ReLU may fall to the other side here and not there."""
    squares: dict[str, Tensor] = {}
    for seed in range(6):
        true = results(exact, inputs(seed=seed))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found = [results(model, inputs(dtype, seed=seed)) for model in (ours, upstream)]
        assert found[0].keys() == found[1].keys() == true.keys()
        for name, t in true.items():
            assert found[0][name].dtype == found[1][name].dtype
            errors = torch.tensor([error(f[name], t.double()) for f in found])
            squares[name] = squares.get(name, 0) + errors.square()
    for name, (mine, theirs) in squares.items():
        assert mine.sqrt() <= 2 * theirs.sqrt() + 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, calls: list[Any]) -> None:
    """bf16 around fp32 adapters: at most twice the error of transformers and PEFT, for the output and every gradient."""
    upstream = opt(kind, torch.bfloat16)
    _no_worse(fused(upstream), upstream, opt(kind), torch.bfloat16)
    assert len(calls) == 12


def test_autocast(calls: list[Any]) -> None:
    upstream = opt(compute=torch.bfloat16)
    _no_worse(fused(upstream), upstream, opt(), torch.float32)
    assert len(calls) == 12


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), SIX], ids=["nothing", "q and v", "all"])
def test_what_is_kept_for_backward(targets: tuple[str, ...], padded: bool, activation: str) -> None:
    """Per token 6 h and f numbers, the ranks of the adapters and the logsumexps; the mask once for both layers."""
    model = fused(opt(targets=targets, activation=activation))
    h, f, heads = OPT_SIZES["hidden_size"], OPT_SIZES["ffn_dim"], OPT_SIZES["num_attention_heads"]
    given, x = inputs(padded=padded), inputs()["inputs_embeds"].requires_grad_()
    ours = {str(i): layer for i, layer in enumerate(layers_of(model))}
    with saving(model, ours, [x]) as saved:
        model.model(**given | {"inputs_embeds": x}, use_cache=False)
    mask = 14 * 8 if padded else 0
    for layer, elements in (("0", mask), ("1", 0)):
        expected = decoder_layer_bytes(14, h, h, h, f, heads, 4 * len(targets), 4, hidden=1, mask=elements)
        assert saved.bytes[layer] == expected, saved.shapes[layer]


def _each(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: [change(layer) for layer in layers_of(model)]


UPSTREAM: dict[str, Callable[[Any], Any]] = {
    "hook on the attention": hooked("self_attn"),
    "hook on the activation": hooked("activation_fn"),
    "hook on a projection": hooked("fc2"),
    "hook on a norm": hooked("final_layer_norm"),
    "another activation": _each(lambda layer: setattr(layer, "activation_fn", nn.ELU())),
    "an activation unknown to the MLP": _each(lambda layer: setattr(layer, "activation_fn", nn.SiLU())),
    "adapters off": _each(lambda layer: layer.fc1.enable_adapters(False)),
    "adapters merged": _each(lambda layer: layer.self_attn.q_proj.merge()),
    "trained bias of a norm": _each(lambda layer: layer.self_attn_layer_norm.bias.requires_grad_(True)),
    "trained bias": _each(lambda layer: layer.fc2.base_layer.bias.requires_grad_(True)),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_what_upstream_does_itself(name: str, calls: list[Any]) -> None:
    upstream = opt("dense")
    ours = fused(upstream)
    for model in (ours, upstream):
        UPSTREAM[name](model)
    close(results(ours, inputs()), results(upstream, inputs()))
    assert not calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, calls: list[Any]) -> None:
    ours = fused(opt(lora_dropout=0.2))
    for layer in layers_of(ours):
        layer.dropout = 0.3
    torch.manual_seed(5)
    expected = results(ours, inputs())
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    del calls[:]
    torch.manual_seed(5)
    found = results(ours, inputs())
    if not reentrant:  # the other kind runs without a graph first, where upstream draws in its own order
        close(found, expected, 1e-12)
    assert len(calls) == (2 if reentrant else 4)


def test_dropout() -> None:
    """Of both branches: a seed gives it again, and the gradient is that of what was drawn."""
    ours, given = fused(opt("dense", lora_dropout=0.2)), inputs()
    for layer in layers_of(ours):
        layer.dropout = 0.4
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(results(ours, given))
    first, again, other = found
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert error(other["y"], first["y"].double()) > 1e-2
    slope = torch.stack([g.norm() for n, g in first.items() if n != "y"]).norm()
    direction = {n: g / slope for n, g in first.items() if n != "y"}
    values = []
    for step in (1e-2, -1e-2):
        moved = copy.deepcopy(ours)
        with torch.no_grad():
            for n, p in moved.named_parameters():
                if n in direction:
                    p.add_(step * direction[n])
        torch.manual_seed(3)
        y = results(moved, given | {"inputs_embeds": given["inputs_embeds"] + step * direction["dx"]})["y"]
        values.append((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).double().sum())
    assert abs((values[0] - values[1]) / 2e-2 - slope) < 1e-2 * abs(slope)
    ours.eval()
    close(results(ours, given), results(fused(opt("dense", lora_dropout=0.2)).eval(), given), 1e-12)


def test_dropout_of_a_branch() -> None:
    """What is left of it is scaled, and the residual is not touched."""
    x, weight = torch.randn(1, 50, 16), torch.randn(16, 16)
    call = Call(torch.float32, (Projection(weight),), dropout_p=0.25, seed=7)
    branch = projection_residual(x, torch.zeros_like(x), call)
    dropped = branch == 0
    assert 0.15 < dropped.float().mean() < 0.35
    assert torch.allclose(branch, torch.where(dropped, 0.0, (x @ weight.mT) / 0.75), atol=1e-5)
    assert torch.allclose(projection_residual(x, x, call), x + branch)


@pytest.mark.parametrize(("options", "reason"), [
    ({"do_layer_norm_before": False}, "norms follow"), ({"activation_function": "silu"}, "expected relu or gelu"),
])  # fmt: skip
def test_layers_that_are_left_alone(options: dict[str, Any], reason: str) -> None:
    """The 350M model has its norms behind its halves."""
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**OPT_SIZES | options))
    with pytest.raises(mllm_fast.NothingToFuseError, match=reason):
        mllm_fast.fuse(model, training=True)


@pytest.mark.parametrize("options", [{"layer_norm_elementwise_affine": False}, {"enable_bias": False}], ids=str)
def test_layers_with_fewer_parameters(options: dict[str, Any], calls: list[Any]) -> None:
    torch.manual_seed(0)
    upstream = transformers.OPTForCausalLM(transformers.OPTConfig(**OPT_SIZES | options)).requires_grad_(False).train()
    close(results(fused(upstream), inputs()), results(upstream, inputs()))
    assert len(calls) == 2


@pytest.mark.parametrize(("name", "train"), [("blip2", "bridge"), ("blip2", "bridge+lora"), ("instructblip", "bridge")])
def test_systems_over_opt(name: str, train: str, calls: list[Any]) -> None:
    model, batch = built(name)
    prepare_finetuning(model.train(), train, lora=Lora(r=2) if "lora" in train else None)
    SYSTEMS[name].loss(model, batch).backward()
    assert len(calls) == model.config.text_config.num_hidden_layers


def test_an_mlp_on_its_own() -> None:
    """Without a gradient of x, as in the lowest layer that has adapters, and with none of the adapters'."""
    torch.manual_seed(0)
    layer = layers_of(opt("dense"))[0]
    x = torch.randn(2, 3, OPT_SIZES["hidden_size"])

    def reference(t: Tensor) -> Tensor:
        return t + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(t))))

    parameters = [p for p in (*layer.fc1.parameters(), *layer.fc2.parameters()) if p.requires_grad]
    for wanted in (parameters, parameters[2:], [x]):
        for p in (x, *parameters):
            p.requires_grad_(any(p is w for w in wanted))
        call = _calls(layer, _OPT, x)[2]
        grads = [torch.autograd.grad(y.square().sum(), wanted) for y in (mlp_residual(x, call), reference(x))]
        for mine, theirs in zip(*grads, strict=True):
            assert error(mine, theirs.double()) < 5e-6

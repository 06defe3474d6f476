"""norm_linear and linear_residual against explicit compositions and the upstream blocks they stand in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_flamingo.src.helpers import FeedForward
from torch import Tensor, nn
from torch.func import functional_call
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertConfig, BertOutput
from transformers.models.idefics.modeling_idefics import IdeficsMLP

from mllm_fast.kernels import runtime
from mllm_fast.kernels.linear import ACTIVATIONS, linear_residual, norm_linear
from mllm_fast.kernels.norm import Norm
from tests.kernels.op_checks import CountOps, Inputs, Op, check_exact, check_low_precision

LOW = [torch.bfloat16, torch.float16]
# Ours by name, and transformers' own activation for the same function; for the gated ones, that of the gate.
UPSTREAM_ACTIVATIONS = {
    None: nn.Identity(),
    "gelu": ACT2FN["gelu"],
    "gelu_tanh": ACT2FN["gelu_pytorch_tanh"],
    "quick_gelu": ACT2FN["quick_gelu"],
    "relu": ACT2FN["relu"],
    "squared_relu": ACT2FN["relu2"],
    "silu": ACT2FN["silu"],
    "swiglu": ACT2FN["silu"],
    "geglu": ACT2FN["gelu"],
}
GATED = ("swiglu", "geglu")


def draw_linear(rows: tuple[int, ...], k: int, n: int, *, bias: bool = True, norm: str | None = None) -> Inputs:
    inputs = {"x": torch.randn(*rows, k), "weight": torch.randn(n, k) * k**-0.5}
    if bias:
        inputs["bias"] = torch.randn(n)
    if norm is not None:
        inputs |= {"norm_weight": torch.randn(k)} | ({"norm_bias": torch.randn(k)} if norm == "layer_norm" else {})
    return inputs


def our_norm(kind: str | None, weight: Tensor | None, bias: Tensor | None) -> Norm | None:
    return None if kind is None else Norm(kind, weight, bias, 1e-5)  # type: ignore[arg-type]


def their_norm(x: Tensor, kind: str | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    if kind == "rms_norm":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return x if weight is None else x * weight
    return x


def norm_linear_pair(kind: str | None, activation: str | None) -> tuple[Op, Op]:
    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None, **kw: Any) -> Tensor:
        norm = our_norm(kind, kw.pop("norm_weight", None), kw.pop("norm_bias", None))
        return norm_linear(x, weight, bias, norm=norm, activation=activation, **kw)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor | None = None, **kw: Any) -> Tensor:
        x = their_norm(x, kind, kw.get("norm_weight"), kw.get("norm_bias"))
        act = UPSTREAM_ACTIVATIONS[activation]
        if activation in GATED:
            return act(F.linear(x, kw["gate_weight"], kw.get("gate_bias"))) * F.linear(x, weight, bias)
        return act(F.linear(x, weight, bias))

    return ours, theirs


def linear_residual_pair(kind: str | None = None, p: float = 0.0) -> tuple[Op, Op]:
    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None, **kw: Any) -> Tensor:
        norm = our_norm(kind, kw.pop("norm_weight", None), kw.pop("norm_bias", None))
        return linear_residual(x, weight, bias, norm=norm, dropout_p=p, seed=3, **kw)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor | None = None, **kw: Any) -> Tensor:
        branch = F.linear(x, weight, bias)
        if p:
            torch.manual_seed(3)
            branch = F.dropout(branch, p)
        if kind is not None:
            return their_norm(kw["residual"] + branch, kind, kw.get("norm_weight"), kw.get("norm_bias"))
        if "gate" in kw:
            branch = kw["gate"].tanh() * branch
        return kw["residual"] + (branch * kw["row_mask"].unsqueeze(-1) if "row_mask" in kw else branch)

    return ours, theirs


def with_gate_weight(inputs: Inputs, activation: str | None) -> Inputs:
    if activation in GATED:
        inputs["gate_weight"] = torch.randn_like(inputs["weight"])
        if "bias" in inputs:
            inputs["gate_bias"] = torch.randn_like(inputs["bias"])
    return inputs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", list(UPSTREAM_ACTIVATIONS))
def test_norm_linear_in_fp64(activation: str | None, norm: str | None, bias: bool) -> None:
    for rows in [(1, 1), (2, 5), (3, 0), (7,), ()]:
        inputs = with_gate_weight(draw_linear(rows, 11, 13, bias=bias, norm=norm), activation)
        check_exact(*norm_linear_pair(norm, activation), inputs)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", list(UPSTREAM_ACTIVATIONS))
def test_norm_linear_low_precision(activation: str | None, norm: str, dtype: torch.dtype) -> None:
    ours, theirs = norm_linear_pair(norm, activation)

    def draw() -> Inputs:
        return with_gate_weight(draw_linear((2, 8), 64, 48, norm=norm), activation)

    check_low_precision(ours, theirs, draw, dtype)


# (norm, gate, masked): post-norm has neither a gate nor a row mask.
EPILOGUES = [(norm, None, False) for norm in (None, "layer_norm", "rms_norm")] + [
    (None, gate, masked) for gate in (None, (), (1,), (13,), (1, 1, 13)) for masked in (False, True)
]


def draw_linear_residual(
    rows: tuple[int, ...], k: int, norm: str | None, gate: tuple[int, ...] | None, masked: bool
) -> Inputs:
    inputs = draw_linear(rows, k, 13) | {"residual": torch.randn(*rows, 13)}
    if norm is not None:
        inputs["norm_weight"] = torch.randn(13)
    if norm == "layer_norm":
        inputs["norm_bias"] = torch.randn(13)
    if gate is not None:
        inputs["gate"] = torch.randn(gate)
    if masked:
        inputs["row_mask"] = torch.rand(rows) < 0.5
    return inputs


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("norm", "gate", "masked"), EPILOGUES)
def test_linear_residual_in_fp64(norm: str | None, gate: tuple[int, ...] | None, masked: bool, p: float) -> None:
    for rows in [(1, 1), (2, 5), (3, 0)]:
        check_exact(*linear_residual_pair(norm, p), draw_linear_residual(rows, 11, norm, gate, masked))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("norm", "gate", "masked"), EPILOGUES)
def test_linear_residual_low_precision(
    norm: str | None, gate: tuple[int, ...] | None, masked: bool, dtype: torch.dtype
) -> None:
    def draw() -> Inputs:
        return draw_linear_residual((2, 16), 64, norm, gate, masked)

    check_low_precision(*linear_residual_pair(norm, 0.2), draw, dtype)


def module_pair(module: nn.Module, ours: Op) -> tuple[Op, Op, Inputs]:
    """`ours` and a call of `module`, both by parameter name ("0.weight" is p_0_weight), and random parameters."""
    names = {"p_" + name.replace(".", "_"): name for name, _ in module.named_parameters()}
    parameters = {ours: module.get_parameter(name) for ours, name in names.items()}

    def theirs(x: Tensor, residual: Tensor | None = None, **kw: Tensor) -> Tensor:
        inputs = (x,) if residual is None else (x, residual)
        return functional_call(module, {names[name]: t for name, t in kw.items()}, inputs)

    return ours, theirs, {name: torch.randn_like(p) * p.shape[-1] ** -0.5 for name, p in parameters.items()}


def feed_forward() -> tuple[Op, Op, Inputs]:
    def ours(x: Tensor, p_0_weight: Tensor, p_0_bias: Tensor, p_1_weight: Tensor, p_3_weight: Tensor) -> Tensor:
        hidden = norm_linear(x, p_1_weight, norm=Norm("layer_norm", p_0_weight, p_0_bias), activation="gelu")
        return linear_residual(hidden, p_3_weight, residual=torch.zeros_like(x))

    return module_pair(FeedForward(24), ours)


def idefics_mlp() -> tuple[Op, Op, Inputs]:
    def ours(x: Tensor, p_gate_proj_weight: Tensor, p_up_proj_weight: Tensor, p_down_proj_weight: Tensor) -> Tensor:
        hidden = norm_linear(x, p_up_proj_weight, activation="swiglu", gate_weight=p_gate_proj_weight)
        return linear_residual(hidden, p_down_proj_weight, residual=torch.zeros_like(x))

    return module_pair(IdeficsMLP(24, 40, "silu"), ours)


def bert_output() -> tuple[Op, Op, Inputs]:
    def ours(
        x: Tensor,
        residual: Tensor,
        p_dense_weight: Tensor,
        p_dense_bias: Tensor,
        p_LayerNorm_weight: Tensor,
        p_LayerNorm_bias: Tensor,
    ) -> Tensor:
        norm = Norm("layer_norm", p_LayerNorm_weight, p_LayerNorm_bias, 1e-12)
        return linear_residual(x, p_dense_weight, p_dense_bias, residual=residual, norm=norm)

    return module_pair(BertOutput(BertConfig(hidden_size=24, intermediate_size=24)).eval(), ours)


@pytest.mark.parametrize("peer", [feed_forward, idefics_mlp, bert_output])
def test_upstream_blocks(peer: Any) -> None:
    ours, theirs, parameters = peer()
    more = {"residual": torch.randn(2, 5, 24)} if peer is bert_output else {}
    check_exact(ours, theirs, {"x": torch.randn(2, 5, 24)} | parameters | more)
    for dtype in LOW:

        def draw() -> Inputs:
            residual = {"residual": torch.randn(2, 8, 24)} if peer is bert_output else {}
            return {"x": torch.randn(2, 8, 24)} | peer()[2] | residual

        check_low_precision(ours, theirs, draw, dtype)


@pytest.mark.parametrize("seed", [None, 4])
def test_bert_output_in_training(seed: int | None) -> None:
    peer = BertOutput(BertConfig(hidden_size=24, intermediate_size=40, hidden_dropout_prob=0.1)).train()
    x, residual = torch.randn(2, 9, 40), torch.randn(2, 9, 24)
    torch.manual_seed(4)
    theirs = peer(x, residual)
    norm = Norm("layer_norm", peer.LayerNorm.weight, peer.LayerNorm.bias, peer.LayerNorm.eps)
    torch.manual_seed(4)
    arguments = {"residual": residual, "norm": norm, "dropout_p": 0.1, "seed": seed}
    ours = linear_residual(x, peer.dense.weight, peer.dense.bias, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_gradcheck() -> None:
    inputs = with_gate_weight(draw_linear((3,), 4, 5, norm="layer_norm"), "swiglu")
    ours, _ = norm_linear_pair("layer_norm", "swiglu")
    values = [t.double().requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: ours(**dict(zip(inputs, args, strict=True))), values)
    inputs = draw_linear((3,), 4, 5) | {"residual": torch.randn(3, 5), "gate": torch.randn(5)}
    ours, _ = linear_residual_pair(None, 0.3)
    values = [t.double().requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: ours(**dict(zip(inputs, args, strict=True))), values)


def test_the_norm_of_a_gated_activation_is_computed_once() -> None:
    inputs = with_gate_weight(draw_linear((2, 5), 8, 12, norm="layer_norm"), "swiglu")
    with torch.no_grad(), CountOps() as mode:
        norm_linear_pair("layer_norm", "swiglu")[0](**inputs)
    assert mode.counts["native_layer_norm"] == 1
    assert mode.counts["addmm"] == 2


@pytest.mark.parametrize("bias", [False, True])
def test_unevenly_spaced_rows_are_one_gemm(bias: bool) -> None:
    inputs = draw_linear((4, 9), 8, 12, bias=bias)
    inputs["x"] = inputs["x"][:, 2:7]
    with torch.no_grad(), CountOps() as mode:
        ours = norm_linear(**inputs)
    assert mode.counts["bmm"] == 0
    assert mode.counts["mm"] + mode.counts["addmm"] == 1
    torch.testing.assert_close(ours, F.linear(**{"input": inputs.pop("x")} | inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_the_functionals(dtype: torch.dtype) -> None:
    x, residual, norm_weight = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 3, 6), torch.randn(8)
    weight, bias = torch.randn(6, 8), torch.randn(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = norm_linear(x, weight, bias, norm=Norm("layer_norm", norm_weight), activation="gelu")
        theirs = F.gelu(F.linear(F.layer_norm(x, (8,), norm_weight), weight, bias))
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)
        ours = linear_residual(x, weight, bias, residual=residual)
        theirs = residual + F.linear(x, weight, bias)
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_fp32_norms_in_a_bf16_model() -> None:
    inputs = {name: t.bfloat16() for name, t in draw_linear((2, 5), 16, 12).items()}
    norm_weight, norm_bias = torch.randn(16), torch.randn(16)
    ours = norm_linear(**inputs, norm=Norm("layer_norm", norm_weight, norm_bias))
    exact = F.linear(F.layer_norm(inputs["x"].float(), (16,), norm_weight, norm_bias), inputs["weight"].float())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact + inputs["bias"].float(), rtol=0.02, atol=0.05)


@settings(max_examples=40)
@given(
    leading=st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3),
    k=st.sampled_from([1, 2, 7, 13, 32]),
    n=st.sampled_from([1, 3, 11, 16]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "rows sliced", "expanded"]),
    gated=st.booleans(),
    masked=st.booleans(),
)
def test_any_shape_and_layout(leading: list[int], k: int, n: int, layout: str, gated: bool, masked: bool) -> None:
    torch.manual_seed(0)
    inputs = draw_linear(tuple(leading), k, n)
    x = inputs["x"]
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced":
        x = torch.cat([x, x], dim=-1)[..., :k]
    elif layout == "rows sliced" and len(leading) >= 2:
        x = torch.cat([x, x], dim=-2)[..., : x.shape[-2], :]
    elif layout == "expanded" and leading:
        x = x[:1].expand_as(x)
    inputs["x"] = x
    check_exact(*norm_linear_pair(None, "gelu"), inputs)
    inputs["residual"] = torch.randn(*leading, n)
    if gated:
        inputs["gate"] = torch.randn(n)
    if masked:
        inputs["row_mask"] = torch.rand(leading) < 0.5
    check_exact(*linear_residual_pair(), inputs)


def test_errors_name_what_was_wrong() -> None:
    x, weight, residual = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(2, 3, 6)
    cases: list[tuple[Any, str]] = [
        (lambda: norm_linear(x, weight.t()), r"weight has shape \(8, 6\), but x has shape \(2, 3, 8\)"),
        (lambda: norm_linear(x, torch.randn(48, 1)), r"weight has shape \(48, 1\), but x has shape \(2, 3, 8\)"),
        (lambda: norm_linear(x, weight, torch.ones(8)), r"bias has shape \(8,\), but weight has shape \(6, 8\)"),
        (
            lambda: norm_linear(x, weight, activation="mish"),
            "unknown activation 'mish'; expected None or one of 'gelu'",
        ),
        (lambda: norm_linear(x, weight, activation="swiglu"), r"'swiglu' needs a gate_weight.*\(6, 8\)"),
        (
            lambda: norm_linear(x, weight, activation="swiglu", gate_weight=weight[:5]),
            r"gate_weight has shape \(5, 8\), but weight has shape \(6, 8\)",
        ),
        (
            lambda: norm_linear(x, weight, activation="geglu", gate_weight=weight, gate_bias=torch.ones(5)),
            r"gate_bias has shape \(5,\), but gate_weight has shape \(6, 8\)",
        ),
        (lambda: norm_linear(x, weight, activation="gelu", gate_weight=weight), "belong to a gated activation"),
        (lambda: norm_linear(x, weight, norm=Norm("rms_norm", torch.ones(6))), r"norm weight has shape \(6,\)"),
        (
            lambda: norm_linear(x, weight, head_norm=Norm("rms_norm", torch.ones(4))),
            r"weight of shape \(4,\), but weight has shape \(6, 8\)",
        ),
        (
            lambda: norm_linear(x, weight, head_norm=Norm("rms_norm")),
            "head_norm is 'rms_norm' with a weight of shape None",
        ),
        (lambda: norm_linear(x, weight, head_norm=Norm("layer_norm", torch.ones(3))), "head_norm is 'layer_norm'"),
        (
            lambda: norm_linear(x, weight, head_norm=Norm("rms_norm", torch.ones(3)), activation="relu"),
            "head_norm excludes an activation",
        ),
        (
            lambda: linear_residual(x, weight, residual=residual, residual_norm=Norm("rms_norm", torch.ones(8))),
            r"norm weight has shape \(8,\), but residual has shape \(2, 3, 6\)",
        ),
        (
            lambda: linear_residual(x, weight, residual=x),
            r"residual has shape \(2, 3, 8\), but x with shape \(2, 3, 8\) and weight with shape \(6, 8\)",
        ),
        (lambda: linear_residual(x, weight, residual=residual[:1]), r"residual has shape \(1, 3, 6\)"),
        (lambda: linear_residual(x, weight, residual=residual, gate=torch.ones(8)), r"gate has shape \(8,\)"),
        (lambda: linear_residual(x, weight, residual=residual, dropout_p=-0.1), "dropout_p must lie in"),
        (
            lambda: linear_residual(x, weight, residual=residual, norm=Norm("layer_norm"), gate=torch.ones(1)),
            "excludes gate and row_mask",
        ),
        (
            lambda: linear_residual(x, weight, residual=residual, norm=Norm("layer_norm", torch.ones(8))),
            r"norm weight has shape \(8,\), but residual has shape \(2, 3, 6\)",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_registered() -> None:
    assert {"norm_linear", "linear_residual", "stacked_linear"} <= {op.name for op in runtime.ops()}
    assert set(ACTIVATIONS) == {name for name in UPSTREAM_ACTIVATIONS if name is not None}

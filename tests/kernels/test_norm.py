"""layer_norm and rms_norm against torch.nn and the upstream norms they stand in for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.bert.modeling_bert import BertConfig, BertOutput
from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mllm_fast.kernels import runtime
from mllm_fast.kernels.norm import Norm, layer_norm, normalize, reference, rms_norm
from tests.kernels.op_checks import Inputs, check_exact, check_low_precision, check_pure, run

LOW = [torch.bfloat16, torch.float16]


def draw_inputs(*shape: int, bias: bool = True, residual: bool = False) -> Inputs:
    """A tensor with a mean and a spread of its own, and affine parameters that are not 1 and 0."""
    inputs = {"x": 3 * torch.randn(shape) + 1.5, "weight": torch.randn(shape[-1])}
    if bias:
        inputs["bias"] = torch.randn(shape[-1])
    if residual:
        inputs["residual"] = torch.randn(shape)
    return inputs


def their_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    norm = nn.LayerNorm(x.shape[-1], eps=eps)
    return functional_call(norm, {"weight": weight, "bias": bias}, (x if residual is None else x + residual,))


def their_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    x = x if residual is None else x + residual
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def upstream_rms_norm(cls: type[nn.Module]) -> object:
    def call(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(cls(x.shape[-1]), {"weight": weight}, (x,))

    return call


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 32), (2, 1, 4, 13), (37,), (0, 8), (2, 0, 5)])
@pytest.mark.parametrize("residual", [False, True])
def test_equals_the_definition_in_fp64(shape: tuple[int, ...], residual: bool) -> None:
    check_exact(layer_norm, their_layer_norm, draw_inputs(*shape, residual=residual))
    check_exact(rms_norm, their_rms_norm, draw_inputs(*shape, bias=False, residual=residual))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 0.5])
def test_eps(eps: float) -> None:
    inputs = {name: 0.01 * t for name, t in draw_inputs(3, 8).items()}
    check_exact(lambda **kw: layer_norm(**kw, eps=eps), lambda **kw: their_layer_norm(**kw, eps=eps), inputs)
    del inputs["bias"]
    check_exact(lambda **kw: rms_norm(**kw, eps=eps), lambda **kw: their_rms_norm(**kw, eps=eps), inputs)


def test_without_affine_parameters() -> None:
    x = {"x": torch.randn(4, 9)}
    check_exact(layer_norm, lambda x: F.layer_norm(x, (9,)), x)
    check_exact(rms_norm, lambda x: their_rms_norm(x, torch.ones(9, dtype=x.dtype)), x)
    weight_only = draw_inputs(4, 9, bias=False)
    check_exact(layer_norm, lambda x, weight: F.layer_norm(x, (9,), weight), weight_only)


@pytest.mark.parametrize("upstream", [LlamaRMSNorm, IdeficsRMSNorm, nn.RMSNorm])
def test_rms_norm_equals_upstream_modules(upstream: type[nn.Module]) -> None:
    # The two of transformers take their statistics in fp32 whatever the input is, so fp32 is what can be compared.
    inputs = draw_inputs(6, 40, bias=False)
    eps = torch.finfo(torch.float32).eps if upstream is nn.RMSNorm else 1e-6
    ours = run(lambda **kw: rms_norm(**kw, eps=eps), inputs, torch.float32)
    theirs = run(upstream_rms_norm(upstream), inputs, torch.float32)  # type: ignore[arg-type]
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision(dtype: torch.dtype) -> None:
    check_low_precision(layer_norm, their_layer_norm, lambda: draw_inputs(16, 96), dtype)
    check_low_precision(layer_norm, their_layer_norm, lambda: draw_inputs(16, 96, residual=True), dtype)
    for upstream in (LlamaRMSNorm, IdeficsRMSNorm):
        check_low_precision(rms_norm, upstream_rms_norm(upstream), lambda: draw_inputs(16, 96, bias=False), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", LOW)
def test_statistics_are_fp32_and_the_result_is_rounded_once(dtype: torch.dtype) -> None:
    # A mean far above the spread, and more elements than a 16-bit sum could hold.
    x = (100 + torch.randn(8, 4096)).to(dtype)
    weight, bias = torch.randn(4096).to(dtype), torch.randn(4096).to(dtype)
    wide = (x.double(), weight.double(), bias.double())
    for ours, exact in (
        (layer_norm(x, weight, bias), F.layer_norm(wide[0], (4096,), *wide[1:])),
        (rms_norm(x, weight), their_rms_norm(*wide[:2])),
    ):
        assert ours.dtype == dtype
        # Half a step of rounding, and a little for fp32 itself.
        assert ((ours.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-3).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_another_dtype(dtype: torch.dtype, parameters: torch.dtype) -> None:
    x, residual = torch.randn(3, 16).to(dtype), torch.randn(3, 16).to(dtype)
    weight, bias = torch.randn(16).to(parameters), torch.randn(16).to(parameters)
    exact = F.layer_norm((x + residual).double(), (16,), weight.double(), bias.double())
    ours = layer_norm(x, weight, bias, residual=residual)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-2 * (dtype in LOW) + 1e-5)
    ours = rms_norm(x, weight)
    assert ours.dtype == dtype
    exact = their_rms_norm(x.double(), weight.double())
    torch.testing.assert_close(ours.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    one_of_each = layer_norm(x, weight, bias.to(torch.float32))
    assert one_of_each.dtype == dtype


def test_a_wider_residual_widens_the_result() -> None:
    x, residual, weight = torch.randn(3, 16).bfloat16(), torch.randn(3, 16), torch.randn(16)
    ours = layer_norm(x, weight, residual=residual)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, F.layer_norm(x.float() + residual, (16,), weight))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_the_functional(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 16).to(dtype), torch.randn(16), torch.randn(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = layer_norm(x, weight, bias), F.layer_norm(x, (16,), weight, bias)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        ours, theirs = rms_norm(x, weight), F.rms_norm(x, (16,), weight, 1e-6)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_gradcheck() -> None:
    x, residual = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def dropped(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, weight, bias, residual=residual, dropout_p=0.4, seed=7)

    assert torch.autograd.gradcheck(dropped, (x, residual, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, dropout_p=0.4, seed=7), (x, weight))


@pytest.mark.parametrize("seed", [0, 1, 2**62])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_torchs_own_pattern(p: float, seed: int) -> None:
    peer = BertOutput(BertConfig(hidden_size=32, intermediate_size=32, hidden_dropout_prob=p)).train()
    with torch.no_grad():
        peer.dense.weight.copy_(torch.eye(32))
        peer.dense.bias.zero_()
        peer.LayerNorm.weight.normal_()
        peer.LayerNorm.bias.normal_()
    x, residual = torch.randn(4, 9, 32), torch.randn(4, 9, 32)
    norm = (peer.LayerNorm.weight, peer.LayerNorm.bias, peer.LayerNorm.eps)
    torch.manual_seed(seed)
    theirs = peer(x, residual)
    state = torch.get_rng_state()
    ours = layer_norm(x, *norm, residual=residual, dropout_p=p, seed=seed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state), "a seeded call must leave the global generator alone"
    torch.manual_seed(seed)
    unseeded = layer_norm(x, *norm, residual=residual, dropout_p=p)
    torch.testing.assert_close(unseeded, theirs, rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state), "an unseeded call must draw what F.dropout draws"


def test_dropout_depends_on_the_seed_and_not_on_strides() -> None:
    x = torch.ones(64, 32)
    one = reference.dropout(x, 0.25, 11)
    assert torch.equal(one, reference.dropout(x.t().contiguous().t(), 0.25, 11))
    assert not torch.equal(one, reference.dropout(x, 0.25, 12))
    assert set(one.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((one == 0).float().mean().item() - 0.25) < 0.04


def test_seeded_dropout_compiles_into_one_graph() -> None:
    def step(x: Tensor) -> Tensor:
        return reference.layer_norm(x, None, None, 1e-5, x, 0.3, 5)

    x = torch.randn(3, 8)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))
    arguments = ([3, 4], 0.5, 3, torch.float32, torch.device("cpu"))
    torch.library.opcheck(torch.ops.mllm_fast.dropout_keep.default, arguments)


@settings(max_examples=40)
@given(
    leading=st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3),
    features=st.sampled_from([1, 2, 7, 13, 32]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    residual=st.booleans(),
)
def test_any_shape_and_layout(leading: list[int], features: int, layout: str, residual: bool) -> None:
    torch.manual_seed(0)
    inputs = draw_inputs(*leading, features, residual=residual)
    x = inputs["x"]
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced":
        x = torch.cat([x, x], dim=-1)[..., :features]
    elif layout == "expanded":
        x = x[:1].expand_as(x) if leading else x
    assert torch.equal(
        layer_norm(x, inputs["weight"], inputs["bias"], residual=inputs.get("residual")),
        layer_norm(x.contiguous(), inputs["weight"], inputs["bias"], residual=inputs.get("residual")),
    )
    inputs["x"] = x
    check_pure(layer_norm, inputs)
    check_exact(layer_norm, their_layer_norm, inputs)
    del inputs["bias"]
    check_exact(rms_norm, their_rms_norm, inputs)


def test_normalize_dispatches() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    assert torch.equal(normalize(x, Norm("layer_norm", weight, bias, 1e-3)), layer_norm(x, weight, bias, 1e-3))
    assert torch.equal(normalize(x, Norm("rms_norm", weight, eps=1e-3)), rms_norm(x, weight, 1e-3))


def test_errors_name_what_was_wrong() -> None:
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"norm weight has shape \(7,\), but x has shape \(2, 3, 8\).*expected \(8,\)"):
        layer_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"norm bias has shape \(1, 8\), but x has shape \(2, 3, 8\)"):
        layer_norm(x, torch.ones(8), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"norm weight has shape \(3,\)"):
        rms_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"residual has shape \(3, 8\), but x has shape \(2, 3, 8\)"):
        rms_norm(x, residual=torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\], but is 1.5"):
        layer_norm(x, dropout_p=1.5)
    with pytest.raises(ValueError, match="unknown norm kind 'batch_norm'"):
        Norm("batch_norm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="RMS norm has no bias"):
        Norm("rms_norm", torch.ones(8), torch.ones(8))


def test_registered() -> None:
    assert {"layer_norm", "rms_norm"} <= {op.name for op in runtime.ops()}

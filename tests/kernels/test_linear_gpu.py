"""The linear kernels in bf16 and at the sizes of models: no less accurate than the ops one by one, on the same GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.kernels.linear import configs, grouped_linear, linear_residual, norm_linear
from mllm_fast.kernels.norm import Norm

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
ROWS = [1, 7, 16, 32, 96, 200, 1024, 2500]
Inputs = dict[str, Tensor]
Op = Callable[[Inputs], Tensor]


def norm(t: Inputs) -> Norm:
    return Norm("layer_norm" if "shift" in t else "rms_norm", t["gain"], t.get("shift"))


def up(t: Inputs) -> Tensor:
    """The first half of Flamingo's feed-forward network."""
    return norm_linear(t["x"], t["weight"], norm=norm(t), activation="gelu")


def gated_up(t: Inputs) -> Tensor:
    """That of idefics."""
    return norm_linear(t["x"], t["weight"], norm=norm(t), activation="swiglu", gate_weight=t["gate_weight"])


def heads(t: Inputs) -> Tensor:
    """The query projection of idefics."""
    return norm_linear(t["x"], t["weight"], norm=norm(t), head_norm=Norm("rms_norm", t["head"]))


def down(t: Inputs) -> Tensor:
    """The second half, gated, in Flamingo; with the residual's norm deferred, as in a Q-Former."""
    added = {"residual": t["residual"], "gate": t["gate"]}
    return linear_residual(t["x"], t["weight"], t["bias"], residual_norm=norm(t), **added)  # type: ignore[arg-type]


def groups(t: Inputs) -> Tensor:
    """Queries and text through the networks of a Q-Former."""
    rows = t["x"].shape[1]
    sizes = (rows - rows // 3, rows // 3)
    weights, n = [t["weight"], t["gate_weight"]], norm(t)
    out = grouped_linear(t["x"], weights, sizes=sizes, input_norms=[n, n], activation="gelu")
    assert isinstance(out, Tensor)
    return out


CASES: dict[str, tuple[Op, int, int]] = {  # the op, features and width
    "up": (up, 8192, 2048),
    "gated up": (gated_up, 5504, 2048),
    "heads": (heads, 4096, 4096),
    "down": (down, 768, 3072),
    "groups": (groups, 3072, 768),
}


def draw(name: str, rows: int) -> Inputs:
    _, features, width = CASES[name]
    normed = features if name == "down" else width

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device="cuda") * scale).to(BF16)

    inputs = {"x": random(2, rows, width), "weight": random(features, width, scale=width**-0.5), "gain": random(normed)}
    if name != "gated up":
        inputs["shift"] = random(normed, scale=0.1)
    if name in ("gated up", "groups"):
        inputs["gate_weight"] = random(features, width, scale=width**-0.5)
    if name == "heads":
        inputs["head"] = random(128)
    if name == "down":
        inputs |= {"residual": random(2, rows, features), "gate": random(features), "bias": random(features)}
    return inputs


def run(op: Op, inputs: Inputs, backend: str, dtype: torch.dtype = BF16) -> list[Tensor]:
    """The output and the gradients of a fixed functional of it."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    with runtime.backend(backend):
        out = op(leaves)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, device="cuda").to(BF16).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", CASES)
def test_no_less_accurate_than_the_ops_one_by_one(name: str, rows: int) -> None:
    op, inputs = CASES[name][0], draw(name, rows)
    exact = run(op, inputs, "torch", torch.float64)
    ours, again, theirs = (run(op, inputs, backend) for backend in ("triton", "triton", "torch"))
    assert all(map(torch.equal, ours, again))
    for mine, other, reference in zip(ours, theirs, exact, strict=True):
        scale = reference.norm()
        assert (mine - reference).norm() <= 2 * (other - reference).norm() + 1e-3 * scale


@pytest.mark.parametrize("plan", ["fused", "norm apart", "vendor"])
@pytest.mark.parametrize("name", ["up", "gated up", "heads", "down"])
def test_plans(name: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, inputs = CASES[name][0], draw(name, 150)
    expected = run(op, inputs, "torch")
    monkeypatch.setattr(configs, "plan", lambda *_: plan)
    for mine, other in zip(run(op, inputs, "triton"), expected, strict=True):
        assert (mine - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("tile", range(10))
def test_each_tile(tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = configs._TILES if dtype == BF16 else configs._TILES_FP32
    if tile >= len(tiles):
        pytest.skip("fp32 has fewer tiles")
    inputs = {key: t.to(dtype) for key, t in draw("down", 77).items()}
    expected = run(down, inputs, "torch", torch.float64)[0]
    # As many stages as fit, whatever the tile.
    monkeypatch.setattr(configs, "_tiles", lambda _: (tiles[tile],))
    monkeypatch.setattr(configs, "config_for", configs.config_for.__wrapped__)
    with runtime.backend("triton"):
        ours = down(inputs)
    assert (ours - expected).norm() <= (4e-3 if dtype == BF16 else 2e-5) * expected.norm()


def test_compiled_by_inductor() -> None:
    inputs = {name: t.requires_grad_() for name, t in draw("up", 40).items()}
    torch._dynamo.reset()
    with runtime.backend("triton"):
        outs = [f(inputs) for f in (up, torch.compile(up, fullgraph=True))]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.float().square().sum(), list(inputs.values())) for out in outs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["up", "heads", "down"])
def test_autocast(name: str) -> None:
    op, inputs = CASES[name][0], {key: t.float() for key, t in draw(name, 33).items()}
    outs = []
    for backend in ("triton", "torch"):
        with runtime.backend(backend), torch.autocast("cuda", BF16):
            outs.append(op(inputs))
    assert outs[0].dtype == outs[1].dtype
    assert (outs[0] - outs[1]).norm() <= 0.02 * outs[1].norm()


def test_a_cuda_graph_replays_it() -> None:
    inputs = draw("down", 5)
    with torch.no_grad(), runtime.backend("triton"):
        expected = down(inputs)
        graph, static = torch.cuda.CUDAGraph(), {name: t.clone() for name, t in inputs.items()}
        down(static)
        with torch.cuda.graph(graph):
            out = down(static)
        static["x"].zero_()
        graph.replay()
        assert not torch.equal(out, expected)
        static["x"].copy_(inputs["x"])
        graph.replay()
    assert torch.equal(out, expected)

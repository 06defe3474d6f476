"""The attention workloads at toy sizes: the peers agree, and the work they are rated by is counted rightly."""

from __future__ import annotations

import pytest
import torch

from bench import registry
from bench.registry import OURS, WrongResultError
from bench.workloads import attention
from bench.workloads.attention import Shape

CPU = torch.device("cpu")
SHAPES = [
    Shape(7, 19, 3, 3, 16, batch=2),
    Shape(7, 19, 4, 2, 16, batch=2, extra=5),
    Shape(101, 3 * 8, 2, 2, 16, images=3),
    Shape(37, 3 * 8, 4, 2, 16, images=3),
    Shape(1, 40, 8, 2, 16),
    Shape(1, 3 * 8, 2, 2, 16, images=3),
    Shape(7, 19, 2, 2, 16, batch=3, padded=True),
]


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch):
    monkeypatch.setattr(attention, "MOST_COPIES", 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_peers_agree(shape, backward, dtype):
    with torch.set_grad_enabled(backward):
        case = attention.build(CPU, shape=shape, dtype=dtype, backward=backward)
        errors = registry.check(case)
        assert {attention.SDPA, OURS, attention.EAGER} <= set(errors)
        assert {len(calls) for calls in case.peers.values()} == {2}
        result = case.peers[OURS][1]()
    assert result.shape == (shape.batch, shape.queries, shape.heads, shape.head_dim)


def test_wrong_key_gradients_are_noticed(monkeypatch):
    right = attention._gradients

    def wrong(attend, inputs, grad):
        dq, dk, *others = right(attend, inputs, grad)
        return (dq, dk + 0.1 * (attend.__qualname__.startswith("_dispatched")), *others)

    monkeypatch.setattr(attention, "_gradients", wrong)
    with pytest.raises(WrongResultError, match="mllm_fast is off by"):
        attention.build(CPU, shape=SHAPES[0], dtype=torch.float32, backward=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_work_is_what_the_mask_leaves(shape):
    mask = attention._dense_mask(shape, CPU)
    visible = shape.queries * shape.keys if mask is None else int(mask.sum())
    visible += shape.queries * shape.extra
    assert shape.flops == 4 * shape.batch * visible * shape.heads * shape.head_dim
    keys = shape.keys if mask is None else int(mask.any(2).sum())
    assert shape.elements[1] == shape.batch * (keys + shape.extra) * shape.key_heads * shape.head_dim
    assert mask is None or mask.any(-1).all(), "a row that sees nothing is where the peers differ"


@pytest.mark.parametrize("gpu", [False, True])
def test_the_published_shapes_are_registered(monkeypatch, gpu):
    found = []
    monkeypatch.setattr(attention, "register", found.append)
    attention._register(gpu)
    assert len({w.name for w in found}) == len(found)
    assert not any(w.goals for w in found)
    sizes = {(w.shape["queries"], w.shape["keys"]) for w in found}
    assert {(32, 257), (64, 256), (64, 4900), (1, 6404)} <= sizes
    best = {w.name for w in found if w.gpu_goals == attention.BEST}
    assert best == {w.name for w in found if "qformer" in w.name or "resampler" in w.name}
    decode = {w.name for w in found if w.gpu_goals.bandwidth_share == 0.7}
    assert decode == {w.name for w in found if w.direction == "decode"}
    if not gpu:
        return
    assert {(1120, 33 * 64), (4096, 33 * 64), (512, 6404)} <= sizes
    media = ("media_openflamingo.33_images", "media_idefics.33_images")
    goals = {w.name: w.gpu_goals.speedup for w in found if attention.FLEX in w.gpu_goals.speedup}
    assert set(goals) == {f"attention.{name}.{way}.bf16" for name in media for way in ("forward", "backward")}
    assert all(goal == {attention.SDPA: 10.0, attention.FLEX: 2.0} for goal in goals.values())


def test_backward_counts_more_work_than_forward():
    found = {w.name: w for w in registry.workloads()}
    forward = found["attention.qformer.batch_1.forward.bf16"]
    backward = found["attention.qformer.batch_1.backward.bf16"]
    assert backward.shape == forward.shape
    assert backward.flops == 3.5 * forward.flops
    assert backward.nbytes == 3 * forward.nbytes


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_the_peers_that_a_gpu_adds(monkeypatch, shape, backward):
    """On a CPU they run uncompiled: this shows that they compute the same, and what happens when one cannot."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    more = {attention.COMPILED: attention._eager(shape, torch.float32, CPU, compiled=True)}
    if not backward:  # which FlexAttention lacks on a CPU
        more[attention.FLEX] = attention._flex(shape, CPU)
    peers = attention._peers

    def fails(inputs):
        raise RuntimeError("not for\nthis shape")

    def all_peers(*arguments):
        yield from peers(*arguments)
        yield from more.items()
        yield attention.XFORMERS, fails

    monkeypatch.setattr(attention, "_peers", all_peers)
    with torch.set_grad_enabled(backward):
        with pytest.warns(UserWarning, match=r"not measured: xformers \(RuntimeError: not for this shape\)"):
            case = attention.build(CPU, shape=shape, dtype=torch.float32, backward=backward)
        assert set(registry.check(case)) == {attention.SDPA, OURS, attention.EAGER, *more}


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[-1]], ids=str)
def test_who_takes_part_on_a_gpu(monkeypatch, shape):
    monkeypatch.setattr(attention, "compiles", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    peers = dict(attention._peers(shape, torch.float32, CPU, False))
    more = {attention.COMPILED}
    more |= {attention.FLEX} if shape.images else {attention.DISPATCHED}
    more |= {attention.UNREAD} if shape.padded else set()
    assert set(peers) == {attention.SDPA, OURS, attention.EAGER} | more
    case = attention.build(CPU, shape=shape, dtype=torch.float32, backward=False)
    assert set(registry.check(case)) == set(peers)

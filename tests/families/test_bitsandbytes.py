"""bitsandbytes' linear layers: what goes wrong in its own, and does not in the drop-ins; what they stay."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mllm_fast
from mllm_fast.families.bitsandbytes import FusedLinear4bit, FusedLinear8bitLt
from tests.families.quantized_layers import (
    PACKS,
    assert_equal_bytes,
    draw,
    error,
    exact,
    exact_weight,
    fused,
    gradient,
    layer4,
    layer8,
    maps,
    nested,
    packs_in_place,
    tensors,
)

# what goes wrong in bitsandbytes


@nested
def test_a_gradient_after_validation(nested: bool) -> None:
    """Forward in eval mode, then training: bitsandbytes' layer gives no gradient, and no error."""
    upstream = layer4(nested=nested, bias=False)
    ours, x = fused(upstream), draw(5, 128)
    expected = torch.ones(5, 64).double() @ exact_weight(upstream)
    ours.eval()(x)
    assert error(gradient(ours.train(), x), expected) < 5e-3
    assert error(gradient(ours.eval(), x), expected) < 5e-3
    if PACKS:
        upstream.eval()(x)
        assert gradient(upstream.train(), x) is None


@nested
def test_a_checkpoint_after_inference(nested: bool) -> None:
    upstream = layer4(nested=nested)
    ours, x = fused(upstream), draw(5, 128)
    before, expected = tensors(upstream), exact(upstream, x)
    ours.eval()(x)
    assert_equal_bytes(tensors(ours), before)
    again = fused(layer4(nested=nested, seed=5))
    again.load_state_dict(tensors(ours))
    assert_equal_bytes(tensors(again), before)
    assert torch.equal(again(x), ours.train()(x))
    if PACKS:
        upstream.eval()(x)
        written = tensors(upstream)["weight.absmax"]
        if nested:
            assert not torch.equal(written, before["weight.absmax"])  # quantised again, from rounded values
        else:
            assert (written.dtype, written.shape) == (torch.bfloat16, (2, 64))  # rounded and transposed
            again = layer4(seed=5)
            again.weight = bnb.nn.Params4bit.from_prequantized(
                tensors(upstream)["weight"],
                {k.removeprefix("weight."): v for k, v in tensors(upstream).items() if k.startswith("weight.")},
                device="cpu",
            )
            again.bias = upstream.bias
            assert error(again(x), expected) > 0.1
            with pytest.raises(mllm_fast.NothingToFuseError, match="absmax"):
                fused(again)


@pytest.mark.parametrize(("rows", "columns"), [(100, 128), (64, 96), (50, 72), (31, 32)])
def test_shapes_that_are_no_multiples(rows: int, columns: int) -> None:
    upstream = layer4(rows, columns)
    ours, x = fused(upstream), draw(3, columns)
    reference = exact(upstream, x)
    for mode in (True, False):
        assert error(ours.train(mode)(x), reference) < 5e-3
    if PACKS:
        with pytest.raises((AssertionError, RuntimeError)):
            upstream.eval()(x)


def test_blocks_that_straddle_rows() -> None:
    """On CPUs with AVX512 bitsandbytes takes some scales from the wrong blocks, in train mode too."""
    generator = torch.Generator().manual_seed(0)
    upstream, weight = layer4(64, 96, bias=False), torch.randn(64, 96, generator=generator) * 96**-0.5
    ours, x = fused(upstream), draw(3, 96)
    assert error(ours(x), F.linear(x, weight.bfloat16()).double()) < 0.15  # NF4's own error
    if PACKS:
        assert error(upstream(x), F.linear(x, weight.bfloat16()).double()) > 0.15


def test_fp32_is_computed_in_fp32() -> None:
    upstream = layer4(compute_dtype=torch.float32, dtype=torch.float32)
    ours, x = fused(upstream), draw(4, 128, dtype=torch.float32)
    reference = exact(upstream, x)
    for mode in (True, False):
        assert error(ours.train(mode)(x), reference) < 1e-6
    if PACKS:
        assert error(upstream.eval()(x), reference) > 1e-3


@nested
@maps
def test_strict_loading_of_its_own_checkpoint(nested: bool, quant_type: str) -> None:
    upstream = layer4(nested=nested, quant_type=quant_type)
    other = layer4(nested=nested, quant_type=quant_type, seed=7)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        copy.deepcopy(other).load_state_dict(upstream.state_dict())
    ours, x = fused(other), draw(3, 128)
    cached = ours.eval()(x)
    result = ours.load_state_dict(upstream.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_equal_bytes(tensors(ours), tensors(upstream))
    assert torch.equal(ours.train()(x), fused(upstream).train()(x))
    assert error(ours.eval()(x), exact(upstream, x)) < 5e-3  # no stale copy of the weight
    assert not torch.equal(ours(x), cached)
    upstream.weight.data.zero_()
    assert ours(x).abs().sum() > 0  # loaded, not shared
    nn.ModuleDict({"inner": ours}).load_state_dict(nn.ModuleDict({"inner": fused(other)}).state_dict())


@nested
def test_loading_by_assignment(nested: bool) -> None:
    x = draw(3, 128)
    for upstream, other in ((layer4(nested=nested), layer4(nested=nested, seed=7)), (layer8(), layer8(seed=7))):
        ours = fused(other)
        ours(x)
        ours.load_state_dict(tensors(upstream), assign=True)
        assert type(ours.weight) is type(upstream.weight)
        assert_equal_bytes(tensors(ours), tensors(upstream))
        assert torch.equal(ours(x), fused(upstream)(x))
        assert torch.equal(copy.deepcopy(ours)(x), ours(x))
        mllm_fast.unfuse(ours)
        assert torch.equal(ours.train()(x), upstream.train()(x))


def test_int8_loads_after_it_has_run() -> None:
    upstream, other, x = layer8(bias=False), layer8(seed=7, bias=False), draw(3, 128)
    checkpoint = tensors(upstream)
    other.train()(x)
    with pytest.raises(RuntimeError, match="non-quantized"):
        copy.deepcopy(other).load_state_dict(checkpoint)
    ours = fused(other)
    ours(x)
    ours.load_state_dict(checkpoint)
    assert_equal_bytes(tensors(ours), checkpoint)
    assert torch.equal(ours(x), fused(upstream)(x))


@nested
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break(nested: bool, training: bool) -> None:
    for upstream in (layer4(nested=nested), layer8()):
        ours, x = fused(upstream).train(training), draw(3, 128)
        torch.compiler.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), ours.train()(x), atol=0.02, rtol=0.02)
        torch.testing.assert_close(gradient(compiled, x), gradient(ours, x), atol=0.02, rtol=0.02)
    explained = torch._dynamo.explain(layer8().eval())(draw(3, 128))
    assert explained.graph_break_count > 0
    torch.compiler.reset()


def test_packed_bytes_are_no_numbers() -> None:
    """With quant_storage=bf16 the packed bytes look like floating point to Module.to."""
    upstream = layer4(storage=torch.bfloat16, bias=False)
    ours, x = fused(upstream), draw(3, 128)
    expected, before = ours(x), ours.weight.data.clone()
    for cast in (nn.Module.half, nn.Module.float, nn.Module.double, lambda m: m.to(torch.float16)):
        cast(ours)
        assert ours.weight.dtype == torch.bfloat16
        assert torch.equal(ours.weight.data.view(torch.uint8), before.view(torch.uint8))
        assert torch.equal(ours(x), expected)
    upstream.half()
    assert upstream.weight.dtype == torch.float16  # other bytes


@packs_in_place
@nested
def test_a_model_that_bitsandbytes_has_packed_already(nested: bool) -> None:
    upstream = layer4(nested=nested)
    x = draw(5, 128)
    expected, codes = exact(upstream, x), tensors(upstream)["weight"]
    upstream.eval()(x)
    with pytest.warns(UserWarning, match="rounded the scales"):
        mllm_fast.fuse(upstream)
    assert torch.equal(upstream.state_dict()["weight"], codes)
    for mode in (True, False):
        assert error(upstream.train(mode)(x), expected) < 5e-3
    again = fused(layer4(seed=3))
    again.load_state_dict(upstream.state_dict())
    assert torch.equal(again.train()(x), upstream.train()(x))


# what a swapped layer stays


def test_it_stays_the_module_that_it_was() -> None:
    for upstream, dropin in ((layer4(), FusedLinear4bit), (layer8(), FusedLinear8bitLt)):
        before = tensors(upstream)
        ours = copy.deepcopy(upstream)
        report = mllm_fast.fuse(ours)
        assert [row.now for row in report.fused] == [dropin.__qualname__]
        assert type(ours) is dropin
        assert isinstance(ours, type(upstream))
        assert type(ours).__name__ == type(upstream).__name__
        assert_equal_bytes(tensors(ours), before)
        assert mllm_fast.fuse(ours).fused == []
        mllm_fast.unfuse(ours)
        assert type(ours) is type(upstream)
        assert vars(ours).keys() == vars(upstream).keys()
        x = draw(3, 128)
        assert torch.equal(ours.train()(x), upstream.train()(x))


def test_copies() -> None:
    for upstream in (layer4(nested=True), layer8()):
        ours, x = fused(upstream), draw(3, 128)
        expected = ours.eval()(x)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), _saved(ours)):
            assert type(twin) is type(ours)
            assert torch.equal(twin(x), expected)
            twin.weight.data.zero_()
        assert torch.equal(ours(x), expected)


def _saved(layer: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_lazy_subclasses() -> None:
    """`LinearNF4` and FSDP's classes made at run time are served as well."""
    layer = bnb.nn.LinearNF4(128, 64, compute_dtype=torch.bfloat16).to("cpu")
    mllm_fast.fuse(layer)
    assert isinstance(layer, FusedLinear4bit)
    assert isinstance(layer, bnb.nn.LinearNF4)
    x = draw(2, 128)
    assert error(layer(x), exact(layer, x)) < 5e-3


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: bnb.nn.Linear4bit(64, 32), "not quantised yet"),
        (lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False), "not quantised yet"),
        (lambda: bnb.nn.Linear8bitLt(64, 32), "kept in 16 bit"),
        (lambda: _transposed(), "not as \\[out, in\\]"),
    ],
)
def test_what_cannot_be_served_is_left_alone(make: Any, reason: str) -> None:
    layer = make()
    with pytest.raises(mllm_fast.NothingToFuseError, match=reason):
        mllm_fast.fuse(layer)
    assert "_mllm_fast" not in vars(layer)


def _transposed() -> nn.Module:
    layer = layer4(64, 128)
    layer.weight.quant_state.shape = torch.Size((128, 64))
    return layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("weight"), "Missing key"),
        (lambda c: [c.pop(k) for k in list(c) if k.startswith("weight.")], "without absmax"),
        (lambda c: c.pop("weight.absmax"), "the checkpoint has"),
        (lambda c: c.update(weight=torch.zeros(64, 128)), "expected"),
        (lambda c: c.update(tensors(layer4(128, 64))), "expected \\[64, 128\\]"),
        (lambda c: c.update({"weight.surplus": torch.zeros(1)}), "the checkpoint has"),
    ],
)
def test_checkpoints_that_do_not_fit(change: Any, message: str) -> None:
    ours, x = fused(layer4()), draw(2, 128)
    expected, checkpoint = ours(x), tensors(layer4(seed=4))
    change(checkpoint)
    with pytest.raises(RuntimeError, match=message):
        ours.load_state_dict(checkpoint)
    assert torch.equal(ours(x), expected)


def test_int8_checkpoints_that_do_not_fit() -> None:
    ours = fused(layer8())
    for change in ({"weight": torch.zeros(64, 128)}, {"SCB": torch.zeros(3)}):
        with pytest.raises(RuntimeError, match="expected int8"):
            ours.load_state_dict(tensors(ours) | change)

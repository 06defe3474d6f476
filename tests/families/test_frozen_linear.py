"""The computation of swapped quantised layers: error, dtypes, maps, and the private copy for CPU inference."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mllm_fast
from mllm_fast.families.bitsandbytes import CPU_ROWS
from tests.families.quantized_layers import (
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

# the computation


@nested
@maps
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_fp32_is_the_dequantised_product(nested: bool, quant_type: str, blocksize: int) -> None:
    upstream = layer4(48, 256, nested=nested, quant_type=quant_type, blocksize=blocksize, compute_dtype=torch.float32)
    ours, x = fused(upstream), draw(2, 3, 256, dtype=torch.float32)
    assert error(ours(x), exact(upstream, x)) < 1e-6
    expected = torch.ones(2, 3, 48).double() @ exact_weight(upstream)
    assert error(gradient(ours, x), expected) < 1e-6


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_storage_dtypes(storage: torch.dtype) -> None:
    upstream = layer4(storage=storage)
    ours, x = fused(upstream), draw(3, 128)
    for mode in (True, False):
        assert error(ours.train(mode)(x), exact(upstream, x)) < 5e-3
    assert_equal_bytes(tensors(ours), tensors(upstream))


@pytest.mark.parametrize("rows", [1, 3, 40, CPU_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["nf4", "nested", "fp4", "int8"])
def test_half_precision(kind: str, dtype: torch.dtype, rows: int) -> None:
    """At most twice the error of bitsandbytes' layer in train mode, which dequantises and multiplies."""
    theirs: dict[str, list[float]] = {"forward": [], "gradient": []}
    mine: dict[str, list[float]] = {"train": [], "eval": [], "gradient": []}
    for seed in range(4):
        upstream: Any = layer8(seed=seed) if kind == "int8" else layer4(
            seed=seed, nested=kind == "nested", quant_type="fp4" if kind == "fp4" else "nf4", compute_dtype=dtype
        )  # fmt: skip
        ours, x = fused(upstream), draw(rows, 128, dtype=dtype, seed=seed)
        reference = exact(upstream, x)
        with torch.no_grad():
            mine["train"].append(error(ours.train()(x), reference))
            mine["eval"].append(error(ours.eval()(x), reference))
            theirs["forward"].append(error(upstream.train()(x), reference))
        expected = torch.ones(rows, 64).double() @ exact_weight(upstream)
        theirs["gradient"].append(error(gradient(upstream.train(), x), expected))
        mine["gradient"].append(error(gradient(ours.train(), x), expected))
    for name, errors in mine.items():
        assert sum(errors) <= 2 * sum(theirs["gradient" if name == "gradient" else "forward"]), name


def test_the_map_of_the_checkpoint_is_honoured() -> None:
    """A checkpoint brings its own map; bitsandbytes takes the one that it has for the name."""
    upstream = layer4(compute_dtype=torch.float32)
    checkpoint = tensors(upstream)
    checkpoint["weight.quant_map"] = torch.linspace(-1, 1, 16)
    ours, x = fused(upstream), draw(3, 128, dtype=torch.float32)
    ours.load_state_dict(checkpoint)
    codes = checkpoint["weight"].flatten()
    codes = torch.stack((codes >> 4, codes & 15), -1).view(64, 128)
    weight = checkpoint["weight.quant_map"][codes.int()] * checkpoint["weight.absmax"].view(64, 2).repeat_interleave(
        64, 1
    )
    reference = F.linear(x.double(), weight.double(), ours.bias.double())
    for mode in (True, False):
        assert error(ours.train(mode)(x), reference) < 1e-6
    ours.compute_dtype = torch.bfloat16
    for mode in (True, False):
        assert error(ours.train(mode)(x), reference) < 5e-3
    assert error(upstream.train()(x), reference) > 0.1


def test_compute_dtype() -> None:
    """As set; otherwise that of each input, where bitsandbytes keeps to the first."""
    x = draw(3, 128, dtype=torch.float32)
    ours = fused(layer4(compute_dtype=torch.bfloat16))
    assert ours(x).dtype == torch.float32
    assert torch.equal(ours(x), ours(x.bfloat16()).float())
    free = fused(layer4(compute_dtype=None))
    assert error(free(x), exact(free, x)) < 1e-6
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert free(x.to(dtype)).dtype == dtype
    assert error(free.eval()(x), exact(free, x)) < 1e-6
    assert error(free(x.double()), exact(free, x)) < 1e-6
    assert ours.bias.dtype == torch.bfloat16  # bitsandbytes casts it in place
    with torch.autocast("cpu", torch.bfloat16):
        assert free(x).dtype == torch.float32


def test_empty_and_strided_inputs() -> None:
    for ours in (fused(layer4()), fused(layer4()).eval(), fused(layer8())):
        assert ours(draw(0, 128)).shape == (0, 64)
        x = draw(4, 6, 256)[:, ::2, :128]
        torch.testing.assert_close(ours(x), ours(x.contiguous()))
        row = draw(1, 1, 128).expand(5, 2, 128)
        torch.testing.assert_close(ours(row), ours(row.contiguous()))


def test_int8_as_bitsandbytes_computes_it() -> None:
    from mllm_fast.modules.frozen_linear import FrozenLinearSpec

    upstream = layer8().eval()
    ours, x = fused(upstream), draw(7, 128, dtype=torch.float16)
    x[2, 5] = 20.0
    reference = exact(upstream, x)
    assert error(ours(x), reference) < error(upstream(x), reference)
    ours._mllm_fast.spec = FrozenLinearSpec("llm_int8", 6.0)
    assert torch.equal(ours(x), upstream(x)), "not the bits of LLM.int8"


# the private copy for the CPU


@packs_in_place
def test_a_private_copy_while_it_infers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = fused(layer4(nested=True)), draw(3, 128)
    before, calls = tensors(ours), _count(monkeypatch)
    ours.eval()(x)
    assert len(calls) == 1
    packed = ours._mllm_fast.derived._entries["cpu"][1]
    assert packed.packed.nbytes + packed.absmax.nbytes == 64 * 128 // 2 + 64 * 128 // 64 * 2
    ours(x)
    assert ours._mllm_fast.derived._entries["cpu"][1] is packed
    assert_equal_bytes(tensors(ours), before)
    ours(draw(CPU_ROWS + 1, 128))
    gradient(ours, x)
    with mllm_fast.backend("torch"):
        ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        ours(x)
    ours.compute_dtype = torch.float32
    ours(x)
    assert len(calls) == 2
    ours.train()(x)
    assert not ours._mllm_fast.derived._entries  # given up
    assert len(calls) == 2


@packs_in_place
def test_the_copy_follows_the_weight() -> None:
    ours, other, x = fused(layer4()).eval(), layer4(seed=9), draw(3, 128)
    ours(x)
    ours.weight = copy.deepcopy(other.weight)  # as PEFT's merge does
    ours.bias = copy.deepcopy(other.bias)
    assert error(ours(x), exact(other, x)) < 5e-3
    ours.weight.data.copy_(layer4().weight.data)
    ours.weight.quant_state.absmax.copy_(layer4().weight.quant_state.absmax)
    ours.bias = copy.deepcopy(layer4().bias)
    with torch.no_grad():
        ours.weight.add_(0)
    assert error(ours(x), exact(layer4(), x)) < 5e-3


def _count(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from mllm_fast.families import bitsandbytes

    calls: list[Any] = []
    original = bitsandbytes.cpu_linear

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(bitsandbytes, "cpu_linear", counted)
    return calls


def test_moving_drops_what_was_made_of_the_bytes() -> None:
    ours, x = fused(layer4()).eval(), draw(3, 128)
    ours(x)
    ours.to("cpu")
    assert ours._mllm_fast.weight is None
    assert not ours._mllm_fast.derived._entries
    assert error(ours(x), exact(ours, x)) < 5e-3
    whole = fused(layer8())
    whole.to(torch.float16)
    assert error(whole(x), exact(whole, x)) < 5e-3


def test_the_decoder_gives_the_bits_of_the_definition() -> None:
    from mllm_fast.kernels.quantized_linear import dequantize

    for quant_type in ("nf4", "fp4"):
        for blocksize in (32, 64, 1024):
            ours = fused(layer4(16, 1024, quant_type=quant_type, blocksize=blocksize))
            weight = ours.frozen_weight()
            assert weight.decoder is not None
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                plain = copy.copy(weight)
                object.__setattr__(plain, "decoder", None)
                assert torch.equal(dequantize(weight, dtype), dequantize(plain, dtype))
    assert fused(layer4(16, 4096, blocksize=4096)).frozen_weight().decoder is None


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fused(layer4())
        ours.eval()(draw(2, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "nested", "fp4", "int8"])
def test_on_a_gpu_and_back(kind: str) -> None:
    upstream: Any = (
        layer8() if kind == "int8" else layer4(nested=kind == "nested", quant_type="fp4" if kind == "fp4" else "nf4")
    )
    ours, before = fused(upstream), tensors(upstream)
    reference = {rows: exact(upstream, draw(rows, 128)) for rows in (1, 7, 300)}
    slope = exact_weight(upstream)
    for device in ("cuda", "cpu", "cuda"):
        ours.to(device)
        for rows, expected in reference.items():
            x = draw(rows, 128).to(device)
            for mode in (True, False):
                assert error(ours.train(mode)(x).detach().cpu(), expected) < 5e-3
            given = gradient(ours, x)
            assert given is not None
            assert error(given.cpu(), torch.ones(rows, 64).double() @ slope) < 5e-3
        assert_equal_bytes({name: value.cpu() for name, value in tensors(ours).items()}, before)

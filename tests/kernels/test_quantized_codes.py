"""The table look-up by byte permutation, instruction by instruction, and what the kernels compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels import ptx
from tests.kernels.quantized_weights import nf4_map

codes = pytest.importorskip("mllm_fast.kernels.quantized_linear.triton_codes")

ROOT = Path(__file__).parents[2]


def looked_up(words: Tensor, code: Tensor, dtype: torch.dtype, assembly: Any, constraints: Any, *scale: Any) -> Tensor:
    """[words, 8] numbers, as the assembly finds them."""
    entries = code.to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    table = []
    for shift in (0, 8):
        for first in (0, 4, 8, 12):
            some = (entries[first : first + 4] >> shift) & 0xFF
            table.append(np.full(len(words), sum(int(b) << (8 * j) for j, b in enumerate(some)), np.uint32))
    arguments = [words.numpy(), *table, *scale]
    pairs = np.stack(ptx.run(assembly.value, constraints.value, arguments), 1)
    return torch.from_numpy(pairs.view(np.uint16).astype(np.int32).astype(np.int16)).view(dtype)


def expected(words: Tensor, code: Tensor) -> Tensor:
    """[words, 8] numbers, by definition: of each byte the high nibble first."""
    packed = words.view(torch.uint8).view(-1, 4).int()
    return code[torch.stack((packed >> 4, packed & 15), -1)].flatten(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "any"])
class TestPermutation:
    def draw(self, kind: str) -> tuple[Tensor, Tensor]:
        words = torch.randint(-(2**31), 2**31 - 1, (3000,), dtype=torch.int32)
        return words, nf4_map() if kind == "nf4" else torch.randn(16)

    def test_every_code(self, kind: str, dtype: torch.dtype) -> None:
        words, code = self.draw(kind)
        found = looked_up(words, code, dtype, codes.PRMT, codes.PRMT_CONSTRAINTS)
        assert torch.equal(found, expected(words, code).to(dtype))

    def test_scaled_in_fp32_and_rounded_once(self, kind: str, dtype: torch.dtype) -> None:
        words, code = self.draw(kind)
        scale = torch.rand(len(words)) + 0.01
        assembly = codes.PRMT_SCALED_BF16 if dtype == torch.bfloat16 else codes.PRMT_SCALED_FP16
        found = looked_up(words, code, dtype, assembly, codes.PRMT_SCALED_CONSTRAINTS, scale.numpy())
        assert torch.equal(found, (expected(words, code.to(dtype).float()) * scale[:, None]).to(dtype))


# Instructions per element of W. bitsandbytes 0.50 takes 8.7 for one row and 20.3 for four.
BUDGETS = {
    "product_tiles bfloat16, 1 rows, 4 bit in 64": 7,
    "product_tiles bfloat16, 32 rows, 4 bit in 64": 7,
    "product_tiles bfloat16, 64 rows, 4 bit in 64": 7,
    "product_tiles bfloat16, 1 rows, 4 bit in 64, nested": 7,
    "product_tiles bfloat16, 256 rows, 4 bit in 64": 11,
    "product_tiles bfloat16, 1 rows, int8": 7,
    "gradient_tiles bfloat16, 1 rows, 4 bit in 64": 7,
    "gradient_tiles bfloat16, 64 rows, 4 bit in 64": 11,
    "gradient_tiles bfloat16, 256 rows, 4 bit in 64": 11,
    "gradient_tiles bfloat16, 256 rows, 4 bit in 64, nested": 11,
    "gradient_tiles bfloat16, 256 rows, int8": 11,
}
AUDIT = """
import json, sys
from mllm_fast.kernels import audit, launch
from mllm_fast.kernels.quantized_linear import variants
wanted, found = set(json.loads(sys.argv[1])), {}
architecture = launch.ARCHITECTURES["sm_90"]
for variant in variants.variants(architecture):
    name = f"{variant.kernel.fn.__name__} {variant.label.rpartition(', ')[0]}"
    if name in wanted:
        row = audit.inspect_variant("quantized_linear", variant, architecture)
        found[name] = [row.instructions_per_element, row.tensor_core, row.failures]
print(json.dumps(found))
"""


def test_instructions_on_sm_90(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", AUDIT, json.dumps(list(BUDGETS))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == BUDGETS.keys()
    for name, (instructions, tensor_core, failures) in found.items():
        assert failures == [] and list(tensor_core) == ["wgmma"], name
        assert instructions <= BUDGETS[name], f"{name}: {instructions:.1f}"

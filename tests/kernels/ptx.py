"""Runs the few PTX instructions of the table look-ups on numpy arrays, and inline assembly in Triton's interpreter."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

Registers = dict[str, Any]  # name -> uint32, float32 or uint16 array


def run(assembly: str, constraints: str, arguments: list[np.ndarray]) -> list[np.ndarray]:
    """The output registers of inline assembly, as uint32.

    Args:
        assembly: statements; $0, $1, ... are the outputs, then the inputs.
        constraints: as LLVM writes them; outputs start with "=".
        arguments: of one shape, integers or float32.
    """
    outputs = constraints.count("=")
    registers: Registers = {}
    for number, argument in enumerate(arguments, outputs):
        register = argument if argument.dtype == np.float32 else argument.astype(np.int64).astype(np.uint32)
        registers[f"${number}"] = register
    for statement in assembly.strip().removeprefix("{").removesuffix("}").split(";"):
        if (statement := statement.strip()) and not statement.startswith(".reg"):
            opcode, operands = statement.split(None, 1)
            _step(registers, opcode, [o.strip() for o in re.findall(r"\{[^}]*\}|[^,{}]+", operands) if o.strip()])
    return [registers[f"${number}"] for number in range(outputs)]


def _step(registers: Registers, opcode: str, operands: list[str]) -> None:
    target, *names = operands
    values = [registers[name] if name in registers else np.uint32(int(name, 0)) for name in names]
    if target.startswith("{"):  # a register taken apart
        assert opcode == "mov.b32"
        low, high = (name.strip() for name in target.strip("{}").split(","))
        registers[low], registers[high] = (values[0] & 0xFFFF).astype(np.uint16), (values[0] >> 16).astype(np.uint16)
        return
    registers[target] = _result(opcode, values, wants_float=target in ("x", "y"))


def _result(opcode: str, values: list[Any], wants_float: bool) -> Any:
    match opcode:
        case "mov.b32":
            return values[0].view(np.float32) if wants_float else values[0]
        case "and.b32":
            return values[0] & values[1]
        case "shl.b32":
            return values[0] << values[1]
        case "shr.u32":
            return values[0] >> values[1]
        case "mul.f32":
            return values[0] * values[1]
        case "prmt.b32":
            return _permute(*values)
        case "lop3.b32":
            return _logic(*values)
        case "cvt.f32.f16":
            return values[0].view(np.float16).astype(np.float32)
        case "cvt.rn.f16x2.f32":
            return _pair(*values, torch.float16)
        case "cvt.rn.bf16x2.f32":
            return _pair(*values, torch.bfloat16)
    raise NotImplementedError(opcode)


def _permute(a: Any, b: Any, selector: Any) -> Any:
    """Byte i of the result is that of b:a which nibble i names; its top bit would replicate the sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        assert (nibble < 8).all()
        byte = (both >> (nibble.astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _logic(a: Any, b: Any, c: Any, table: Any) -> Any:
    """Each bit is that of `table` which the bits of a, b and c name."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for index in range(8):
        if int(table) >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def _pair(upper: Any, lower: Any, dtype: torch.dtype) -> Any:
    halves = [
        torch.from_numpy(np.array(x, np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        for x in (lower, upper)
    ]
    return halves[0] | (halves[1] << np.uint32(16))


class InlineAssembly:
    """What the builder of Triton's interpreter returns for inline assembly, of which it knows nothing itself."""

    def __init__(self, results: list[Any]) -> None:
        self.results = results

    def get_result(self, index: int) -> Any:
        """Of several results."""
        return self.results[index]


def create_inline_asm(
    self: Any, assembly: str, constraints: str, handles: list[Any], types: list[Any], is_pure: bool, pack: int
) -> InlineAssembly:
    """In place of `InterpreterBuilder.create_inline_asm`."""
    from triton.runtime.interpreter import TensorHandle

    assert pack == 1
    found = run(assembly, constraints, [h.data for h in handles])
    return InlineAssembly([TensorHandle(r, t.scalar) for r, t in zip(found, types, strict=True)])

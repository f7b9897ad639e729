"""Vectors of float32 in LLVM's language, for the kernels that are written in it: `tiles` and `head_products`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

LANES = 16  # numbers of a cache line, and of AVX-512's registers; LLVM divides vectors where registers are narrower
NUMBER_BYTES = 4
FLOAT, INT = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
_INDEX = ir.IntType(32)


def load(builder: ir.IRBuilder, address: Any, kind: Any) -> Any:
    """What is at an address: `FLOAT` or `VECTOR`."""
    return builder.load(_pointer(builder, address, kind), align=NUMBER_BYTES)


def store(builder: ir.IRBuilder, value: Any, address: Any) -> None:
    """Write a number or a vector to an address."""
    builder.store(value, _pointer(builder, address, value.type), align=NUMBER_BYTES)


def splat(builder: ir.IRBuilder, number: Any) -> Any:
    """A number in all lanes."""
    nothing = ir.Constant(VECTOR, ir.Undefined)
    lane = builder.insert_element(nothing, number, _INDEX(0))
    return builder.shuffle_vector(lane, nothing, ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES))


def multiply_add(builder: ir.IRBuilder, left: Any, right: Any, sums: Any) -> Any:
    """left · right + sums, rounded once where the processor can: elsewhere that would be a call for each number."""
    kind = sums.type
    name = "llvm.fmuladd.f32" if isinstance(kind, ir.FloatType) else f"llvm.fmuladd.v{LANES}f32"
    function = get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [left, right, sums])


def _pointer(builder: ir.IRBuilder, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())

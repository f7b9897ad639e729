"""What compiled kernels share: how they are compiled, and what LLVM has and numba has no name for.

numba compiles them when they are first imported and keeps the result beside them (or where `NUMBA_CACHE_DIR` says).
It compiles a function anew when its file has changed, not when that of another one has which the function calls. So the
names under which it keeps them have a digest of all files with kernels in them.

A kernel's arguments are a record, or several, whose first field, `taken`, counts the units of work that threads have
taken.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

logger = logging.getLogger("medley.kernels")


def can_keep() -> bool:
    """Whether there is a folder for what numba compiles."""
    try:
        njit(cache=True)(can_keep)
    except RuntimeError as error:
        logger.warning("kernels are compiled at every start; set NUMBA_CACHE_DIR to a folder for them: %s", error)
        return False
    return True


# Sums may be reordered, which lets them use the processor's vectors; NaN and infinity keep their meaning.
COMPILED: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "arcp", "nsz", "afn"},
    "error_model": "numpy",
    "cache": can_keep(),
}

_FILES = (
    "activations.py",
    "compiled.py",
    "decode_kernel.py",
    "delta_kernels.py",
    "head_products.py",
    "layer_kernels.py",
    "program_kernels.py",
    "tiles.py",
    "vectors.py",
)
_SOURCES = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _FILES)).hexdigest()[:16]


def inlined(function: Any, **options: Any) -> Any:
    """A function that kernels call; `options` are numba's, where they are others."""
    return njit(**{**COMPILED, **options})(_versioned(function))


def kernel(pointer: Any) -> Callable[[Any], Any]:
    """A function that threads run, `void(record *)`; `pointer` is the type of its argument."""

    def compiled(function: Any) -> Any:
        compile_or_load = cfunc(types.void(pointer), **COMPILED)
        versioned = _versioned(function)
        try:
            return compile_or_load(versioned)
        except Exception:
            if not COMPILED["cache"]:
                raise
            _forget_kept(versioned)  # a damaged file may raise anything
            return compile_or_load(versioned)

    return compiled


def _versioned(function: Any) -> Any:
    # of a closure numba would keep one more result at every start, and find none of them again
    assert function.__closure__ is None, f"{function.__qualname__} refers to a variable of the function around it"
    function.__qualname__ += f".{_SOURCES}"
    return function


def _forget_kept(function: Any) -> None:
    """Remove what numba keeps of all kernels: a lost power supply may leave files of which only the names were written,
    and numba reads them without a check."""
    folder = Path(njit(**COMPILED)(function).stats.cache_path)
    for path in folder.glob(f"*.{_SOURCES}-*"):
        path.unlink(missing_ok=True)


# Of "LLVM Language Reference", llvm.prefetch: into the cache from the second level on, to be read, as data.
_SECOND_LEVEL = 2


@intrinsic  # type: ignore[untyped-decorator]
def take_unit(typing_context: Any, call: Any) -> Any:
    """The number of the next unit of work: an atomic addition to the record's first field."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(call), generate


def pointer_to(element: Any) -> Any:
    """What makes a pointer to such elements of an address."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(element)))

        return types.CPointer(element)(types.int64), generate

    return pointer


def prefetched(builder: ir.IRBuilder, address: Any) -> None:
    """Have code ask for the cache line at an address; whatever is there, or nothing."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    number = ir.IntType(32)
    function = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
    called = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], function)
    builder.call(called, [pointer, number(0), number(_SECOND_LEVEL), number(1)])


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@partial(inlined, fastmath={"contract"})  # sums in their order
def exponential(x: Any) -> Any:
    """eˣ in float32 to within 2 ulp, in operations that a loop's vectors have; below -87.3 that of -87.3, above 88.3
    infinity.

    x = n ln 2 + r, |r| ≤ ln 2 / 2, and eˣ = 2ⁿ eʳ by Taylor's polynomial; ln 2 is subtracted in two parts, of which the
    first has so few digits that n times it is exact (Cody and Waite 1980).
    """
    bounded = np.float32(-87.3) if x < np.float32(-87.3) else x
    bounded = np.float32(88.3) if bounded > np.float32(88.3) else bounded
    power = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
    r = (bounded - power * np.float32(0.693359375)) + power * np.float32(2.12194440e-4)
    result = np.float32(1 / 5040) * r + np.float32(1 / 720)
    result = result * r + np.float32(1 / 120)
    result = result * r + np.float32(1 / 24)
    result = result * r + np.float32(1 / 6)
    result = result * r + np.float32(1 / 2)
    result = result * r + np.float32(1)
    result = result * r + np.float32(1)
    result = result * _float_of_bits((np.int32(power) + np.int32(127)) << np.int32(23))
    return np.float32(np.inf) if x > np.float32(88.3) else result


@intrinsic  # type: ignore[untyped-decorator]
def clock(typing_context: Any) -> Any:
    """The processor's clock, in cycles of its own since some time."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.IntType(64), [])
        return builder.call(get_or_insert_function(builder.module, function, "llvm.readcyclecounter"), [])

    return types.int64(), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_to(typing_context: Any, address: Any, number: Any) -> Any:
    """An atomic addition to the 64-bit number at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("add", place, arguments[1], "monotonic")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def call_address(typing_context: Any, address: Any) -> Any:
    """Call the function at an address, `void()`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), []).as_pointer()
        builder.call(builder.inttoptr(arguments[0], function), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


floats, integers = pointer_to(types.float32), pointer_to(types.int64)
"""From an address to the numbers there."""

"""What compiled kernels share: how they are compiled, and the threads that run them.

numba compiles them when they are first imported and keeps the result beside them (or where `NUMBA_CACHE_DIR` says).
They run on the threads of the GNU OpenMP that torch has loaded, by `GOMP_parallel` (its interface: "libgomp ABI", GCC's
manual). Threads of our own would share their cores with those, which go on spinning between two of torch's operations:
measured on two cores, attention of a step took 34 ms so in place of 20.

What numba keeps it compiles anew when the file of a function has changed, not when that of another one has which the
function calls. So the names under which it keeps them have a digest of all files with kernels in them.

A kernel's arguments are a record, or several, whose first field, `taken`, counts the units of work that threads have
taken.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

# Sums may be reordered, which lets them use the processor's vectors; NaN and infinity keep their meaning.
COMPILED: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "arcp", "nsz", "afn"},
    "error_model": "numpy",
    "cache": True,
}

_FILES = (
    "compiled.py",
    "decode_kernel.py",
    "delta_kernels.py",
    "layer_kernels.py",
    "program_kernels.py",
    "tiles.py",
)
_SOURCES = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _FILES)).hexdigest()[:16]


def inlined(function: Any) -> Any:
    """A function that kernels call."""
    return njit(**COMPILED)(_versioned(function))


def kernel(pointer: Any) -> Callable[[Any], Any]:
    """A function that threads run, `void(record *)`; `pointer` is the type of its argument."""
    return lambda function: cfunc(types.void(pointer), **COMPILED)(_versioned(function))


def _versioned(function: Any) -> Any:
    function.__qualname__ += f".{_SOURCES}"
    return function


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
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetched(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(**{**COMPILED, "fastmath": {"contract"}})  # type: ignore[untyped-decorator]  # sums in their order
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
def call_at(typing_context: Any, address: Any) -> Any:
    """Call the function at an address, `void()`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), []).as_pointer()
        builder.call(builder.inttoptr(arguments[0], function), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


floats, integers = pointer_to(types.float32), pointer_to(types.int64)
"""From an address to the numbers there."""


class TorchThreads:
    """The threads of torch's OpenMP."""

    def __init__(self) -> None:
        """Raises `OSError` where torch has not loaded GNU OpenMP."""
        openmp = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        self._parallel = openmp.GOMP_parallel
        self._parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._parallel.restype = None
        self.barrier = ctypes.cast(openmp.GOMP_barrier, ctypes.c_void_p).value or 0
        """Address of the function in which a kernel's threads wait until all of them have come."""

    def run(self, kernel: Any, record: int, pieces: int) -> None:
        """Run a compiled function, `void(record *)`, on all of them, and wait; a single piece of work on this one.

        `record` is an address. Not on some of them: GNU OpenMP then ends the others, and starts them anew next time.
        """
        self._parallel(kernel.address, record, torch.get_num_threads() if pieces > 1 else 1, 0)

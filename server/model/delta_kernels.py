"""The commonest row deltas, each token with its own adapter's rows, read where they lie in the pool.

Compiled, for CPUs, in float32.

torch's operations want the rows of all tokens side by side, and copying them there costs several times what is then
computed with them. Tokens are taken one after the other by whichever thread is free.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial
from struct import Struct
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from server.model.compiled import floats, inlined, integers, kernel, take_unit
from server.model.row_deltas import Blocks, DeltaKind, Kernel, Rows, TokenRows
from server.model.threads import TorchThreads

_FIELDS = (
    "taken",  # tokens
    "count",
    "start",  # the first token, where all are neighbours
    "tokens",  # this and every other field that is named as a tensor: its address; 0 where all are neighbours
    "inputs",
    "input_stride",  # from token to token
    "input_width",
    "outputs",
    "output_stride",
    "output_width",
    "pool",
    "rank",  # rows of a block
    "index",  # [tokens, rank]: each token's rows in the pool, seen as rows of the first block's width; 0 where all have
    "first",  # those of one adapter, from this one on
    "index_stride",  # from token to token
    "index_step",  # from row to row
    "second_index",
    "second_first",
    "second_stride",
    "second_step",
)

_RECORD = Struct(f"{len(_FIELDS)}q")
DELTA = np.dtype([(name, np.int64) for name in _FIELDS])
"""What a kernel is told."""
_CALL_POINTER = types.CPointer(numba.from_dtype(DELTA))
COUNT = _FIELDS.index("count")
"""Its place in `delta_call`."""


@inlined
def _token(call: Any, unit: int) -> Any:
    return integers(call.tokens)[unit] if call.tokens != 0 else call.start + unit


@inlined
def _output(call: Any, unit: int) -> Any:
    return carray(floats(call.outputs + 4 * _token(call, unit) * call.output_stride), call.output_width)


@inlined
def _row(call: Any, place: Any, unit: int, rank: int, width: int) -> Any:
    """One of a token's rows of a block: `[width]`."""
    index, first, stride, step = place
    row = integers(index)[unit * stride + rank * step] if index != 0 else first + rank
    return carray(floats(call.pool + 4 * row * width), width)


@inlined
def _first_block(call: Any) -> Any:
    return call.index, call.first, call.index_stride, call.index_step


@inlined
def _second_block(call: Any) -> Any:
    return call.second_index, call.second_first, call.second_stride, call.second_step


@inlined
def scale_token(call: Any, unit: int) -> None:
    """y ← y + y ⊙ c."""
    output = _output(call, unit)
    change = _row(call, _first_block(call), unit, 0, call.output_width)
    for at in range(len(output)):
        output[at] += output[at] * change[at]


@inlined
def shift_token(call: Any, unit: int) -> None:
    """y ← y + c."""
    output = _output(call, unit)
    change = _row(call, _first_block(call), unit, 0, call.output_width)
    for at in range(len(output)):
        output[at] += change[at]


@inlined
def update_token(call: Any, unit: int) -> None:
    """y ← y + Σ (a · x) b, over the rows a and b of the two blocks."""
    inputs = carray(floats(call.inputs + 4 * _token(call, unit) * call.input_stride), call.input_width)
    output = _output(call, unit)
    for rank in range(call.rank):
        down = _row(call, _first_block(call), unit, rank, call.input_width)
        up = _row(call, _second_block(call), unit, rank, call.output_width)
        factor = np.float32(0)
        for at in range(len(inputs)):
            factor += down[at] * inputs[at]
        for at in range(len(output)):
            output[at] += factor * up[at]


# What each thread runs: tokens, as long as there are any. Three functions, not one that is given what to do with a
# token: that would be a closure, which numba compiles at every start.


@kernel(_CALL_POINTER)
def _scale(pointer: Any) -> None:
    call = carray(pointer, 1)[0]
    unit = take_unit(pointer)
    while unit < call.count:
        scale_token(call, unit)
        unit = take_unit(pointer)


@kernel(_CALL_POINTER)
def _shift(pointer: Any) -> None:
    call = carray(pointer, 1)[0]
    unit = take_unit(pointer)
    while unit < call.count:
        shift_token(call, unit)
        unit = take_unit(pointer)


@kernel(_CALL_POINTER)
def _update(pointer: Any) -> None:
    call = carray(pointer, 1)[0]
    unit = take_unit(pointer)
    while unit < call.count:
        update_token(call, unit)
        unit = take_unit(pointer)


_KERNELS = {"scale": _scale, "shift": _shift, "low_rank": _update}


class Numbers(NamedTuple):
    """Float32 numbers `[tokens, width]` in memory."""

    address: int
    stride: int  # numbers from token to token
    width: int


def delta_call(inputs: Numbers, outputs: Numbers, tokens: slice | Tensor, blocks: Blocks) -> tuple[int, ...]:
    """What a kernel is told: the fields of `DELTA`. The caller keeps all tensors."""
    if isinstance(tokens, slice):
        count, start, chosen = tokens.stop - tokens.start, tokens.start, 0
    else:
        count, start, chosen = len(tokens), 0, tokens.data_ptr()
    first, second = blocks[0], blocks[-1]
    if first.pool.dtype != torch.float32:
        raise RuntimeError(f"rows in {first.pool.dtype} where the kernels take float32")
    return (
        *(0, count, start, chosen),
        *inputs,
        *outputs,
        first.pool.data_ptr(),
        first.count,
        *_place(first),
        *_place(second),
    )


@dataclass(frozen=True)
class DeltaKernel:
    """A `Kernel`."""

    operation: str  # a kind's `compiled`
    run: Kernel

    def __call__(self, inputs: Tensor, outputs: Tensor, tokens: slice | Tensor, blocks: Blocks) -> None:
        """See `Kernel`."""
        self.run(inputs, outputs, tokens, blocks)


class DeltaKernels:
    """A `DeltaBackend`; see the module. Used by one thread at a time."""

    # measured on two cores: beyond it layers are left to their classes, whose matrix products are faster
    run_work = 2048

    def __init__(self) -> None:
        """Raises `OSError` where torch has not loaded GNU OpenMP."""
        self._threads = TorchThreads()
        self._call = ctypes.create_string_buffer(_RECORD.size)
        self._address = ctypes.addressof(self._call)

    def of(self, kind: DeltaKind) -> DeltaKernel | None:
        """The kernel that computes the same as `kind` at a linear module; None where there is none."""
        if kind.compiled is None:
            return None
        return DeltaKernel(kind.compiled, partial(self._run, _KERNELS[kind.compiled]))

    def of_runs(self, kind: DeltaKind) -> None:
        """None: on a CPU a run's own matrix products are as fast."""

    def _run(self, kernel: Any, inputs: Tensor, outputs: Tensor, tokens: slice | Tensor, blocks: Blocks) -> None:
        if inputs.stride(1) != 1:
            inputs = inputs.contiguous()
        last = tokens.stop - 1 if isinstance(tokens, slice) else int(tokens[-1])  # they ascend
        fits = last < len(outputs) == len(inputs) and outputs.stride(1) == 1
        if not fits or not inputs.dtype == outputs.dtype == torch.float32:
            raise RuntimeError(f"rows up to {last} are no rows of {list(inputs.shape)} and {list(outputs.shape)}")
        given, changed = (Numbers(each.data_ptr(), each.stride(0), each.shape[1]) for each in (inputs, outputs))
        call = delta_call(given, changed, tokens, blocks)
        _RECORD.pack_into(self._call, 0, *call)
        self._threads.run(kernel, self._address, call[COUNT])


def _place(rows: Rows | TokenRows) -> tuple[int, ...]:
    """`index`, `first`, `index_stride` and `index_step`."""
    return (0, rows.first, 0, 0) if isinstance(rows, Rows) else (rows.index.data_ptr(), 0, *rows.index.stride())

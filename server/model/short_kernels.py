"""Operations on the few tokens of a short step, several run in one call by all of torch's threads: compiled, for CPUs,
in float32.

Such a step reads every weight once and computes little, so it takes as long as the memory and what lies between two
reads. Weights are read in the layout that oneDNN gave them (`server.model.products`), block of outputs by block, each
by whichever thread is free, which asks for what it will need before it needs it. The threads meet where an operation
reads what another has written.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import carray, cfunc, njit, types

from server.model.compiled import COMPILED, call_at, floats, pointer_to, prefetch, take_unit
from server.model.layer_kernels import normalize, turn

MOST_TOKENS = 4  # beyond that torch's own products are as fast
BLOCK = 64  # outputs whose weights lie side by side: [inputs, BLOCK]
CHUNK = 8  # inputs whose weights are read together
NORM, PRODUCT, GATED, ROTATION = range(4)
ACTIVATIONS = (("swish", ""), ("gelu", "tanh"), ("gelu", "none"), ("relu", ""))  # as oneDNN's fusion names them
_SWISH, _GELU_TANH, _GELU, _RELU = range(4)
_AHEAD = 32  # inputs between the weights that are read and those that are asked for: 8 kB
_LINE = 16  # numbers of a cache line

_FIELDS = (
    "taken",  # units of work
    "units",  # of a norm and a rotation its rows, of a product its blocks
    "rest",  # operations behind this one
    "barrier",  # address of the function in which all threads wait for each other; 0: they go on
    "kind",
    "tokens",
    "inputs",  # this and every other field that is named as a tensor: its address
    "input_width",
    "outputs",
    "output_width",  # of a rotation a head's
    "weight",
    "bias",  # 0: none
    "added",  # to a product; 0: nothing
    "up_weight",
    "up_bias",
    "up_outputs",
    "activation",  # its place in `ACTIVATIONS`
    "scale",
    "heads",
    "cos",
    "sin",
    "rotary_width",
)
OPERATION = np.dtype([(name, np.int64) for name in _FIELDS] + [("epsilon", np.float64)])
_OPERATION = numba.from_dtype(OPERATION)
_POINTER = types.CPointer(_OPERATION)
_BYTES = OPERATION.itemsize
_at = pointer_to(_OPERATION)


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _add_chunk(inputs: Any, weight: Any, outputs: Any, width: int) -> None:
    """y ← y + Σ xᵢ wᵢ over a chunk of inputs, for the first outputs of a block; all by address."""
    x, w, y = carray(floats(inputs), CHUNK), carray(floats(weight), (CHUNK, BLOCK)), carray(floats(outputs), BLOCK)
    x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    for at in range(width):
        first = x0 * w[0, at] + x1 * w[1, at] + x2 * w[2, at] + x3 * w[3, at]
        y[at] += first + x4 * w[4, at] + x5 * w[5, at] + x6 * w[6, at] + x7 * w[7, at]


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _multiply(call: Any, block: int, weight: Any, bias: Any, outputs: Any) -> None:
    """x Wᵀ + b for all tokens and one block of outputs."""
    first, inputs, all_outputs = block * BLOCK, call.input_width, call.output_width
    width = min(BLOCK, all_outputs - first)
    for token in range(call.tokens):
        for at in range(token * all_outputs + first, token * all_outputs + first + width):
            floats(outputs)[at] = floats(bias)[at - token * all_outputs] if bias != 0 else np.float32(0)
    weight += 4 * first * inputs
    for at in range(0, inputs, CHUNK):
        for ahead in range(0, CHUNK * BLOCK, _LINE):
            prefetch(weight + 4 * ((at + _AHEAD) * BLOCK + ahead))
        for token in range(call.tokens):
            output = outputs + 4 * (token * all_outputs + first)
            _add_chunk(call.inputs + 4 * (token * inputs + at), weight + 4 * at * BLOCK, output, width)


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _activated(activation: int, x: Any) -> Any:
    if activation == _SWISH:
        return x / (np.float32(1) + np.exp(-x))
    if activation == _GELU_TANH:
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    if activation == _GELU:
        return np.float32(0.5 * x * (1 + math.erf(x * math.sqrt(0.5))))
    return np.float32(0) if x < 0 else x


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _product(call: Any, block: int) -> None:
    """y = x Wᵀ + b + a."""
    _multiply(call, block, call.weight, call.bias, call.outputs)
    if call.added != 0:
        for token in range(call.tokens):
            start = token * call.output_width
            for at in range(start + block * BLOCK, start + min((block + 1) * BLOCK, call.output_width)):
                floats(call.outputs)[at] += floats(call.added)[at]


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _gated(call: Any, block: int) -> None:
    """y = f(x Wᵀ + b) ⊙ (x Uᵀ + c)."""
    _multiply(call, block, call.weight, call.bias, call.outputs)
    _multiply(call, block, call.up_weight, call.up_bias, call.up_outputs)
    for token in range(call.tokens):
        start = token * call.output_width
        for at in range(start + block * BLOCK, start + min((block + 1) * BLOCK, call.output_width)):
            gate = _activated(call.activation, floats(call.outputs)[at])
            floats(call.outputs)[at] = gate * floats(call.up_outputs)[at]


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _do(call: Any, unit: int) -> None:
    """One unit of an operation's work."""
    if call.kind == PRODUCT:
        _product(call, unit)
    elif call.kind == GATED:
        _gated(call, unit)
    elif call.kind == NORM:
        place, width = 4 * unit * call.input_width, call.input_width
        inputs, outputs = carray(floats(call.inputs + place), width), carray(floats(call.outputs + place), width)
        normalize(inputs, outputs, carray(floats(call.scale), width), np.float32(call.epsilon))
    else:
        shape, place = (call.heads, call.output_width), 4 * unit * call.heads * call.output_width
        inputs, outputs = carray(floats(call.inputs + place), shape), carray(floats(call.outputs + place), shape)
        angles = 4 * unit * call.rotary_width
        cos, sin = floats(call.cos + angles), floats(call.sin + angles)
        turn(inputs, outputs, carray(cos, call.rotary_width), carray(sin, call.rotary_width))


@cfunc(types.void(_POINTER), **COMPILED)  # type: ignore[untyped-decorator]
def run_all(pointer: Any) -> None:
    """What each thread runs: an array of operations, one after the other."""
    rest = carray(pointer, 1)[0].rest
    calls = carray(pointer, rest + 1)
    for place in range(rest + 1):
        call = calls[place]
        here = _at(calls.ctypes.data + place * _BYTES)
        unit = take_unit(here)
        while unit < call.units:
            _do(call, unit)
            unit = take_unit(here)
        if call.barrier != 0:
            call_at(call.barrier)

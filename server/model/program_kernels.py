"""The operations that programs are made of, any number run in one call by all of torch's threads: compiled, for CPUs,
in float32.

Weights are read in the layout that oneDNN gave them (`server.model.products`), block of outputs by block, each by
whichever thread is free, which asks for the block that it will likely have next while it multiplies. The threads meet
where an operation reads what another has written.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import numba
import numpy as np
from numba import carray, types

from server.model.activations import Activation
from server.model.compiled import (
    add_to,
    call_address,
    clock,
    exponential,
    floats,
    inlined,
    kernel,
    pointer_to,
    take_unit,
)
from server.model.decode_kernel import ATTENTION, attend_share, write_token
from server.model.delta_kernels import DELTA, scale_token, shift_token, update_token
from server.model.layer_kernels import normalize, rotate_heads
from server.model.tiles import BLOCK, HAS_WIDE_REGISTERS, LINES, TILE_TOKENS, multiply_tile

MOST_TOKENS = 512 if HAS_WIDE_REGISTERS else 4
"""Tokens of a program. Beyond that, and where sums do not fit into registers, torch's own products are as fast."""


class Kind(IntEnum):
    """The kinds of operations."""

    PRODUCT = 0
    GATED = 1  # two products of the same input and what a gated MLP makes of them
    GATE = 2  # that by itself
    NORM = 3
    ROTATION = 4
    WRITE = 5  # keys and values into their pages
    ATTEND = 6
    SCALE = 7  # this and what follows are row deltas
    SHIFT = 8
    UPDATE = 9  # of low rank


_TILE_INPUTS = 128  # of a tile: their weights stay in the first cache for all tokens
_ROW = 4 * BLOCK  # bytes of one input's weights in a block
_NEAR = 2**14  # bytes between the weights that are read and those that are asked for, where they are read once

_FIELDS = (
    "taken",  # units of work
    "units",  # of a product its blocks, times the shares; of what is descriptor elsewhere its own; else the tokens
    "shares",  # of the tokens, of a product
    "threads",  # that will likely run it
    "remaining",  # operations behind this one
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
    "activation",
    "scale",
    "heads",  # of a token: rows that a norm or a rotation takes one by one
    "cos",
    "sin",
    "rotary_width",
    "next_weight",  # of the next product in the program; 0: none
    "next_input_width",
    "descriptor",  # address of the arguments of an attention (`decode_kernel.ATTENTION`) or a delta (`DELTA`)
    "cycles",  # of the processor's clock, that all threads together have spent on it, waiting included
)
OPERATION = np.dtype([(name, np.int64) for name in _FIELDS] + [("epsilon", np.float64)])
_OPERATION = numba.from_dtype(OPERATION)
_POINTER = types.CPointer(_OPERATION)
_BYTES = OPERATION.itemsize
_at, _attention_at, _delta_at = (
    pointer_to(_OPERATION),
    pointer_to(numba.from_dtype(ATTENTION)),
    pointer_to(numba.from_dtype(DELTA)),
)
_CYCLES = 8 * _FIELDS.index("cycles")  # bytes from an operation's beginning


@inlined
def _tokens_of(call: Any, unit: int) -> Any:
    share = unit % call.shares
    return range(share * call.tokens // call.shares, (share + 1) * call.tokens // call.shares)


@inlined
def _block_of(call: Any, unit: int, token: int, numbers: Any) -> Any:
    """What a unit has of a token's numbers `[tokens, output_width]`, given by address."""
    first = unit // call.shares * BLOCK
    place = numbers + 4 * (token * call.output_width + first)
    return carray(floats(place), min(BLOCK, call.output_width - first))


@inlined
def _following(call: Any, unit: int) -> Any:
    """Address of the weights that a thread which has this unit now will likely have next."""
    block = (unit + call.threads) // call.shares
    blocks = -(-call.output_width // BLOCK)
    if block < blocks:
        return call.weight + _ROW * block * call.input_width
    if call.next_weight != 0:
        return call.next_weight + _ROW * (block - blocks) * call.next_input_width
    return np.int64(0)


@inlined
def _add_products(
    inputs: Any, input_width: int, tokens: int, weight: Any, outputs: Any, stride: int, ahead: Any
) -> None:
    """y ← y + x Wᵀ for neighbouring tokens and one block of outputs; all by address. `stride` is bytes from a token's
    outputs to the next one's; of the block at `ahead` each tile asks for a part, unless that is 0."""
    tiles = -(-tokens // TILE_TOKENS)
    lines = LINES[-1]
    while lines > LINES[1] and 2 * LINES[-1] <= tiles * lines:
        lines //= 2
    for first in range(0, input_width, _TILE_INPUTS):
        count = min(_TILE_INPUTS, input_width - first)
        here = weight + _ROW * first
        for tile in range(tiles):
            begin, end = tile * tokens // tiles, (tile + 1) * tokens // tiles
            asked = ahead + _ROW * first + tile * (_ROW * count * lines // LINES[-1])
            if tiles == 1:
                asked = here + _NEAR
            is_asking = ahead != 0 and tile * lines < LINES[-1]
            multiply_tile(
                end - begin,
                lines if is_asking else 0,
                inputs + 4 * (begin * input_width + first),
                4 * input_width,
                here,
                count,
                outputs + stride * begin,
                stride,
                asked,
            )


@inlined
def _multiply(call: Any, unit: int, weight: Any, bias: Any, outputs: Any, ahead: Any) -> None:
    """x Wᵀ + b for a unit's tokens and block of outputs."""
    block, tokens = unit // call.shares, _tokens_of(call, unit)
    width = min(BLOCK, call.output_width - block * BLOCK)
    inputs = call.inputs + 4 * tokens.start * call.input_width
    weight += _ROW * block * call.input_width
    if width == BLOCK:
        for token in tokens:
            _begin_sums(_block_of(call, unit, token, outputs), bias, block)
        sums = outputs + 4 * (tokens.start * call.output_width + block * BLOCK)
        _add_products(inputs, call.input_width, len(tokens), weight, sums, 4 * call.output_width, ahead)
    else:  # the last block, whose weights are filled up
        filled = np.empty((len(tokens), BLOCK), np.float32)
        for row in filled:
            _begin_sums(row[:width], bias, block)
        _add_products(inputs, call.input_width, len(tokens), weight, np.int64(filled.ctypes.data), 4 * BLOCK, ahead)
        for token in tokens:
            _block_of(call, unit, token, outputs)[:] = filled[token - tokens.start, :width]


@inlined
def _begin_sums(sums: Any, bias: Any, block: int) -> None:
    """What products are added to."""
    for at in range(len(sums)):
        sums[at] = floats(bias)[block * BLOCK + at] if bias != 0 else np.float32(0)


@inlined
def _activated(activation: int, x: Any) -> Any:
    if activation == Activation.SWISH:
        return x / (np.float32(1) + exponential(-x))
    if activation == Activation.GELU_TANH:
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return x / (np.float32(1) + exponential(np.float32(-2) * inner))  # (1 + tanh z) / 2 = 1 / (1 + e⁻²ᶻ)
    if activation == Activation.GELU:
        return np.float32(0.5 * x * (1 + math.erf(x * math.sqrt(0.5))))
    return np.float32(0) if x < 0 else x


@inlined
def _product(call: Any, unit: int) -> None:
    """y = x Wᵀ + b + a."""
    _multiply(call, unit, call.weight, call.bias, call.outputs, _following(call, unit))
    if call.added != 0:
        for token in _tokens_of(call, unit):
            output, added = _block_of(call, unit, token, call.outputs), _block_of(call, unit, token, call.added)
            for at in range(len(output)):
                output[at] += added[at]


@inlined
def _gate(activation: int, outputs: Any, up: Any) -> None:
    """y ← f(y) ⊙ u, neighbouring numbers; the commonest in loops of their own, which have vectors then."""
    if activation == Activation.SWISH:
        for at in range(len(outputs)):
            outputs[at] = _activated(Activation.SWISH, outputs[at]) * up[at]
    elif activation == Activation.GELU_TANH:
        for at in range(len(outputs)):
            outputs[at] = _activated(Activation.GELU_TANH, outputs[at]) * up[at]
    else:
        for at in range(len(outputs)):
            outputs[at] = _activated(activation, outputs[at]) * up[at]


@inlined
def _gated(call: Any, unit: int) -> None:
    """y = f(x Wᵀ + b) ⊙ (x Uᵀ + c)."""
    up_weight = call.up_weight + _ROW * (unit // call.shares) * call.input_width
    _multiply(call, unit, call.weight, call.bias, call.outputs, up_weight)
    _multiply(call, unit, call.up_weight, call.up_bias, call.up_outputs, _following(call, unit))
    for token in _tokens_of(call, unit):
        output, up = _block_of(call, unit, token, call.outputs), _block_of(call, unit, token, call.up_outputs)
        _gate(call.activation, output, up)


@inlined
def _gate_token(call: Any, token: int) -> None:
    """The same for a token whose two products are there."""
    place = 4 * token * call.output_width
    outputs, up = floats(call.outputs + place), floats(call.up_outputs + place)
    _gate(call.activation, carray(outputs, call.output_width), carray(up, call.output_width))


@inlined
def _norm_token(call: Any, token: int) -> None:
    """y = w ⊙ x / √(mean of x² + ε), for each of a token's heads."""
    width = call.input_width
    for row in range(token * call.heads, (token + 1) * call.heads):
        inputs = carray(floats(call.inputs + 4 * row * width), width)
        outputs = carray(floats(call.outputs + 4 * row * width), width)
        normalize(inputs, outputs, carray(floats(call.scale), width), np.float32(call.epsilon))


@inlined
def _rotate_token(call: Any, token: int) -> None:
    """A token's heads, turned by its angles."""
    shape, place = (call.heads, call.output_width), 4 * token * call.heads * call.output_width
    inputs, outputs = carray(floats(call.inputs + place), shape), carray(floats(call.outputs + place), shape)
    angles = 4 * token * call.rotary_width
    cos, sin = floats(call.cos + angles), floats(call.sin + angles)
    rotate_heads(inputs, outputs, carray(cos, call.rotary_width), carray(sin, call.rotary_width))


@inlined
def _do(call: Any, unit: int) -> None:
    """One unit of an operation's work."""
    kind = call.kind
    if kind == Kind.PRODUCT:
        _product(call, unit)
    elif kind == Kind.GATED:
        _gated(call, unit)
    elif kind == Kind.GATE:
        _gate_token(call, unit)
    elif kind == Kind.NORM:
        _norm_token(call, unit)
    elif kind == Kind.ROTATION:
        _rotate_token(call, unit)
    elif kind == Kind.WRITE:
        write_token(carray(_attention_at(call.descriptor), 1)[0], unit)
    elif kind == Kind.ATTEND:
        attend_share(carray(_attention_at(call.descriptor), 1)[0], unit, min(call.taken, call.units - 1))
    elif kind == Kind.SCALE:
        scale_token(carray(_delta_at(call.descriptor), 1)[0], unit)
    elif kind == Kind.SHIFT:
        shift_token(carray(_delta_at(call.descriptor), 1)[0], unit)
    else:
        update_token(carray(_delta_at(call.descriptor), 1)[0], unit)


@kernel(_POINTER)
def run_all(pointer: Any) -> None:
    """What each thread runs: an array of operations, one after the other."""
    remaining = carray(pointer, 1)[0].remaining
    calls = carray(pointer, remaining + 1)
    before = clock()
    for place in range(remaining + 1):
        call = calls[place]
        here = _at(calls.ctypes.data + place * _BYTES)
        unit = take_unit(here)
        while unit < call.units:
            _do(call, unit)
            unit = take_unit(here)
        if call.barrier != 0:
            call_address(call.barrier)
        now = clock()  # with what follows 16 ns an operation and thread, of some 30 µs
        add_to(calls.ctypes.data + place * _BYTES + _CYCLES, now - before)
        before = now

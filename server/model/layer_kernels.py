"""A root mean square norm and the rotary embedding, each in one pass over memory: compiled, for CPUs, in float32.

torch makes five operations of the norm of a few rows and three, over slices, of a rotation. In a step of few tokens
each of them takes as long to begin as to run: the base's weights pass through the caches in between, and take the place
of the operations' own code there.
"""

from __future__ import annotations

import ctypes
from struct import Struct
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from server.model.compiled import floats, inlined, kernel, take_unit
from server.model.threads import TorchThreads

_FIELDS = (
    "taken",  # pieces
    "pieces",
    "count",  # rows of a norm, tokens of a rotation
    "inputs",  # this and every other field that is named as a tensor: its address
    "outputs",
    "width",  # of a norm's row, of a head
    "scale",
    "heads",
    "cos",
    "sin",
    "rotary_width",
    "epsilon",  # a float64
)

_RECORD = Struct(f"{len(_FIELDS) - 1}qd")
_CALL = np.dtype([(name, np.int64) for name in _FIELDS[:-1]] + [(_FIELDS[-1], np.float64)])
_CALL_POINTER = types.CPointer(numba.from_dtype(_CALL))
_PIECE = 2**15  # numbers: less is sooner done by one thread than two have begun


@inlined
def normalize(inputs: Any, outputs: Any, scale: Any, epsilon: Any) -> None:
    """y = w ⊙ x / √(mean of x² + ε), all `[width]`."""
    squares = np.float32(0)
    for at in range(len(inputs)):
        squares += inputs[at] * inputs[at]
    factor = np.float32(1) / np.sqrt(squares / np.float32(len(inputs)) + epsilon)
    for at in range(len(inputs)):
        outputs[at] = inputs[at] * factor * scale[at]


@inlined
def rotate_heads(inputs: Any, outputs: Any, cos: Any, sin: Any) -> None:
    """Each dimension of each head with the one half the rotated width further: (a cos - b sin, b cos + a sin)."""
    heads, width = inputs.shape
    half = len(cos) // 2
    for head in range(heads):
        for at in range(half):
            first, second = inputs[head, at], inputs[head, at + half]
            outputs[head, at] = first * cos[at] - second * sin[at]
            outputs[head, at + half] = second * cos[at + half] + first * sin[at + half]
        for at in range(2 * half, width):
            outputs[head, at] = inputs[head, at]


@kernel(_CALL_POINTER)
def _norm(pointer: Any) -> None:
    """Of each row."""
    call = carray(pointer, 1)[0]
    count, width, epsilon = call.count, call.width, np.float32(call.epsilon)
    shape = (count, width)
    inputs, outputs = carray(floats(call.inputs), shape), carray(floats(call.outputs), shape)
    scale = carray(floats(call.scale), width)
    piece = take_unit(pointer)
    while piece < call.pieces:
        for row in range(piece * count // call.pieces, (piece + 1) * count // call.pieces):
            normalize(inputs[row], outputs[row], scale, epsilon)
        piece = take_unit(pointer)


@kernel(_CALL_POINTER)
def _rotate(pointer: Any) -> None:
    """Of each token."""
    call = carray(pointer, 1)[0]
    count, rotary = call.count, call.rotary_width
    shape = (count, call.heads, call.width)
    inputs, outputs = carray(floats(call.inputs), shape), carray(floats(call.outputs), shape)
    cosines, sines = carray(floats(call.cos), (count, rotary)), carray(floats(call.sin), (count, rotary))
    piece = take_unit(pointer)
    while piece < call.pieces:
        for token in range(piece * count // call.pieces, (piece + 1) * count // call.pieces):
            rotate_heads(inputs[token], outputs[token], cosines[token], sines[token])
        piece = take_unit(pointer)


class LayerKernels:
    """See the module. Used by one thread at a time."""

    def __init__(self) -> None:
        """Raises `OSError` where torch has not loaded GNU OpenMP."""
        self._threads = TorchThreads()
        self._call = ctypes.create_string_buffer(_RECORD.size)
        self._address = ctypes.addressof(self._call)

    def rms_norm(self, inputs: Tensor, scale: Tensor, epsilon: float) -> Tensor:
        """`torch.nn.functional.rms_norm` over the last dimension: Zhang and Sennrich 2019. `scale` `[width]`."""
        width = inputs.shape[-1]
        if scale.shape != (width,) or not scale.is_contiguous():
            raise RuntimeError(f"a norm's weight of shape {list(scale.shape)} over rows of {width}")
        inputs = inputs.contiguous()
        outputs = torch.empty_like(inputs)
        count = inputs.numel() // width
        self._run(_norm, inputs, outputs, count, width, scale.data_ptr(), 0, 0, 0, 0, epsilon, others=(scale,))
        return outputs

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """`server.model.fused.rotate`. `unsqueeze_dim` is the dimension of the heads, 1 or 2."""
        if unsqueeze_dim not in (1, 2) or len(q) != 1:
            raise RuntimeError(f"heads of shape {list(q.shape)}, in dimension {unsqueeze_dim}, are no packed step's")
        cos, sin = cos.contiguous(), sin.contiguous()
        if unsqueeze_dim == 2:
            return self._rotated(q, cos, sin), self._rotated(k, cos, sin)
        query, key = (self._rotated(heads.transpose(1, 2), cos, sin) for heads in (q, k))
        return query.transpose(1, 2), key.transpose(1, 2)

    def _rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        inputs = heads.contiguous()  # as projections leave them: nothing is copied
        outputs = torch.empty_like(inputs)
        _, tokens, count, width = inputs.shape
        if cos.shape != sin.shape or cos.shape[:-1] != (1, tokens) or cos.shape[-1] > width:
            raise RuntimeError(f"angles of shape {list(cos.shape)} for heads of shape {list(heads.shape)}")
        angles = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
        self._run(_rotate, inputs, outputs, tokens, width, 0, count, *angles, 0.0, others=(cos, sin))
        return outputs

    def _run(
        self, kernel: Any, inputs: Tensor, outputs: Tensor, count: int, *fields: float, others: tuple[Tensor, ...]
    ) -> None:
        if not all(each.dtype == torch.float32 for each in (inputs, *others)):
            raise RuntimeError(f"{inputs.dtype} where the kernels take float32")
        pieces = max(1, inputs.numel() // _PIECE)
        addresses = inputs.data_ptr(), outputs.data_ptr()
        _RECORD.pack_into(self._call, 0, 0, pieces, count, *addresses, *fields)
        self._threads.run(kernel, self._address, pieces)

"""Short steps: what a base computes for a few tokens, as one stream's decoding asks for, in few calls.

Between a layer's matrix products stand some thirty operations. With one row each is over sooner than Python has called
the next, and the weights that pass through the caches in between take the place of the operations' code. So a decoder
layer of the usual form, where it has no adapters, is two calls of `server.model.short_kernels`, one before and one
behind its attention, and every other product of a packed weight is one.

A form is tried against what it takes the place of when the base is loaded; where they differ by more than rounding, the
class's own code stays. Nothing here knows a class by name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from server.model.agreement import agree
from server.model.compiled import TorchThreads
from server.model.products import Product, address, may_be_blocked
from server.model.short_kernels import (
    ACTIVATIONS,
    BLOCK,
    CHUNK,
    GATED,
    MOST_TOKENS,
    NORM,
    OPERATION,
    PRODUCT,
    ROTATION,
    run_all,
)

_PIECES = 2  # of work: more than one, for all threads
Fields = dict[str, float | Tensor]  # of an operation, by name; of a tensor its address


class Program:
    """Operations that one call runs; what they read and write is fixed but for the tensors that a call is given."""

    def __init__(
        self, threads: TorchThreads, operations: list[Fields], given: dict[str, list[tuple[int, str]]]
    ) -> None:
        """`given`: of each tensor of a call, by name, the operations and their fields that take its address."""
        self._threads = threads
        self._operations = operations  # they keep the tensors
        self._records = [_Records(operations, given, tokens, threads.barrier) for tokens in range(1, MOST_TOKENS + 1)]

    def run(self, tokens: int, **tensors: Tensor) -> None:
        """For so many tokens; all tensors that are to be given, by name, contiguous, which the caller keeps."""
        records = self._records[tokens - 1]
        records.taken.fill(0)
        for name, tensor in tensors.items():
            at = tensor.data_ptr()
            for field, place in records.given[name]:
                field[place] = at
        self._threads.run(run_all, records.address, _PIECES)


class _Records:
    """A program's for one number of tokens. All threads meet behind an operation unless it says otherwise, and behind
    the last one anyway."""

    def __init__(
        self, operations: list[Fields], given: dict[str, list[tuple[int, str]]], tokens: int, barrier: int
    ) -> None:
        records = np.zeros(len(operations), OPERATION)
        records["tokens"], records["barrier"], records["heads"] = tokens, barrier, 1
        records["rest"] = np.arange(len(operations))[::-1]
        for record, operation in zip(records, operations, strict=True):
            for name, value in operation.items():
                record[name] = address(value) if isinstance(value, Tensor) else value
            units = {NORM: tokens * record["heads"], ROTATION: tokens}
            record["units"] = units.get(int(record["kind"]), -(-record["output_width"] // BLOCK))
        records["barrier"][-1] = 0
        self.taken: np.ndarray[Any, Any] = records["taken"]  # this and the next are views: their writing is quick
        self.given = {name: [(records[field], place) for place, field in places] for name, places in given.items()}
        self.address = records.ctypes.data


class ShortSteps:
    """What of a base a program computes where there are few tokens.

    Used by one thread at a time, for all programs share their buffers.
    """

    def __init__(self) -> None:
        """Raises `OSError` where torch has not loaded GNU OpenMP."""
        self._threads = TorchThreads()
        self._buffers: dict[str, Tensor] = {}

    def program(self, operations: list[Fields], given: dict[str, list[tuple[int, str]]]) -> Program:
        """See `Program`."""
        return Program(self._threads, operations, given)

    def buffer(self, name: str, width: int) -> Tensor:
        """`[MOST_TOKENS, width]`, the same for all who ask for this name and width."""
        return self._buffers.setdefault(f"{name} {width}", torch.zeros(MOST_TOKENS, width, dtype=torch.float32))

    def product(self, module: nn.Module, own: Product) -> Product:
        """A packed module's product, x Wᵀ + b, for few tokens by a program; `own` is the one for any number."""
        return self._for_few(multiplication(module), own)

    def gated(self, gate: nn.Module, up: nn.Module, activation: tuple[str, str], own: Product) -> Product:
        """Of packed modules f(gate(x)) ⊙ up(x), likewise; `activation` is f as oneDNN's fusion names it."""
        first, second = multiplication(gate), multiplication(up)
        if first is None or second is None or widths(first) != widths(second):
            return own
        return self._for_few(self.gated_operation(first, second, activation), own)

    def gated_operation(self, gate: Fields, up: Fields, activation: tuple[str, str]) -> Fields:
        """Of two products one operation."""
        second = {f"up_{field}": up[field] for field in ("weight", "bias") if field in up}
        second["up_outputs"] = self.buffer("up", widths(up)[1])
        return gate | second | {"kind": GATED, "activation": ACTIVATIONS.index(activation)}

    def _for_few(self, operation: Fields | None, own: Product) -> Product:
        """What an operation computes, where that is what `own` does."""
        if operation is None:
            return own
        input_width, output_width = widths(operation)
        program = self.program([operation], {"inputs": [(0, "inputs")], "outputs": [(0, "outputs")]})

        def product(inputs: Tensor) -> Tensor:
            *shape, width = inputs.shape
            tokens = math.prod(shape)
            if not 0 < tokens <= MOST_TOKENS or width != input_width or inputs.dtype != torch.float32:
                return own(inputs)
            outputs = torch.empty(*shape, output_width, dtype=torch.float32)
            program.run(tokens, inputs=inputs.contiguous(), outputs=outputs)
            return outputs

        inputs = torch.randn(MOST_TOKENS, input_width, dtype=torch.float32)
        return product if agree(product(inputs), own(inputs)) else own


def widths(product: Fields) -> tuple[int, int]:
    """Of its input and its output."""
    return int(product["input_width"]), int(product["output_width"])


def multiplication(module: nn.Module) -> Fields | None:
    """What is fixed of a packed module's product; None where its weight is not laid out as the kernel reads it."""
    weight: Tensor = module.weight  # type: ignore[assignment]  # a module's attributes are untyped
    bias: Tensor | None = module.bias  # type: ignore[assignment]  # as above
    outputs, inputs = weight.shape
    if inputs % CHUNK or not may_be_blocked(weight, BLOCK) or (bias is not None and bias.dtype != torch.float32):
        return None
    fields: Fields = {"kind": PRODUCT, "weight": weight, "input_width": inputs, "output_width": outputs}
    return fields if bias is None else fields | {"bias": bias}

"""Programs: what a base computes in a step, as operations that one call of all threads runs, one after the other.

Between a layer's matrix products stand some thirty operations. With one row each is over sooner than Python has called
the next; with many each reads from memory what the one before has written there. So decoder layers of the usual form
are a program (`server.model.layer_programs`), and every other product of a packed weight is one by itself.

A form is tried against what it takes the place of when the base is loaded; where they differ by more than rounding, the
class's own code stays. Nothing here knows a class by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from server.model.activations import Activation
from server.model.agreement import agree, random_input
from server.model.products import Product, address, may_be_blocked
from server.model.program_kernels import (
    MOST_TOKENS,
    OPERATION,
    Kind,
    run_all,
)
from server.model.threads import TorchThreads
from server.model.tiles import BLOCK, TILE_TOKENS, UNROLLED

TRIED_TOKENS = min(MOST_TOKENS, 2 * TILE_TOKENS + 1)
"""With how many tokens a form is tried: they are several tiles, of unequal size."""
_PIECES = 2  # of work: more than one, for all threads
_UNITS_PER_THREAD = 3  # of a product: with fewer, the last one is waited for
_LEAST_SHARE = 48  # tokens for which a block's weights are read
Fields = dict[str, float | Tensor]
"""Of an operation, by name; a tensor stands for its address."""
Records = np.ndarray[Any, Any]


class Program:
    """Operations that one call runs."""

    def __init__(self, threads: TorchThreads, records: Records, keep: object) -> None:
        """`records` are `OPERATION`s as `Programs.describe` makes them; other than 0, `units` is a number that does not
        depend on the tokens. `keep` is what their addresses are of."""
        self.keep = keep
        self.records = records
        self._taken = records["taken"]  # a view, as all fields of the records are
        self._threads = threads
        self._remaining = records["remaining"]
        multiplies = np.isin(records["kind"], (Kind.PRODUCT, Kind.GATED))
        self._blocks = np.where(multiplies, -(-records["output_width"] // BLOCK), 0)
        self._fixed_units = records["units"].copy()
        self._shared_by = (0, 0)  # tokens and threads that the records are for

    def share(self, tokens: int) -> None:
        """Divide the work on so many tokens: a product's into blocks of outputs, for all tokens, or for a share of them
        where there are few blocks."""
        threads = torch.get_num_threads()
        if self._shared_by == (tokens, threads):
            return
        records, blocks = self.records, self._blocks
        wanted = -(-_UNITS_PER_THREAD * threads // np.maximum(blocks, 1))
        shares = np.clip(wanted, 1, max(1, tokens // _LEAST_SHARE))
        records["tokens"], records["threads"], records["shares"] = tokens, threads, shares
        by_token = np.where(self._fixed_units > 0, self._fixed_units, tokens)
        records["units"] = np.where(blocks > 0, blocks * shares, by_token)
        self._shared_by = tokens, threads

    def set_outputs(self, operation: int, outputs: Tensor) -> None:
        """Where an operation writes; the caller keeps it."""
        self.records["outputs"][operation] = outputs.data_ptr()

    def run(self, start: int = 0, stop: int | None = None) -> None:
        """The operations from `start` to `stop`, after `share`."""
        stop = len(self.records) if stop is None else stop
        self._taken[start:stop] = 0
        self._remaining[start] = stop - start - 1
        self._threads.run(run_all, self.records.ctypes.data + start * OPERATION.itemsize, _PIECES)


class Programs:
    """What of a base programs compute, as long as there are not too many tokens.

    Used by one thread at a time, for all programs share their buffers.
    """

    def __init__(self) -> None:
        """Raises `OSError` where torch has not loaded GNU OpenMP."""
        self._threads = TorchThreads()
        self.barrier = self._threads.barrier
        self._buffers: dict[str, Tensor] = {}

    def program(self, records: Records, keep: object) -> Program:
        """See `Program`."""
        return Program(self._threads, records, keep)

    def describe(self, operations: Sequence[Fields]) -> Records:
        """Operations as the kernels read them. All threads meet behind each unless its `barrier` is 0."""
        records = np.zeros(len(operations), OPERATION)
        records["barrier"], records["heads"], records["shares"] = self.barrier, 1, 1
        for record, operation in zip(records, operations, strict=True):
            for name, value in operation.items():
                record[name] = address(value) if isinstance(value, Tensor) else value
        return records

    def buffer(self, name: str, width: int) -> Tensor:
        """`[MOST_TOKENS, width]`, the same for all who ask for this name and width."""
        key = f"{name} {width}"
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(MOST_TOKENS, width, dtype=torch.float32)
        return self._buffers[key]

    def product(self, module: nn.Module, own: Product) -> Product:
        """A packed module's product, x Wᵀ + b, by a program; `own` is the one for any number of tokens."""
        return self._by_program(multiplication(module), own)

    def gated(self, gate: nn.Module, up: nn.Module, activation: Activation, own: Product) -> Product:
        """Of packed modules f(gate(x)) ⊙ up(x), likewise."""
        first, second = multiplication(gate), multiplication(up)
        if first is None or second is None or widths(first) != widths(second):
            return own
        return self._by_program(self.gated_operation(first, second, activation), own)

    def gated_operation(self, gate: Fields, up: Fields, activation: Activation) -> Fields:
        """Of two products one operation."""
        second = {f"up_{field}": up[field] for field in ("weight", "bias") if field in up}
        second["up_outputs"] = self.buffer("up", widths(up)[1])
        return gate | second | {"kind": Kind.GATED, "activation": activation}

    def _by_program(self, operation: Fields | None, own: Product) -> Product:
        """What an operation computes, where that is what `own` does."""
        if operation is None:
            return own
        input_width, output_width = widths(operation)
        program = self.program(self.describe([operation]), operation)
        inputs_at, outputs_at = program.records["inputs"], program.records["outputs"]

        def product(inputs: Tensor) -> Tensor:
            *shape, width = inputs.shape
            tokens = math.prod(shape)
            if not 0 < tokens <= MOST_TOKENS or width != input_width or inputs.dtype != torch.float32:
                return own(inputs)
            inputs, outputs = inputs.contiguous(), torch.empty(*shape, output_width, dtype=torch.float32)
            inputs_at[0], outputs_at[0] = inputs.data_ptr(), outputs.data_ptr()
            program.share(tokens)
            program.run()
            return outputs

        inputs = random_input(TRIED_TOKENS, input_width)
        return product if agree(product(inputs), own(inputs)) else own


def _is_read_by_address(bias: Tensor | None) -> bool:
    return bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())


def widths(product: Fields) -> tuple[int, int]:
    """Of its input and its output."""
    return int(product["input_width"]), int(product["output_width"])


def multiplication(module: nn.Module) -> Fields | None:
    """What is fixed of a packed module's product; None where its weight is not laid out as the kernel reads it."""
    weight: Tensor = module.weight  # type: ignore[assignment]  # a module's attributes are untyped
    bias: Tensor | None = module.bias  # type: ignore[assignment]  # as above
    outputs, inputs = weight.shape
    if inputs % UNROLLED or not may_be_blocked(weight, BLOCK) or not _is_read_by_address(bias):
        return None
    fields: Fields = {"kind": Kind.PRODUCT, "weight": weight, "input_width": inputs, "output_width": outputs}
    return fields if bias is None else fields | {"bias": bias}

"""What kernels on a device are given for a segment of a step: tokens and rows as indices that are there already.

Nothing here asks the device for a value, and a launch's sizes follow from shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from server.model.delta_trial import worst_difference
from server.model.grouped_products import low_rank_of_runs, worst_run_difference
from server.model.row_deltas import Blocks, DeltaKind, Kernel, Rows, TokenRows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_TOLERANCE = 1e-5  # float32 sums in another order; a result is rounded once, by half an epsilon at most


class Tokens(NamedTuple):
    """Those rows of a step's inputs and outputs that change."""

    number: int
    start: int  # the first one, where all are neighbours
    chosen: Tensor | None  # [number]; None where all are neighbours


class Placed(NamedTuple):
    """A block of each token: where its rows lie."""

    pool: Tensor  # [all, width], contiguous
    rows: Tensor  # [tokens, rows of a block], of any strides


Launch = Callable[..., None]
"""Changes outputs `[all, out]` in place, given inputs `[all, in]`, `Tokens` and one `Placed` for each block; both are
contiguous along their second dimension."""


class DeviceDeltas:
    """See `DeltaBackend` of `server.model.row_deltas`."""

    run_work = 0  # many tokens are left to matrix products; not measured yet

    def __init__(self, launches: Mapping[str, Launch], device: torch.device, *, has_grouped: bool = False) -> None:
        """`launches` by the names in `DeltaKind.compiled`; `has_grouped`: whether torch has grouped products here."""
        self._launches = launches
        self._has_grouped = has_grouped
        self._order = torch.arange(64, device=device)

    def of(self, kind: DeltaKind) -> Kernel | None:
        """The kernel that computes the same as `kind` at a linear module; None where there is none."""
        launch = None if kind.compiled is None else self._launches.get(kind.compiled)
        return None if launch is None else partial(self._run, launch)

    def of_runs(self, kind: DeltaKind) -> Kernel | None:
        """The same for runs of many tokens."""
        return low_rank_of_runs if self._has_grouped and kind.compiled == "low_rank" else None

    def _run(self, launch: Launch, inputs: Tensor, outputs: Tensor, tokens: slice | Tensor, blocks: Blocks) -> None:
        if isinstance(tokens, slice):
            taken = Tokens(tokens.stop - tokens.start, tokens.start, None)
        else:
            taken = Tokens(len(tokens), 0, tokens)
        if inputs.stride(1) != 1:
            inputs = inputs.contiguous()
        last = taken.start + taken.number  # of tokens that are no neighbours the plan answers for their being rows
        is_fit = last <= len(outputs) == len(inputs) and outputs.stride(1) == 1
        if not is_fit or not inputs.dtype == outputs.dtype == blocks[0].pool.dtype:
            raise RuntimeError(f"rows up to {last} are no rows of {list(inputs.shape)} and {list(outputs.shape)}")
        launch(inputs, outputs, taken, *[self._placed(block, taken.number) for block in blocks])

    def _placed(self, block: Rows | TokenRows, tokens: int) -> Placed:
        """Rows that all tokens have in common are rows 0, 1, … of a part of the pool."""
        if isinstance(block, TokenRows):
            return Placed(block.pool, block.index)
        if block.count > len(self._order):
            self._order = torch.arange(2 * block.count, device=self._order.device)
        return Placed(block.pool.narrow(0, block.first, block.count), self._order[: block.count].expand(tokens, -1))


def tolerance(dtype: torch.dtype) -> float:
    """How far a kernel may be off, relative to the largest value."""
    return max(2 * torch.finfo(dtype).eps, _LEAST_TOLERANCE)


def find_device_deltas(device: torch.device, dtype: torch.dtype) -> tuple[DeviceDeltas | None, str]:
    """Kernels that have given the right answers on this device, or None, and in words which or why not."""
    if dtype not in _DTYPES:
        return None, f"no kernels for {dtype}"
    most = tolerance(dtype)
    try:
        from server.model.triton_deltas import LAUNCHES  # noqa: PLC0415 - Triton comes with torch on CUDA alone

        worst = max(worst_difference(DeviceDeltas(LAUNCHES, device), name, dtype, device) for name in LAUNCHES)
    except ImportError as error:
        return None, f"Triton is missing: {error}"
    except Exception as error:  # noqa: BLE001 - Triton, the compilers that it starts and the driver raise their own
        return None, f"Triton's kernels cannot be had: {type(error).__name__}: {error}".partition("\n")[0]
    if worst > most:
        return None, f"Triton's kernels are off by {worst:.2g}"
    try:
        has_grouped = worst_run_difference(dtype, device) <= most
        note = "long runs by grouped products" if has_grouped else "no grouped products: they are wrong"
    except (AttributeError, RuntimeError) as error:  # an older torch; a device or a type for which it is a loop
        has_grouped, note = False, f"no grouped products: {error}".partition("\n")[0]
    return DeviceDeltas(LAUNCHES, device, has_grouped=has_grouped), f"by Triton's kernels; {note}"

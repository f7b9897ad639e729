"""The pool: device memory for the tensors of all resident adapters, as rows.

Everything that an adapter keeps resident is a matrix `[rows, width]` (`Block`). The pool is one flat buffer that can be
looked at as rows of any width: row r of width w is elements r·w … r·w + w - 1. So the rows of many adapters, whatever
their methods and widths, are picked out of one tensor by index, in one operation; the memory is bounded exactly; and
nothing depends on which adapters happen to be resident. (S-LoRA's unified paging, Sheng et al. 2023, has the same end
with pages of one width.)

An adapter's rows of one width lie together. Row 0 of every width is zero and nobody's.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping

import torch
from torch import Tensor

_SLACK = 16  # widest rows beside the capacity: the zero row, and what is lost where a width's rows must begin


class RowPool:
    """See the module. Used by one thread."""

    def __init__(self, capacity: int, widest: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """`capacity` in bytes, allocated at once (on a CPU the system hands out what is touched); no row is wider than
        `widest` elements."""
        elements = capacity // dtype.itemsize + _SLACK * widest
        self._buffer = torch.empty(elements, dtype=dtype, device=device)
        self._buffer[:widest] = 0
        self._free = [(widest, elements)]  # ranges of elements, in order, none beside another
        self._rows: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._buffer.device

    def rows(self, width: int) -> Tensor:
        """The whole pool as rows: `[all, width]`."""
        rows = self._rows.get(width)
        if rows is None:
            count = len(self._buffer) // width
            rows = self._rows[width] = self._buffer[: count * width].view(count, width)
        return rows

    def take(self, counts: Mapping[int, int]) -> dict[int, int] | None:
        """Reserve `counts[width]` rows of each width; the first row of each, or None where there is no room."""
        first: dict[int, int] = {}
        for width, count in counts.items():
            row = self._take(width, count)
            if row is None:
                self.give(first, counts)
                return None
            first[width] = row
        return first

    def give(self, first: Mapping[int, int], counts: Mapping[int, int]) -> None:
        """Give back what `take` reserved."""
        for width, row in first.items():
            insort(self._free, (row * width, (row + counts[width]) * width))
        merged: list[tuple[int, int]] = []
        for start, stop in self._free:
            if merged and merged[-1][1] == start:
                merged[-1] = merged[-1][0], stop
            else:
                merged.append((start, stop))
        self._free = merged

    def _take(self, width: int, count: int) -> int | None:
        """First fit."""
        for index, (start, stop) in enumerate(self._free):
            row = -(-start // width)
            end = (row + count) * width
            if end <= stop:
                self._free[index : index + 1] = [
                    part for part in ((start, row * width), (end, stop)) if part[0] < part[1]
                ]
                return row
        return None

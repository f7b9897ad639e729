"""The pool's laws, against a slow map of every element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters import RowPool

CPU = torch.device("cpu")
WIDTHS = [(1, 3, 8, 48), (3, 48, 768)]

Counts = dict[int, int]


@dataclass
class ElementMap:
    """Says for every element whether it is somebody's; looks at every row there is."""

    used: bytearray

    def take(self, counts: Mapping[int, int]) -> Counts | None:
        before = bytes(self.used)
        first: Counts = {}
        for width, count in counts.items():
            for row in range(len(self.used) // width - count + 1):
                if 1 not in self.used[row * width : (row + count) * width]:
                    first[width] = row
                    self.mark(first, counts, {width}, 1)
                    break
            else:
                self.used[:] = before
                return None
        return first

    def give(self, first: Mapping[int, int], counts: Mapping[int, int]) -> None:
        self.mark(first, counts, set(first), 0)

    def mark(self, first: Mapping[int, int], counts: Mapping[int, int], widths: set[int], value: int) -> None:
        for width in widths:
            start, stop = first[width] * width, (first[width] + counts[width]) * width
            assert all(old != value for old in self.used[start:stop]), "two own one element"
            self.used[start:stop] = bytes([value]) * (stop - start)


@dataclass
class Checked:
    """A pool beside its map; every adapter's rows are filled with a number of its own."""

    pool: RowPool
    widest: int
    held: dict[int, tuple[Counts, Counts]] = field(default_factory=dict)  # number → first rows, counts
    number: int = 0

    def __post_init__(self) -> None:
        self.map = ElementMap(bytearray([1]) * self.widest + bytearray(self.size - self.widest))

    @property
    def size(self) -> int:
        return len(self.pool.rows(1))

    def take(self, counts: Counts) -> bool:
        first = self.pool.take(counts)
        assert first == self.map.take(counts), "another place than the first that is free, or room not found"
        if first is not None:
            self.number += 1
            self.held[self.number] = first, counts
            for width, row in first.items():
                rows = self.pool.rows(width)[row : row + counts[width]]
                assert len(rows) == counts[width], "rows beyond the buffer"
                rows.fill_(self.number)
        return first is not None

    def give(self, number: int) -> None:
        first, counts = self.held.pop(number)
        self.pool.give(first, counts)
        self.map.give(first, counts)

    def check(self, widths: tuple[int, ...]) -> None:
        assert all(not self.pool.rows(width)[0].any() for width in widths), "the zero row was written"
        for number, (first, counts) in self.held.items():
            for width, row in first.items():
                assert (self.pool.rows(width)[row : row + counts[width]] == number).all(), "another wrote here"


@st.composite
def workloads(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[Counts | int]]:
    """Widths, a capacity in elements, and takes (counts) and gives (which of those held)."""
    widths = draw(st.sampled_from(WIDTHS))
    elements = draw(st.integers(0, 40 * widths[-1]))
    counts = st.dictionaries(st.sampled_from(widths), st.integers(1, 30), min_size=1)
    return widths, elements, draw(st.lists(counts | st.integers(0, 9), min_size=1, max_size=25))


@settings(deadline=None, max_examples=60)
@given(workloads())
def test_no_two_adapters_share_an_element_and_room_is_found_where_there_is_any(
    workload: tuple[tuple[int, ...], int, list[Counts | int]],
) -> None:
    widths, elements, operations = workload
    world = Checked(RowPool(4 * elements, widths[-1], dtype=torch.float32, device=CPU), widths[-1])
    for operation in operations:
        if isinstance(operation, dict):
            world.take(operation)
        elif world.held:
            world.give(sorted(world.held)[operation % len(world.held)])
        world.check(widths)
    for number in list(world.held):
        world.give(number)
    assert world.take({1: world.size - world.widest}), "what was given back is not one range again"
    world.check(widths)


def test_a_take_that_fails_reserves_nothing() -> None:
    pool = RowPool(4 * 100, 8, dtype=torch.float32, device=CPU)
    whole = len(pool.rows(1)) - 8
    assert pool.take({1: 50, 3: 5, 8: whole // 8}) is None
    assert pool.take({1: whole}) == {1: 8}


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(st.integers(1, 900), st.integers(1, 40), min_size=1, max_size=8),
    st.integers(0, 100),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_an_empty_pool_fits_an_adapter_of_its_capacity(counts: Counts, wider: int, dtype: torch.dtype) -> None:
    capacity = sum(width * count for width, count in counts.items()) * dtype.itemsize
    pool = RowPool(capacity, max(counts) + wider, dtype=dtype, device=CPU)
    assert pool.take(counts) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_holds_little_more_than_its_capacity(dtype: torch.dtype) -> None:
    pool = RowPool(1 << 20, 64, dtype=dtype, device=CPU)
    taken = 0
    while pool.take({64: 16}) is not None:
        taken += 16 * 64 * dtype.itemsize
    assert 1 << 20 <= taken <= (1 << 20) + 16 * 64 * dtype.itemsize

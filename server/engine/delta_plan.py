"""A step's row deltas: which tokens meet which adapters' rows at which sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from torch import Tensor

from server.adapters import Resident, RowPool
from server.adapters.resident import Layout, SiteBlocks
from server.engine.packing import MANY_TOKENS, Placed
from server.model import BaseShape, Rows, Segment, SitePlan
from server.model.kv_cache import index_tensor


def plan_deltas(placed: list[Placed], shape: BaseShape, pool: RowPool) -> SitePlan:
    """At each level of the stacks: adapters with many tokens each by themselves, the others by their layout, all
    tokens of one layout together with each token's own rows."""
    depth = max(len(item.stack) for item in placed)
    plan: dict[str, list[list[Segment]]] = {}
    for level in range(depth):
        for runs in _applied_together(placed, level):
            for site, segment in _segments(runs, shape, pool):
                levels = plan.setdefault(site, [[] for _ in range(depth)])
                levels[level].append(segment)
    return plan


class _Run(NamedTuple):
    """Neighbouring rows of a step that have the same adapter at a level of their stacks."""

    resident: Resident
    tokens: slice
    logits: slice


class _Segments:
    """Makes the segments of tokens whose adapters have one layout, at all its sites."""

    def __init__(self, pool: RowPool, spans: list[tuple[Resident, slice]]) -> None:
        """`spans` are in the order of their tokens."""
        self.spans = spans
        self._pool = pool
        self._firsts: dict[int, Tensor] = {}

    @cached_property
    def _tokens(self) -> slice | Tensor:
        """All tokens, as a slice where they are neighbours."""
        starts, stops = [span.start for _, span in self.spans], [span.stop for _, span in self.spans]
        if starts[1:] == stops[:-1]:
            return slice(starts[0], stops[-1])
        indices = [token for _, span in self.spans for token in range(span.start, span.stop)]
        return index_tensor(indices, self._pool.device)

    def segment(self, delta: SiteBlocks) -> Segment:
        """At one site."""
        if len(self.spans) == 1:
            resident, span = self.spans[0]
            return Segment(span, delta.kind, resident.rows(self._pool, delta.blocks), is_each=False)
        rows = tuple(
            Rows(self._pool.rows(block.width), self._first(block.width) + block.offset, block.height)
            for block in delta.blocks
        )
        return Segment(self._tokens, delta.kind, rows, is_each=True)

    def _first(self, width: int) -> Tensor:
        """Each token's adapter's first row of a width: `[tokens]`."""
        first = self._firsts.get(width)
        if first is None:
            rows = [resident.first[width] for resident, span in self.spans for _ in range(span.start, span.stop)]
            first = self._firsts[width] = index_tensor(rows, self._pool.device)
        return first


def _applied_together(placed: list[Placed], level: int) -> Iterator[list[_Run]]:
    few: dict[Layout, list[_Run]] = {}
    for run in _runs(placed, level):
        if run.tokens.stop - run.tokens.start < MANY_TOKENS:
            few.setdefault(run.resident.layout, []).append(run)
        else:
            yield [run]
    yield from few.values()


def _segments(runs: list[_Run], shape: BaseShape, pool: RowPool) -> Iterator[tuple[str, Segment]]:
    """The segments of runs of one layout, by site."""
    for at_head in (False, True):
        spans = [(run.resident, run.logits if at_head else run.tokens) for run in runs]
        segments = _Segments(pool, [(resident, span) for resident, span in spans if span.start < span.stop])
        for delta in runs[0].resident.layout.deltas:
            if shape.sites[delta.site].is_head == at_head and segments.spans:
                yield delta.site, segments.segment(delta)


def _runs(placed: list[Placed], level: int) -> Iterable[_Run]:
    """Neighbouring rows that have the same adapter at a level."""
    adapters = (item.stack[level] if len(item.stack) > level else None for item in placed)
    for resident, pairs in groupby(zip(adapters, placed, strict=True), key=itemgetter(0)):
        if resident is not None:
            rows = [item for _, item in pairs]
            first, last = rows[0], rows[-1]
            yield _Run(resident, slice(first.start, last.stop), slice(first.logit_start, last.logit_stop))

"""A step's row deltas: which tokens meet which adapters' rows at which sites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from server.adapters import Resident, RowPool
from server.adapters.resident import Block, Layout
from server.engine.packing import MANY_TOKENS, Placed
from server.model import BaseShape, DeltaKind, RunRows, Segment, SitePlan, TokenRows
from server.model.grouped_products import ALIGNED
from server.model.kernels import kernel_at, run_kernel_at
from server.model.kv_cache import index_tensor
from server.model.row_deltas import DeltaBackend, Kernel

_Span = tuple[Resident, slice]  # neighbouring tokens, or neighbouring rows among the logits, of one adapter


class _Run(NamedTuple):
    """Neighbouring rows of a step that have the same adapter at a level of their stacks."""

    resident: Resident
    tokens: slice
    logits: slice


class DeltaPlanner:
    """Plans step after step: at each level of the stacks adapters with many tokens each by themselves, or as runs where
    something computes these together, the others by their layout, all tokens of one layout together with each token's
    own rows.

    What does not change between steps is kept: of a layout where its blocks lie, and the last plan while the rows of
    the step have the same stacks at the same places, as streams that all decode have.
    """

    def __init__(self, shape: BaseShape, pool: RowPool, kernels: DeltaBackend | None) -> None:
        """`kernels` take the place of kinds where there are any."""
        self._shape = shape
        self._pool = pool
        self._kernels = kernels
        self._templates: WeakKeyDictionary[Layout, list[_Template]] = WeakKeyDictionary()
        self._last: tuple[list[tuple[object, ...]], SitePlan] = ([], {})

    def plan(self, placed: list[Placed]) -> SitePlan:
        """The plan of a step's rows."""
        depth = max(len(item.stack) for item in placed)
        if not depth:
            return {}
        places: list[tuple[object, ...]] = [(item.stack, item.stop, item.logit_stop) for item in placed]
        if places != self._last[0]:
            plan: dict[str, list[list[Segment]]] = {}
            for level in range(depth):
                for site, segment in self._segments(placed, level):
                    levels = plan.get(site)
                    if levels is None:
                        levels = plan[site] = [[] for _ in range(depth)]
                    levels[level].append(segment)
            self._last = places, plan
        return self._last[1]

    def _segments(self, placed: list[Placed], level: int) -> Iterator[tuple[str, Segment]]:
        """Those of a level, by site."""
        runs: dict[Layout, list[_Run]] = {}
        for run in _runs(placed, level):
            runs.setdefault(run.resident.layout, []).append(run)
        for layout, own in runs.items():
            for template in self._templates_of(layout):
                yield from template.segments(own, self._pool)

    def _templates_of(self, layout: Layout) -> list[_Template]:
        templates = self._templates.get(layout)
        if templates is None:
            parts: dict[tuple[bool, bool], list[_Delta]] = {}
            for delta in layout.deltas:
                site = self._shape.sites[delta.site]
                kernel = kernel_at(self._shape, self._kernels, delta.site, delta.kind)
                part = parts.setdefault((site.is_head, delta.kind.is_elementwise), [])
                run_kernel = run_kernel_at(self._shape, self._kernels, delta.site, delta.kind)
                part.append(_Delta(delta.site, delta.kind, delta.blocks, kernel, run_kernel))
            work = 0 if self._kernels is None else self._kernels.run_work
            templates = [_Template(deltas, *which, self._pool.device, work) for which, deltas in parts.items()]
            self._templates[layout] = templates
        return templates


class _Delta(NamedTuple):
    """A layout's delta at a site, and what computes it."""

    site: str
    kind: DeltaKind
    blocks: Sequence[Block]
    kernel: Kernel | None
    run_kernel: Kernel | None  # for runs of many tokens


_Shaped = tuple[_Delta, list[tuple[int, int]]]  # with its blocks' widths and rows


class _Template:
    """Deltas of one layout that take the same tokens together, for any tokens."""

    def __init__(
        self, deltas: list[_Delta], is_head: bool, is_elementwise: bool, device: torch.device, run_work: int
    ) -> None:
        """`is_head`: at the output layer, whose rows are the step's logits; elsewhere they are its tokens; `run_work`
        is that of the kernels."""
        self._is_head = is_head
        self._few: float = MANY_TOKENS - 1  # of one adapter, at most so many tokens are taken together with others'
        if is_elementwise:
            self._few = math.inf
        elif any(delta.kind.by_adapter for delta in deltas):
            self._few = 0
        elif all(delta.kernel is not None for delta in deltas):
            tallest = max(block.height for delta in deltas for block in delta.blocks)
            self._few = max(self._few, run_work // tallest)
        self._deltas: list[_Shaped] = []
        offsets: dict[tuple[int, int], list[int]] = {}  # by width and rows: blocks of one shape are found at once
        for delta in deltas:
            shapes = []
            for place, block in enumerate(delta.blocks):
                is_table = delta.kind.looks_up and place == 0  # of which its first row is enough to know
                shapes.append((block.width, 1 if is_table else block.height))
                offsets.setdefault(shapes[-1], []).append(block.offset)
            self._deltas.append((delta, shapes))
        self._within = {  # [blocks, 1, rows], counted from the adapter's first row of the width
            shape: index_tensor(before, device)[:, None, None] + torch.arange(shape[1], device=device)
            for shape, before in offsets.items()
        }

    def segments(self, runs: list[_Run], pool: RowPool) -> Iterator[tuple[str, Segment]]:
        """Those of the runs, which are in the order of their tokens."""
        few: list[_Span] = []
        many: list[_Span] = []
        for run in runs:
            span = run.logits if self._is_head else run.tokens
            if span.start < span.stop:
                (few if span.stop - span.start <= self._few else many).append((run.resident, span))
        if len(few) == 1:
            yield from self._own_rows(*few[0], self._deltas, pool)
        elif few:
            yield from self._each(few, pool)
        apart = self._deltas if len(many) == 1 else [each for each in self._deltas if each[0].run_kernel is None]
        if many and len(apart) < len(self._deltas):
            yield from self._in_runs(many, pool)
        for resident, span in many:
            yield from self._own_rows(resident, span, apart, pool)

    def _own_rows(
        self, resident: Resident, tokens: slice, deltas: list[_Shaped], pool: RowPool
    ) -> Iterator[tuple[str, Segment]]:
        """All tokens are of one adapter. The matrix products of many are faster than a kernel that goes by token."""
        for delta, _ in deltas:
            kernel = delta.kernel if tokens.stop - tokens.start <= self._few else None
            rows = resident.rows(pool, delta.blocks)
            yield delta.site, Segment(tokens, delta.kind, rows, is_each=False, kernel=kernel)

    def _each(self, spans: list[_Span], pool: RowPool) -> Iterator[tuple[str, Segment]]:
        """Each token has its own rows."""
        owners = [resident for resident, span in spans for _ in range(span.start, span.stop)]
        rows = {shape: iter(index.unbind()) for shape, index in self._indices(owners, pool)}
        tokens = _tokens(spans, pool)
        for delta, shapes in self._deltas:
            blocks = tuple([TokenRows(pool.rows(shape[0]), next(rows[shape])) for shape in shapes])
            yield delta.site, Segment(tokens, delta.kind, blocks, is_each=True, kernel=delta.kernel)

    def _in_runs(self, spans: list[_Span], pool: RowPool) -> Iterator[tuple[str, Segment]]:
        """Those deltas for which there is something that takes runs of many tokens, each with its adapter's rows."""
        rows = {  # filled up with row 0 of the pool, which is zero
            shape: iter(functional.pad(index, (0, -shape[1] % ALIGNED)).unbind())
            for shape, index in self._indices([resident for resident, _ in spans], pool)
        }
        tokens = _tokens(spans, pool)
        ends = index_tensor(list(accumulate(span.stop - span.start for _, span in spans)), pool.device, bits=32)
        for delta, shapes in self._deltas:
            blocks = tuple([RunRows(pool.rows(shape[0]), next(rows[shape]), ends) for shape in shapes])
            if delta.run_kernel is not None:
                yield delta.site, Segment(tokens, delta.kind, blocks, is_each=False, kernel=delta.run_kernel)

    def _indices(self, owners: list[Resident], pool: RowPool) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """By a blocks' shape the rows in the pool `[blocks, owners, rows]`, blocks in the order of the deltas."""
        widths = {width for width, _ in self._within}
        firsts = {width: index_tensor([owner.first[width] for owner in owners], pool.device) for width in widths}
        for shape, within in self._within.items():
            yield shape, firsts[shape[0]][:, None] + within


def _tokens(spans: list[_Span], pool: RowPool) -> slice | Tensor:
    """All tokens, as a slice where they are neighbours."""
    starts, stops = [span.start for _, span in spans], [span.stop for _, span in spans]
    if starts[1:] == stops[:-1]:
        return slice(starts[0], stops[-1])
    return index_tensor([token for _, span in spans for token in range(span.start, span.stop)], pool.device)


def _runs(placed: list[Placed], level: int) -> Iterable[_Run]:
    """Neighbouring rows that have the same adapter at a level."""
    adapters = (item.stack[level] if len(item.stack) > level else None for item in placed)
    for resident, pairs in groupby(zip(adapters, placed, strict=True), key=itemgetter(0)):
        if resident is not None:
            rows = [item for _, item in pairs]
            first, last = rows[0], rows[-1]
            yield _Run(resident, slice(first.start, last.stop), slice(first.logit_start, last.logit_stop))

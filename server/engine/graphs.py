"""CUDA graphs of steps in which every row has one token: captured once, launched as one.

A graph repeats the same kernels on the same memory. So what differs between steps must be in memory, and what is not
must be the same: `Composition` is that, `GraphInputs` is the memory. Rows are padded to few numbers, block tables to
powers of two. Every layout of row deltas that somebody has is applied to every row: to those without such an adapter
with row 0 of the pool, which is zero, and zeros change nothing, whatever the kind. So one graph serves any mix of tasks
of these layouts, and prompts and prefixes, which are pages, need none of their own. Rows that only pad read and
write the scratch page of the KV cache.

`GraphInputs` does not depend on CUDA; `DecodeGraphs` does.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.adapters import Resident, RowPool
from server.adapters.resident import Layout
from server.model import AttentionPlan, DecodeGroup, DeltaKind, KVCache, Segment, SitePlan, TokenRows, VarlenRows
from server.model.kv_cache import NULL_PAGE
from server.model.row_deltas import Kernel

logger = logging.getLogger("medley.graphs")

_MAX_GRAPHS = 128  # captured ones that are kept, least recently used first to go; each holds some MB beside the pool
_MAX_SEEN = 1024  # compositions that are remembered as met once
_MAX_FIRST_ROWS = 64  # per row of the step: widths of its layouts' rows, all layouts of all levels together
_ROW_STEP = 8  # beyond four rows their number is padded to a multiple of it


def padded_rows(rows: int, most: int) -> int:
    """1, 2, 4, 8, 16, 24, 32, … up to `most`."""
    few = next((size for size in (1, 2, 4) if size >= rows), None)
    return min(few or -(-rows // _ROW_STEP) * _ROW_STEP, most)


class DecodeRow(NamedTuple):
    """A row of one token."""

    token: int
    place: int  # in its context
    position: int  # the same, less the virtual tokens before it that take no position
    pages: Sequence[int]  # that hold its context, the token itself included
    stack: tuple[Resident, ...]


@dataclass(frozen=True)
class Composition:
    """What two steps must have in common for one graph to serve both."""

    rows: int  # padded
    pages: int  # of each row's block table, padded
    deltas: tuple[tuple[int, Layout], ...]  # the layouts of row deltas there are, each with its level in the stacks


@dataclass(frozen=True)
class StaticBatch:
    """The memory of one composition: views, the same at every step."""

    token_ids: Tensor  # [rows]
    positions: Tensor  # [rows]
    attention: AttentionPlan
    logit_tokens: Tensor  # [rows]
    firsts: dict[tuple[int, Layout], dict[int, Tensor]]  # width → each row's adapter's first pool row [rows]


class _IndexedRows(TokenRows):
    """`index` `[tokens, rows]` is the transpose of what lies in memory."""

    def gather(self) -> Tensor:
        """`[tokens, rows, width]`."""
        index = self.index.t()
        picked = self.pool.index_select(0, index.flatten())
        return picked.view(*index.shape, picked.shape[-1]).transpose(0, 1)


class GraphInputs:
    """The inputs of padded steps of one token per row."""

    def __init__(
        self,
        cache: KVCache,
        pool: RowPool,
        *,
        max_rows: int,
        max_length: int,
        is_varlen: bool,
        kernel_of: Callable[[str, DeltaKind], Kernel | None],
    ) -> None:
        """`max_length` is the longest context; `is_varlen` whether attention takes `VarlenRows`; `kernel_of` what
        computes a kind of delta at a site in its place."""
        device = pool.device
        self._pool = pool
        self._page_size, self._scratch_page = cache.page_size, cache.scratch_page
        self._max_rows = max_rows
        self._is_varlen = is_varlen
        self._kernel_of = kernel_of
        self._group_pages = _pages_gathered_at_once(cache)
        widest = _power_of_two(-(-max_length // cache.page_size))
        numbers = max_rows * (3 + _MAX_FIRST_ROWS) + -(-max_rows * (1 + widest) // 2) + 1
        self._host = torch.zeros(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._static = torch.zeros(numbers, dtype=torch.int64, device=device)
        self._order = torch.arange(max_rows + 1, device=device)
        self._starts = self._order.int()
        self._copied = None
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's

    def fill(self, rows: Sequence[DecodeRow]) -> Composition | None:
        """Write a step's rows to the device; None where they do not fit."""
        composition = self._composition(rows)
        if composition is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copy out of this memory, long done
        count = len(rows)
        parts = _split(self._host, composition)
        longs, lengths, tables = parts.longs.numpy(), parts.lengths.numpy(), parts.tables.numpy()
        longs[:, count:], lengths[count:], tables[count:] = 0, 1, NULL_PAGE
        longs[2, count:], tables[count:, 0] = self._scratch_page * self._page_size, self._scratch_page
        size = self._page_size
        longs[0, :count] = [row.token for row in rows]
        longs[1, :count] = [row.position for row in rows]
        longs[2, :count] = [row.pages[row.place // size] * size + row.place % size for row in rows]
        lengths[:count] = [row.place + 1 for row in rows]
        for table, row in zip(tables, rows, strict=False):
            table[: len(row.pages)], table[len(row.pages) :] = row.pages, NULL_PAGE
        at = 3
        for level, layout in composition.deltas:
            firsts = [
                row.stack[level].first if len(row.stack) > level and row.stack[level].layout == layout else None
                for row in rows
            ]
            for width in layout.delta_rows:
                longs[at, :count] = [0 if first is None else first[width] for first in firsts]
                at += 1
        self._static[: parts.end].copy_(self._host[: parts.end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return composition

    def batch(self, composition: Composition) -> StaticBatch:
        """The memory that `fill` writes to, for this composition."""
        parts, count = _split(self._static, composition), composition.rows
        firsts: dict[tuple[int, Layout], dict[int, Tensor]] = {}
        at = 3
        for level, layout in composition.deltas:
            widths = list(layout.delta_rows)
            firsts[level, layout] = {width: parts.longs[at + index] for index, width in enumerate(widths)}
            at += len(widths)
        varlen = None
        groups: list[DecodeGroup] = []
        if self._is_varlen:
            longest = composition.pages * self._page_size
            varlen = VarlenRows(self._starts[: count + 1], parts.lengths, parts.tables, 1, longest)
        else:
            step = max(1, self._group_pages // composition.pages)
            for start in range(0, count, step):
                stop = min(start + step, count)
                groups.append(DecodeGroup(start, stop, parts.tables[start:stop], parts.lengths[start:stop]))
        order = self._order[:count]
        attention = AttentionPlan(parts.longs[2], None, order, groups, [], varlen)
        return StaticBatch(parts.longs[0], parts.longs[1], attention, order, firsts)

    def deltas(self, static: StaticBatch) -> SitePlan:
        """The row deltas. Works on the device, so it belongs into the graph."""
        depth = 1 + max((level for level, _ in static.firsts), default=0)
        plan: dict[str, list[list[Segment]]] = {}
        tokens = slice(0, len(static.token_ids))
        for (level, layout), firsts in static.firsts.items():
            indices = {
                # row 0 of the pool for each of the rows of who has no such adapter
                width: (torch.arange(*layout.delta_rows[width], device=self._pool.device)[:, None] + first)
                * (first > 0)
                for width, first in firsts.items()
            }
            for site, kind, blocks in layout.deltas:
                rows: list[TokenRows] = []
                for block in blocks:
                    start = block.offset - layout.delta_rows[block.width][0]
                    index = indices[block.width][start : start + block.height]
                    rows.append(_IndexedRows(self._pool.rows(block.width), index.t()))
                levels = plan.setdefault(site, [[] for _ in range(depth)])
                kernel = self._kernel_of(site, kind)
                levels[level].append(Segment(tokens, kind, tuple(rows), is_each=True, kernel=kernel))
        return plan

    def _composition(self, rows: Sequence[DecodeRow]) -> Composition | None:
        layouts = {(level, item.layout) for row in rows for level, item in enumerate(row.stack) if item.layout.deltas}
        # a table's rows are too many for an index of all, rows of those applied by adapter too many for copies of all
        if any(layout.looks_up or layout.by_adapter for _, layout in layouts):
            return None
        deltas = tuple(sorted(layouts, key=lambda each: (each[0], hash(each[1]))))
        if len(rows) > self._max_rows or sum(len(layout.delta_rows) for _, layout in deltas) > _MAX_FIRST_ROWS:
            return None
        pages = _power_of_two(max(len(row.pages) for row in rows))
        return Composition(padded_rows(len(rows), self._max_rows), pages, deltas)


class _Parts(NamedTuple):
    """A composition's part of the memory."""

    longs: Tensor  # [3 + first rows, rows], int64: token ids, positions, slots, then each layout's widths
    lengths: Tensor  # [rows], int32
    tables: Tensor  # [rows, pages], int32
    end: int  # one past its last element


def _split(memory: Tensor, composition: Composition) -> _Parts:
    rows, pages = composition.rows, composition.pages
    kinds = 3 + sum(len(layout.delta_rows) for _, layout in composition.deltas)
    ints = -(-rows * (1 + pages) // 2)
    words = memory[kinds * rows : kinds * rows + ints].view(torch.int32)
    return _Parts(
        memory[: kinds * rows].view(kinds, rows),
        words[:rows],
        words[rows : rows * (1 + pages)].view(rows, pages),
        kinds * rows + ints,
    )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


# What a group of rows gathers of one layer's pages where no kernel reads them in place: memory that a graph holds.
_GATHER_BYTES = 256 * 1024**2


def _pages_gathered_at_once(cache: KVCache) -> int:
    return max(1, _GATHER_BYTES // max(layer[:, 0].nbytes for layer in cache.layers))


class DecodeGraphs:
    """Captured steps. One that was not captured runs as it is, and is captured when it is met again."""

    def __init__(self, forward: Callable[[Composition], Tensor], max_rows: int) -> None:
        """`forward` runs a composition on its static inputs: logits `[rows, vocabulary]`."""
        self._forward = forward
        self._max_rows = max_rows
        self._graphs: OrderedDict[Composition, torch.cuda.CUDAGraph] = OrderedDict()
        self._seen: OrderedDict[Composition, bool] = OrderedDict()  # whether it may be captured
        self._memory = torch.cuda.graph_pool_handle()
        self._logits: Tensor | None = None  # [max_rows, vocabulary], what every graph writes to

    def run(self, composition: Composition) -> Tensor:
        """Logits `[rows, vocabulary]`, valid until the next call."""
        graph = self._graphs.get(composition)
        if graph is not None:
            assert self._logits is not None
            self._graphs.move_to_end(composition)
            graph.replay()
            return self._logits[: composition.rows]
        logits = self._forward(composition)
        can_capture = self._seen.get(composition)
        if can_capture:
            can_capture = self._capture(composition, logits)
        self._seen[composition] = can_capture is not False
        self._seen.move_to_end(composition)
        while len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)
        return logits

    def _capture(self, composition: Composition, logits: Tensor) -> bool:
        """Whether it could. `logits` are of the same step, run just before: what must be loaded or chosen at first use
        is."""
        if self._logits is None:
            self._logits = logits.new_empty(self._max_rows, logits.shape[1])
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads go on loading adapters: what they ask of CUDA is none of the capture's business
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._logits[: composition.rows].copy_(self._forward(composition))
        except RuntimeError as error:  # the class's own code may wait for the device, which no graph can hold
            logger.warning("steps of this composition cannot be captured as a CUDA graph and run without: %s", error)
            return False
        self._graphs[composition] = graph
        while len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return True

"""A step's batch: the schedule as tensors. Built anew for each step; into one that was built before its tokens were
known these are put when they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from server.adapters import RowPool
from server.engine.delta_plan import DeltaPlanner
from server.engine.graphs import Composition, DecodeRow, GraphInputs
from server.engine.packing import Placed, place
from server.engine.prefixes import PrefixRun, unnumbered
from server.engine.scheduler import Row, Schedule
from server.engine.sequence import Sequence
from server.model import (
    AttentionPlan,
    BaseShape,
    DecodeGroup,
    KVCache,
    PrefillRow,
    SitePlan,
    VarlenRows,
)
from server.model.kernels import Kernels
from server.model.kv_cache import NULL_PAGE, index_tensor

# What a decode group gathers of one layer's pages. On a CPU larger copies leave the processor's cache between being
# written and being read, and cost up to twice as much (measured on two cores with 32 MB of cache).
_GATHER_BYTES = {"cpu": 4 * 1024**2, "cuda": 256 * 1024**2}


@dataclass(frozen=True)
class LogitRows:
    """A sequence's rows among the step's logits."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool  # the last of them chooses the next token; the others score the prompt


@dataclass(frozen=True)
class StepBatch:
    """What one forward pass takes."""

    token_ids: Tensor  # [num_tokens]; 0 where the embedding is given
    positions: Tensor  # [num_tokens]
    embeddings: list[tuple[int, Tensor]]  # virtual tokens: the first's index in the step, [n, hidden]
    attention: AttentionPlan
    deltas: SitePlan
    logit_tokens: Tensor  # [num_logits], ascending
    logit_rows: list[LogitRows]
    num_virtual: int  # virtual tokens run in this step
    num_adapters: int  # distinct ones
    wants_states: bool = False  # a classification head takes the inputs of the base's own
    composition: Composition | None = None  # if its inputs are `GraphInputs`, which then make its deltas too


class BatchBuilder:
    """Builds batches for one base and one cache geometry."""

    def __init__(
        self,
        shape: BaseShape,
        pool: RowPool,
        page_size: int,
        device: torch.device,
        *,
        is_varlen: bool = False,
        kernels: Kernels | None = None,
        graph_inputs: GraphInputs | None = None,
    ) -> None:
        """`device` is where the batch's tensors go; `pool` has the adapters' rows. `is_varlen` says for which attention
        to plan, `kernels` which there are; steps of one token per row go into `graph_inputs` where there are any."""
        self._shape = shape
        self._pool = pool
        self._deltas = DeltaPlanner(shape, pool, kernels and kernels.deltas)
        self._page_size = page_size
        self._device = device
        largest = max(KVCache.page_bytes([layer], page_size, shape.dtype) for layer in shape.layers)
        # of a group, at most
        self._gathered_pages = math.inf if kernels and kernels.decode else _GATHER_BYTES[device.type] // largest
        self._is_varlen = is_varlen
        self._graph_inputs = graph_inputs

    def build(self, schedule: Schedule) -> StepBatch:
        """The batch of a schedule with at least one row. Tokens that are not known yet are 0: see `set_tokens`."""
        placed = place(schedule)
        if self._graph_inputs is not None and all(map(_is_decode, placed)):
            padded = self._padded(placed, self._graph_inputs)
            if padded is not None:
                return padded
        virtual = [given for item in placed for given in _virtual_embeddings(item, self._pool)]
        return StepBatch(
            token_ids=self._tensor([token for item in placed for token in _token_ids(item)]),
            positions=self._tensor([at for item in placed for at in _positions(item.row)]),
            embeddings=virtual,
            attention=self._attention(placed, schedule),
            deltas=self._deltas.plan(placed),
            logit_tokens=self._tensor(
                [token for item in placed for token in range(item.stop - item.num_logits, item.stop)]
            ),
            logit_rows=_logit_rows(placed),
            num_virtual=sum(map(_num_virtual, placed)),
            wants_states=any(isinstance(run, Sequence) and run.request.classify for run in schedule.rows),
            num_adapters=_num_adapters(placed),
        )

    def set_tokens(self, batch: StepBatch) -> None:
        """Give a batch that was built ahead of its tokens, one a row, each sequence's last."""
        tokens = self._tensor([rows.sequence.output[-1] for rows in batch.logit_rows])
        batch.token_ids[: len(tokens)].copy_(tokens, non_blocking=True)

    def _padded(self, placed: list[Placed], inputs: GraphInputs) -> StepBatch | None:
        """A batch of rows of one token, in memory that a graph can refer to; None where it does not fit there."""
        rows = [
            DecodeRow(
                token=next(iter(_token_ids(item))),
                place=item.row.start,
                position=next(iter(_positions(item.row))),
                pages=_block_table(item.row)[: -(-item.row.stop // self._page_size)],
                stack=item.stack,
            )
            for item in placed
        ]
        composition = inputs.fill(rows)
        if composition is None:
            return None
        static = inputs.batch(composition)
        return StepBatch(
            token_ids=static.token_ids,
            positions=static.positions,
            embeddings=[],
            attention=static.attention,
            deltas={},
            logit_tokens=static.logit_tokens,
            logit_rows=_logit_rows(placed),
            num_virtual=0,
            num_adapters=_num_adapters(placed),
            composition=composition,
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return index_tensor(values, self._device)

    def _attention(self, placed: list[Placed], schedule: Schedule) -> AttentionPlan:
        if self._is_varlen:
            return self._varlen_attention(placed, schedule)
        slots: list[int] = []
        decode: list[tuple[Placed, list[int]]] = []
        prefill: list[PrefillRow] = []
        for item in placed:
            table = _block_table(item.row)
            slots += self._slots(table, item.row.start, item.row.stop)
            pages = table[: -(-item.row.stop // self._page_size)]
            if item.row.count == 1:
                decode.append((item, pages))
            else:
                prefill.append(PrefillRow(item.start, item.stop, self._tensor(pages), item.row.stop))
        sources, more_slots = self._shared_tails(placed, schedule)
        groups = list(self._decode_groups(decode))
        return AttentionPlan(
            slots=self._tensor(slots + more_slots),
            sources=self._tensor([*range(len(slots)), *sources]) if sources else None,
            decode_tokens=self._tensor([item.start for rows in groups for item, _ in rows]),
            decode=[
                self._decode_group(rows, stop - len(rows))
                for rows, stop in zip(groups, accumulate(map(len, groups)), strict=True)
            ],
            prefill=prefill,
        )

    def _varlen_attention(self, placed: list[Placed], schedule: Schedule) -> AttentionPlan:
        tables = [_block_table(item.row)[: -(-item.row.stop // self._page_size)] for item in placed]
        slots = [
            slot
            for item, table in zip(placed, tables, strict=True)
            for slot in self._slots(table, item.row.start, item.row.stop)
        ]
        sources, more_slots = self._shared_tails(placed, schedule)
        lengths = [item.row.stop for item in placed]
        return AttentionPlan(
            slots=self._tensor(slots + more_slots),
            sources=self._tensor([*range(len(slots)), *sources]) if sources else None,
            decode_tokens=self._tensor([]),
            decode=[],
            prefill=[],
            varlen=VarlenRows(
                starts=index_tensor([item.start for item in placed] + [placed[-1].stop], self._device, bits=32),
                lengths=index_tensor(lengths, self._device, bits=32),
                block_tables=index_tensor(_padded_tables(tables), self._device, bits=32),
                most_tokens=max(item.row.count for item in placed),
                longest=max(lengths),
            ),
        )

    def _slots(self, table: list[int], start: int, stop: int) -> list[int]:
        """Cache slots of the positions `start` … `stop` - 1."""
        size = self._page_size
        return [table[at // size] * size + at % size for at in range(start, stop)]

    def _shared_tails(self, placed: list[Placed], schedule: Schedule) -> tuple[list[int], list[int]]:
        """A prefix's last, partly filled page is copied before the step; what of it runs in this very step is
        written to the copies as well: (tokens, slots)."""
        tokens: list[int] = []
        slots: list[int] = []
        for copy in schedule.page_copies:
            sequence = copy.sequence
            first, last = sequence.num_shared_pages * self._page_size, sequence.num_prefix
            for item in placed:
                if item.row.run is sequence.prefix:
                    start, stop = max(first, item.row.start), min(last, item.row.stop)
                    tokens += range(item.start + start - item.row.start, item.start + stop - item.row.start)
                    slots += self._slots(sequence.block_table, start, stop)
        return tokens, slots

    def _decode_groups(self, rows: list[tuple[Placed, list[int]]]) -> Iterable[list[tuple[Placed, list[int]]]]:
        """Rows of like length together, each group's pages of one layer small enough to stay in the cache; the longest
        first, for threads take rows one by one, and a long one that is taken last is waited for."""
        group: list[tuple[Placed, list[int]]] = []
        for row in sorted(rows, key=lambda row: len(row[1]), reverse=True):
            if group and (len(group) + 1) * len(group[0][1]) > self._gathered_pages:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _decode_group(self, rows: list[tuple[Placed, list[int]]], start: int) -> DecodeGroup:
        """Rows padded to the longest of them; `start` is the first one's place among all decode rows."""
        return DecodeGroup(
            start=start,
            stop=start + len(rows),
            block_tables=index_tensor(_padded_tables([pages for _, pages in rows]), self._device),
            lengths=self._tensor([item.row.stop for item, _ in rows]),
        )


def _is_decode(item: Placed) -> bool:
    """Whether the row is one token of a sequence's text whose logits are wanted."""
    run = item.row.run
    return (
        isinstance(run, Sequence)
        and item.row.count == 1
        and item.row.start >= run.num_virtual
        and item.num_logits == 1
        and not run.request.classify  # a padded step has logits only
    )


def _logit_rows(placed: list[Placed]) -> list[LogitRows]:
    return [
        LogitRows(run, item.logit_start, item.logit_stop, item.row.stop >= run.num_tokens)
        for item in placed
        if isinstance(run := item.row.run, Sequence) and item.logit_stop > item.logit_start
    ]


def _num_adapters(placed: list[Placed]) -> int:
    """Distinct ones."""
    return len({resident.digest for item in placed for resident in item.stack})


def _padded_tables(tables: list[list[int]]) -> list[list[int]]:
    width = max(map(len, tables))
    return [pages + [NULL_PAGE] * (width - len(pages)) for pages in tables]


def _positions(row: Row) -> range:
    """Of the row's tokens; a row lies on one side of each span that takes none, for such a span has no rows."""
    shift = unnumbered(row.run.spans, row.start)
    return range(row.start - shift, row.stop - shift)


def _block_table(row: Row) -> list[int]:
    return row.run.pages if isinstance(row.run, PrefixRun) else row.run.block_table


def _num_virtual(item: Placed) -> int:
    """How many of the row's tokens are virtual."""
    row = item.row
    return row.count if isinstance(row.run, PrefixRun) else max(0, min(row.stop, row.run.num_virtual) - row.start)


def _token_ids(item: Placed) -> Iterable[int]:
    """The row's token ids, 0 for virtual tokens that are no text and for a token that is not known yet."""
    row, virtual = item.row, _num_virtual(item)
    ids = [0] * virtual
    for span in row.run.spans if virtual else ():
        prefix = item.stack[span.level].layout.prefix
        assert prefix is not None, "a span is of an adapter with virtual tokens"
        start, stop = max(span.start, row.start), min(span.stop, row.start + virtual)
        if prefix.token_ids and start < stop:
            ids[start - row.start : stop - row.start] = prefix.token_ids[start - span.start : stop - span.start]
    if isinstance(row.run, PrefixRun):
        return ids
    text = row.run.token_ids(row.start + virtual, row.stop)
    return [*ids, *text, *[0] * (row.count - virtual - len(text))]


def _virtual_embeddings(item: Placed, pool: RowPool) -> Iterable[tuple[int, Tensor]]:
    """Embeddings of the row's virtual tokens that are no text, each with its place in the step."""
    row = item.row
    for span in row.run.spans:
        start, stop = max(span.start, row.start), min(span.stop, row.stop)
        if start < stop:
            resident = item.stack[span.level]
            prefix = resident.layout.prefix
            assert prefix is not None, "a span is of an adapter with virtual tokens"
            assert prefix.is_run, "only spans that are run have rows"
            if prefix.token_ids:
                continue
            embeddings = resident.block(pool, prefix.blocks[0])
            yield item.start + start - row.start, embeddings[start - span.start : stop - span.start]

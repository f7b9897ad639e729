"""A step's batch: the schedule as tensors. Built anew for each step, never edited.

Rows are packed one behind the other, those of one stack beside each other, so that each adapter's rows are few
segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from server.adapters import EmbeddingPrefix, Resident
from server.engine.prefixes import PrefixRun
from server.engine.scheduler import Row, Schedule
from server.engine.sequence import Sequence
from server.model import AttentionPlan, BaseShape, DecodeGroup, KVCache, PrefillRow, Segment, SitePlan
from server.model.kv_cache import NULL_PAGE

# What a decode group gathers of one layer's pages. Larger copies leave the processor's cache between being written
# and being read, and cost up to twice as much (measured on two cores with 32 MB of cache).
_GATHER_BYTES = 6 * 1024**2


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


@dataclass(frozen=True)
class _Placed:
    """A row and its place in the packed step and among the logits."""

    row: Row
    stack: tuple[Resident, ...]
    start: int
    logit_start: int
    logit_stop: int

    @property
    def stop(self) -> int:
        return self.start + self.row.count


class BatchBuilder:
    """Builds batches for one base and one cache geometry."""

    def __init__(self, shape: BaseShape, page_size: int, device: torch.device) -> None:
        """`device` is where the batch's tensors go."""
        self._shape = shape
        self._page_size = page_size
        self._device = device
        largest = max(KVCache.page_bytes([layer], page_size, shape.dtype) for layer in shape.layers)
        self._gathered_pages = _GATHER_BYTES // largest

    def build(self, schedule: Schedule) -> StepBatch:
        """The batch of a schedule with at least one row."""
        placed = _place(schedule)
        virtual = [given for item in placed for given in _virtual_embeddings(item)]
        return StepBatch(
            token_ids=self._tensor([token for item in placed for token in _token_ids(item.row)]),
            positions=self._tensor([at for item in placed for at in range(item.row.start, item.row.stop)]),
            embeddings=virtual,
            attention=self._attention(placed, schedule),
            deltas=self._deltas(placed),
            logit_tokens=self._tensor(
                [token for item in placed for token in range(item.stop - _num_logits(item), item.stop)]
            ),
            logit_rows=[
                LogitRows(run, item.logit_start, item.logit_stop, item.row.stop == run.num_tokens)
                for item in placed
                if isinstance(run := item.row.run, Sequence) and item.logit_stop > item.logit_start
            ],
            num_virtual=sum(len(given) for _, given in virtual),
            num_adapters=len({resident.digest for item in placed for resident in item.stack}),
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def _attention(self, placed: list[_Placed], schedule: Schedule) -> AttentionPlan:
        slots: list[int] = []
        decode: list[tuple[_Placed, list[int]]] = []
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

    def _slots(self, table: list[int], start: int, stop: int) -> list[int]:
        """Cache slots of the positions `start` … `stop` - 1."""
        size = self._page_size
        return [table[at // size] * size + at % size for at in range(start, stop)]

    def _shared_tails(self, placed: list[_Placed], schedule: Schedule) -> tuple[list[int], list[int]]:
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

    def _decode_groups(self, rows: list[tuple[_Placed, list[int]]]) -> Iterable[list[tuple[_Placed, list[int]]]]:
        """Rows of like length together, each group's pages of one layer small enough to stay in the cache."""
        group: list[tuple[_Placed, list[int]]] = []
        for row in sorted(rows, key=lambda row: len(row[1])):
            if group and (len(group) + 1) * len(row[1]) > self._gathered_pages:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _decode_group(self, rows: list[tuple[_Placed, list[int]]], start: int) -> DecodeGroup:
        """Rows padded to the longest of them; `start` is the first one's place among all decode rows."""
        width = max(len(pages) for _, pages in rows)
        return DecodeGroup(
            start=start,
            stop=start + len(rows),
            block_tables=torch.tensor(
                [pages + [NULL_PAGE] * (width - len(pages)) for _, pages in rows], device=self._device
            ),
            lengths=self._tensor([item.row.stop for item, _ in rows]),
        )

    def _deltas(self, placed: list[_Placed]) -> SitePlan:
        depth = max(len(item.stack) for item in placed)
        plan: dict[str, list[list[Segment]]] = {}
        for level in range(depth):
            for resident, run in _neighbours(placed, level):
                tokens = run[0].start, run[-1].stop
                logits = run[0].logit_start, run[-1].logit_stop
                for site, delta in resident.adapter.deltas.items():
                    start, stop = logits if self._shape.sites[site].is_head else tokens
                    if start < stop:
                        levels = plan.setdefault(site, [[] for _ in range(depth)])
                        levels[level].append(Segment(start, stop, delta))
        return plan


def _place(schedule: Schedule) -> list[_Placed]:
    """The rows in packed order, those of one stack together."""
    stacks: Mapping[Sequence | PrefixRun, tuple[Resident, ...]] = {
        run: (run if isinstance(run, Sequence) else schedule.owners[run]).stack for run in schedule.rows
    }
    rows = sorted(schedule, key=lambda row: [resident.digest for resident in stacks[row.run]])
    placed: list[_Placed] = []
    token = logit = 0
    for row in rows:
        count = _wanted_logits(row)
        placed.append(_Placed(row, stacks[row.run], token, logit, logit + count))
        token += row.count
        logit += count
    return placed


def _wanted_logits(row: Row) -> int:
    """How many of the row's last positions need logits."""
    run = row.run
    if isinstance(run, PrefixRun):
        return 0
    if run.sampling.prompt_logprobs and len(run.prompt_logprobs) < len(run.request.prompt):
        return row.stop - max(row.start, run.num_virtual)
    return 1 if row.stop == run.num_tokens else 0


def _num_logits(item: _Placed) -> int:
    return item.logit_stop - item.logit_start


def _block_table(row: Row) -> list[int]:
    return row.run.pages if isinstance(row.run, PrefixRun) else row.run.block_table


def _token_ids(row: Row) -> Iterable[int]:
    """The row's token ids, 0 for virtual tokens."""
    if isinstance(row.run, PrefixRun):
        return [0] * row.count
    virtual = max(0, min(row.stop, row.run.num_virtual) - row.start)
    return [0] * virtual + list(row.run.token_ids(row.start + virtual, row.stop))


def _virtual_embeddings(item: _Placed) -> Iterable[tuple[int, Tensor]]:
    """Embeddings of the row's virtual tokens, each with its place in the step."""
    row = item.row
    for span in row.run.spans:
        start, stop = max(span.start, row.start), min(span.stop, row.stop)
        if start < stop:
            prefix = item.stack[span.level].adapter.prefix
            assert isinstance(prefix, EmbeddingPrefix), "only spans that are run have rows"
            yield item.start + start - row.start, prefix.embeddings[start - span.start : stop - span.start]


def _neighbours(placed: list[_Placed], level: int) -> Iterable[tuple[Resident, list[_Placed]]]:
    """Runs of neighbouring rows that have the same adapter at a level of their stacks."""
    run: list[_Placed] = []
    for item in placed:
        resident = item.stack[level] if len(item.stack) > level else None
        if run and (resident is None or run[0].stack[level] is not resident):
            yield run[0].stack[level], run
            run = []
        if resident is not None:
            run.append(item)
    if run:
        yield run[0].stack[level], run

"""A scheduler's steps on pages without tensors: a page is a list of what stands in its slots.

What stands in a slot depends on the stack and on every token up to it, as keys and values do. So a row that sees the
right content in each of its slots computes what it would compute alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from server.engine.page_cache import CachedPages
from server.engine.pages import PagePool
from server.engine.prefixes import PrefixRun, Span
from server.engine.protocol import Generate, Sampling
from server.engine.scheduler import Schedule, Scheduler
from server.engine.sequence import Sequence

Slot = tuple[tuple[str, ...], int, tuple[int, ...]]  # the stack, its virtual tokens and the text so far


def scheduled(schedule: Schedule) -> list[Sequence]:
    return [run for run in schedule.rows if isinstance(run, Sequence)]


@dataclass
class FakeResident:
    """What the scheduler sees of a resident adapter."""

    digest: str


@dataclass(frozen=True)
class Stack:
    """Virtual tokens per adapter: positive for embeddings that are run, negative for keys and values."""

    virtual: tuple[int, ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        spans, at = [], 0
        for level, length in enumerate(self.virtual):
            spans.append(Span(at, at + abs(length), level, is_run=length > 0))
            at += abs(length)
        return tuple(spans)


@dataclass(frozen=True)
class Arrival:
    """A sequence of the workload."""

    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    stack: Stack = Stack(())
    aborted_after: int | None = None  # steps after its arrival
    scored_from: int | None = None  # the prompt's first token that is scored
    fails: bool = False  # it ends by an error where it would choose its last token

    def sequence(self, name: str) -> Sequence:
        sampling = Sampling(max_tokens=self.max_tokens, prompt_logprobs_from=self.scored_from)
        request = Generate(id=name, prompt=list(self.prompt), sampling=sampling, deadline=0.0)
        residents = tuple(FakeResident(f"{self.stack.virtual}/{level}") for level in range(len(self.stack.virtual)))
        return Sequence(request, stack=cast(Any, residents), spans=self.stack.spans)


def own_text(name: int, length: int) -> tuple[int, ...]:
    """A text that begins as no other's."""
    return tuple(1000 * (name + 1) + at for at in range(length))


@dataclass
class World:
    """Runs a scheduler's steps on pages of slots, and checks every law in every step."""

    scheduler: Scheduler
    max_seqs: int
    max_batch_tokens: int
    max_prefill_tokens: int
    page_size: int
    pages: dict[int, list[Slot | None]] = field(default_factory=dict)
    num_cached: int = 0  # positions that were not computed for the sequences that started

    def step(self) -> Schedule:
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        streams = [sequence for sequence in self.scheduler.running if sequence.num_remaining == 1]
        had_work = bool(self.scheduler.running or self.scheduler.waiting)
        read_only = {page for node in self.nodes() if not isinstance(node, PrefixRun) for page in node.pages}
        schedule = self.scheduler.schedule()
        assert bool(schedule.rows) == had_work, "a step without rows would never end"
        assert sum(row.count for row in schedule) <= self.max_batch_tokens
        assert sum(row.count for row in schedule if row.run not in streams) <= self.max_prefill_tokens
        assert len(self.scheduler.running) <= self.max_seqs
        assert len(scheduled(schedule)) <= self.max_seqs
        assert oldest is None or oldest in schedule.rows, "the oldest always goes on"
        for stream in streams:
            assert stream in schedule.rows or stream in self.scheduler.waiting, "a running stream waited"
        self.check_ownership()
        self._run(schedule, read_only - set(schedule.fresh_pages))
        self.num_cached += schedule.num_cached_tokens
        self.check_cached_content()
        return schedule

    def nodes(self) -> list[CachedPages]:
        """Every node of the page cache, parents first."""
        found = list(self.scheduler.cache.root.children.values())
        for node in found:
            found.extend(node.children.values())
        return found

    def check_ownership(self) -> None:
        """Every page is free, a cached node's or one sequence's; every node's holders are known; leaves go first."""
        pool, cache, nodes = self.scheduler.pages, self.scheduler.cache, self.nodes()
        owned = [page for node in nodes for page in node.pages]
        shared = set(owned)
        for sequence in self.scheduler.running:
            owned += [page for page in sequence.block_table if page not in shared]
        assert sorted(owned + list(pool._free)) == list(range(1, pool.capacity + 1))
        for node in nodes:
            holding = [run for run in self.scheduler.running if node in (run.prefix, run.tail, *run.text_nodes)]
            assert node.holders == len(holding)
            assert node.holders or node in (cache._proven if node.is_proven else cache._once)
            assert node.pages or node.children or node.holders, "a stack's node that is of no use stays"
            assert node.parent is not None
            assert node.parent.children[node.key] is node
        order = [*cache._once, *cache._proven]
        assert all(not node.holders for node in order)
        places = {node: place for place, node in enumerate(order)}
        assert all(places[child] < places[node] for node in order for child in node.children.values())
        assert cache.num_idle == sum(len(node.pages) for node in order)
        assert cache._num_proven == sum(len(node.pages) for node in cache._proven)
        for sequence in self.scheduler.waiting:
            assert not sequence.block_table
            assert not sequence.text_nodes
            assert sequence.prefix is None
            assert sequence.tail is None
            assert sequence.num_computed == 0

    def check_cached_content(self) -> None:
        """Each page of text holds what the keys on the way to it say."""
        for stack in self.scheduler.cache.root.children.values():
            assert isinstance(stack, PrefixRun)
            below: list[tuple[CachedPages, tuple[int, ...]]] = [(node, ()) for node in stack.children.values()]
            while below:
                node, text = below.pop()
                text += cast(tuple[int, ...], node.key)
                below += [(child, text) for child in node.children.values()]
                stop = stack.length + len(text)
                first = (stop - 1) // self.page_size * self.page_size
                assert stop == first + self.page_size or not node.children, "only a choice's input ends inside a page"
                expected = [
                    _slot(cast(tuple[str, ...], stack.key), stack.length, text, at) for at in range(first, stop)
                ]
                assert self.pages[node.pages[0]][: len(expected)] == expected

    def _run(self, schedule: Schedule, read_only: set[int]) -> None:
        for page in schedule.fresh_pages:
            self.pages[page] = [None] * self.page_size
        for fill in schedule.prefix_copies:
            for at in range(fill.span.start, fill.span.stop):
                self._write(fill.prefix, at)
        for copy in schedule.page_copies:
            self.pages[copy.target] = list(self.pages[copy.source])
        written: set[tuple[int, int]] = set()
        for row in schedule:
            for at in range(row.start, row.stop):
                slot = self._write(row.run, at)
                assert slot not in written, "two rows write one slot"
                assert slot[0] not in read_only, "a cached page is written"
                written.add(slot)
        self._complete_tails(schedule)
        for row in schedule:
            for at in range(row.stop):
                assert self._read(row.run, at) == _content(row.run, at), "a row sees what is not its own"

    def _complete_tails(self, schedule: Schedule) -> None:
        """What of a partly filled page runs in the very step that copies it is written to the copies too."""
        for copy in schedule.page_copies:
            sequence = copy.sequence
            assert sequence.prefix is not None
            for row in schedule.rows.get(sequence.prefix, []):
                first = max(row.start, sequence.num_shared_pages * self.page_size)
                for at in range(first, min(row.stop, sequence.num_prefix)):
                    self.pages[copy.target][at % self.page_size] = _content(sequence.prefix, at)

    def _table(self, run: Sequence | PrefixRun) -> list[int]:
        return run.pages if isinstance(run, PrefixRun) else run.block_table

    def _write(self, run: Sequence | PrefixRun, at: int) -> tuple[int, int]:
        page = self._table(run)[at // self.page_size]
        self.pages[page][at % self.page_size] = _content(run, at)
        return page, at % self.page_size

    def _read(self, run: Sequence | PrefixRun, at: int) -> Slot | None:
        return self.pages[self._table(run)[at // self.page_size]][at % self.page_size]


def _content(run: Sequence | PrefixRun, at: int) -> Slot:
    if isinstance(run, PrefixRun):
        return _slot(cast(tuple[str, ...], run.key), run.length, (), at)
    return _slot(run.stack_key, run.num_virtual, (*run.request.prompt, *run.output), at)


def _slot(stack: tuple[str, ...], num_virtual: int, text: tuple[int, ...], at: int) -> Slot:
    return stack, min(at, num_virtual), text[: max(0, at - num_virtual + 1)]


def make_world(
    num_pages: int, page_size: int, max_seqs: int, more_tokens: int, max_prefill_tokens: int | None = None
) -> World:
    budget = max_seqs + more_tokens
    prefill = max_prefill_tokens or budget
    scheduler = Scheduler(
        PagePool(num_pages, page_size), max_seqs=max_seqs, max_batch_tokens=budget, max_prefill_tokens=prefill
    )
    return World(scheduler, max_seqs, budget, prefill, page_size)

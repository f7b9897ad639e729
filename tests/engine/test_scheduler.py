"""The scheduler's laws, over random workloads. No tensors: a page is here a list of what stands in its slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.pages import PagePool
from server.engine.prefixes import PrefixRun, Span
from server.engine.protocol import Generate, Sampling
from server.engine.scheduler import Schedule, Scheduler
from server.engine.sequence import Sequence

Slot = tuple[str, int]  # whose position this is (a stack's virtual tokens, or a sequence), and which


def _scheduled(schedule: Schedule) -> list[Sequence]:
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
    prompt: int
    max_tokens: int
    stack: Stack
    aborted_after: int | None  # steps after its arrival
    prompt_logprobs: bool

    def sequence(self, name: str) -> Sequence:
        sampling = Sampling(max_tokens=self.max_tokens, prompt_logprobs=self.prompt_logprobs)
        request = Generate(id=name, prompt=[0] * self.prompt, sampling=sampling, deadline=0.0)
        residents = tuple(FakeResident(f"{self.stack.virtual}/{level}") for level in range(len(self.stack.virtual)))
        return Sequence(request, stack=cast(Any, residents), spans=self.stack.spans)


@dataclass
class World:
    """Runs a scheduler's steps on pages of slots, and checks every law in every step."""

    scheduler: Scheduler
    max_seqs: int
    max_batch_tokens: int
    page_size: int
    pages: dict[int, list[Slot | None]] = field(default_factory=dict)

    def step(self) -> Schedule:
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        streams = [sequence for sequence in self.scheduler.running if sequence.num_remaining == 1]
        had_work = bool(self.scheduler.running or self.scheduler.waiting)
        schedule = self.scheduler.schedule()
        assert bool(schedule.rows) == had_work, "a step without rows would never end"
        assert sum(row.count for row in schedule) <= self.max_batch_tokens
        assert len(self.scheduler.running) <= self.max_seqs
        assert len(_scheduled(schedule)) <= self.max_seqs
        assert oldest is None or oldest in schedule.rows, "the oldest always goes on"
        for stream in streams:
            assert stream in schedule.rows or stream in self.scheduler.waiting, "a running stream waited"
        self.check_ownership()
        self._run(schedule)
        return schedule

    def check_ownership(self) -> None:
        """Every page is free, a prefix's or one sequence's."""
        pool = self.scheduler.pages
        prefixes = list(self.scheduler.prefixes._prefixes.values())
        owned = [page for sequence in self.scheduler.running for page in sequence.own_pages]
        owned += [page for prefix in prefixes for page in prefix.pages]
        assert sorted(owned + list(pool._free)) == list(range(1, pool.capacity + 1))
        for prefix in prefixes:
            assert prefix.holders == sum(sequence.prefix is prefix for sequence in self.scheduler.running)
        for sequence in self.scheduler.waiting:
            assert not sequence.own_pages
            assert sequence.prefix is None
            assert sequence.num_computed == 0

    def _run(self, schedule: Schedule) -> None:
        for page in schedule.fresh_pages:
            self.pages[page] = [None] * self.page_size
        for fill in schedule.prefix_copies:
            for at in range(fill.span.start, fill.span.stop):
                self._write(fill.prefix, at)
        for copy in schedule.page_copies:
            self.pages[copy.target] = list(self.pages[copy.source])
        for row in schedule:
            for at in range(row.start, row.stop):
                self._write(row.run, at)
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

    def _write(self, run: Sequence | PrefixRun, at: int) -> None:
        page = self._table(run)[at // self.page_size]
        if isinstance(run, Sequence):
            assert page in run.own_pages, "a shared page is written"
        self.pages[page][at % self.page_size] = _content(run, at)

    def _read(self, run: Sequence | PrefixRun, at: int) -> Slot | None:
        return self.pages[self._table(run)[at // self.page_size]][at % self.page_size]


def _content(run: Sequence | PrefixRun, at: int) -> Slot:
    if isinstance(run, PrefixRun):
        return str(run.key), at
    return (str(run.stack_key), at) if at < run.num_virtual else (run.id, at)


def _play(world: World, arrivals: list[Arrival]) -> int:
    """Everything of the workload to its end; the number of preemptions."""
    scheduler = world.scheduler
    open_sequences: dict[str, Sequence] = {}
    preemptions = step = 0
    most = sum(item.step + item.prompt + item.max_tokens + 60 for item in arrivals) * 4
    while step <= max(item.step for item in arrivals) or open_sequences:
        for index, item in enumerate(arrivals):
            sequence = item.sequence(str(index))
            if item.step == step and _fits(scheduler, sequence):
                open_sequences[sequence.id] = sequence
                scheduler.add(sequence)
            if item.aborted_after is not None and item.step + item.aborted_after == step:
                leaving = open_sequences.pop(str(index), None)
                if leaving is not None:
                    scheduler.remove(leaving)
                    world.check_ownership()
        schedule = world.step()
        preemptions += schedule.num_preempted
        for sequence in _scheduled(schedule):
            if sequence.num_remaining == 0:
                if sequence.sampling.max_tokens:
                    sequence.output.append(0)
                if len(sequence.output) == sequence.sampling.max_tokens:
                    scheduler.remove(sequence)
                    del open_sequences[sequence.id]
        step += 1
        assert step < most, "the workload does not end"
    return preemptions


def _fits(scheduler: Scheduler, sequence: Sequence) -> bool:
    """As the engine refuses at the edge."""
    if not sequence.request.prompt and not (sequence.spans and sequence.spans[-1].is_run):
        return False
    longest = sequence.num_tokens + sequence.sampling.max_tokens
    return scheduler.pages_needed(sequence, longest) <= scheduler.pages.capacity


_STACKS = st.sampled_from([(), (), (), (1,), (4,), (5,), (8,), (13,), (-4,), (-6,), (3, -5), (-2, 6), (4, 4)])
_ARRIVALS = st.builds(
    Arrival,
    step=st.integers(0, 12),
    prompt=st.integers(0, 25),
    max_tokens=st.integers(0, 12),
    stack=_STACKS.map(Stack),
    aborted_after=st.none() | st.none() | st.integers(0, 20),
    prompt_logprobs=st.booleans(),
)


def _world(num_pages: int, page_size: int, max_seqs: int, more_tokens: int) -> World:
    budget = max_seqs + more_tokens
    scheduler = Scheduler(PagePool(num_pages, page_size), max_seqs=max_seqs, max_batch_tokens=budget)
    return World(scheduler, max_seqs, budget, page_size)


@settings(deadline=None, database=None)
@given(
    arrivals=st.lists(_ARRIVALS, min_size=1, max_size=12),
    num_pages=st.integers(2, 30),
    page_size=st.integers(1, 6),
    max_seqs=st.integers(1, 6),
    more_tokens=st.integers(0, 12),
)
def test_every_workload_ends_with_every_page_given_back_and_no_row_sees_anothers(
    arrivals: list[Arrival], num_pages: int, page_size: int, max_seqs: int, more_tokens: int
) -> None:
    world = _world(num_pages, page_size, max_seqs, more_tokens)
    _play(world, arrivals)
    pool = world.scheduler.pages
    world.scheduler.prefixes.reclaim(pool.capacity)
    assert pool.used == 0


def test_a_pool_too_small_for_all_preempts_and_all_still_end() -> None:
    arrivals = [Arrival(0, 6, 10, Stack(()), None, False) for _ in range(5)]
    assert _play(_world(9, 4, 5, 20), arrivals) > 0


def test_the_newest_is_preempted_first_and_resumes_first() -> None:
    world = _world(7, 4, 4, 20)  # 6 pages
    first, second, third = (Arrival(0, 7, 9, Stack(()), None, False).sequence(name) for name in "abc")
    for sequence in (first, second, third):
        world.scheduler.add(sequence)
    world.step()
    assert world.scheduler.running == [first, second, third]
    for sequence in (first, second, third):
        sequence.output += [0, 0]  # the ninth position needs a third page
    schedule = world.step()
    assert schedule.num_preempted == 1
    assert world.scheduler.running == [first, second]
    assert list(world.scheduler.waiting) == [third]
    late = Arrival(0, 1, 1, Stack(()), None, False).sequence("d")
    world.scheduler.add(late)
    world.scheduler.remove(first)
    world.scheduler.remove(second)
    world.step()
    assert world.scheduler.running == [third, late]


def test_a_sequence_that_needs_exactly_the_whole_pool_runs_to_its_end() -> None:
    for virtual in ((), (4,), (5,), (8,), (1,), (-4,), (-5,)):
        for prompt in (0, 1, 4, 7):
            for max_tokens in (0, 1, 4, 9):
                arrival = Arrival(0, prompt, max_tokens, Stack(virtual), None, False)
                sequence = arrival.sequence("0")
                if not prompt and not (virtual and virtual[-1] > 0):
                    continue
                needed = _world(2, 4, 1, 7).scheduler.pages_needed(sequence, sequence.num_tokens + max_tokens)
                assert _play(_world(needed + 1, 4, 1, 7), [arrival]) == 0


def test_prefix_pages_are_held_once_for_all_its_sequences() -> None:
    world = _world(40, 4, 16, 100)
    for index in range(16):
        world.scheduler.add(Arrival(0, 1, 3, Stack((12,)), None, False).sequence(str(index)))
    world.step()
    assert len(world.scheduler.running) == 16
    assert world.scheduler.pages.used == 3 + 16  # the prefix's, and one page of its own for each


def test_idle_prefixes_are_reclaimed_least_recently_used_first() -> None:
    world = _world(7, 4, 1, 40)  # 6 pages
    for name, stack in (("a", (8,)), ("b", (4,)), ("a2", (8,))):
        sequence = Arrival(0, 1, 1, Stack(stack), None, False).sequence(name)
        world.scheduler.add(sequence)
        world.step()
        world.scheduler.remove(sequence)
    world.scheduler.add(Arrival(0, 13, 1, Stack(()), None, False).sequence("c"))  # four pages, three are free
    world.step()
    assert world.scheduler.prefixes.find(("(8,)/0",)) is not None
    assert world.scheduler.prefixes.find(("(4,)/0",)) is None

"""The scheduler's laws, over random workloads."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from tests.engine.world import Arrival, Stack, World, make_world, own_text, scheduled


def _play(world: World, arrivals: list[Arrival]) -> int:
    """Everything of the workload to its end; the number of preemptions."""
    scheduler = world.scheduler
    open_sequences: dict[str, Sequence] = {}
    preemptions = step = 0
    most = sum(item.step + len(item.prompt) + sum(map(abs, item.stack.virtual)) + 60 for item in arrivals) * 5
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
        for sequence in scheduled(schedule):
            if sequence.num_remaining == 0:
                if sequence.sampling.max_tokens:
                    sequence.output.append(sequence.num_tokens % 2)
                if len(sequence.output) == sequence.sampling.max_tokens:
                    _end(world, sequence, fails=arrivals[int(sequence.id)].fails)
                    del open_sequences[sequence.id]
        step += 1
        assert step < most, "the workload does not end"
    return preemptions


def _end(world: World, sequence: Sequence, *, fails: bool) -> None:
    nodes = list(sequence.text_nodes)
    world.scheduler.remove(sequence, keep=not fails)
    world.check_ownership()
    if fails:
        left = [node for node in nodes if node in world.nodes()]
        assert all(node.holders or node.children for node in left), "what failed is still there, and nobody needs it"


def _fits(scheduler: Scheduler, sequence: Sequence) -> bool:
    """As the engine refuses at the edge."""
    if not sequence.request.prompt and not (sequence.spans and sequence.spans[-1].is_run):
        return False
    longest = sequence.num_tokens + sequence.sampling.max_tokens
    return scheduler.pages_needed(sequence, longest) <= scheduler.pages.capacity


_STACKS = st.sampled_from([(), (), (), (1,), (4,), (5,), (8,), (13,), (-4,), (-6,), (3, -5), (-2, 6), (4, 4)])
_TEXTS = st.one_of(
    st.builds(lambda length: tuple(at % 2 for at in range(length)), st.integers(0, 25)),  # one begins as another
    st.builds(lambda length, more: (*([0] * length), *more), st.integers(0, 20), st.lists(st.integers(0, 1))),
    st.builds(own_text, st.integers(0, 99), st.integers(0, 25)),
)
_ARRIVALS = st.builds(
    Arrival,
    step=st.integers(0, 12),
    prompt=_TEXTS,
    max_tokens=st.integers(0, 12),
    stack=_STACKS.map(Stack),
    aborted_after=st.none() | st.none() | st.integers(0, 20),
    scored_from=st.none() | st.integers(0, 25),
    fails=st.sampled_from([False, False, False, True]),
)


@settings(deadline=None, database=None, max_examples=200)
@given(
    arrivals=st.lists(_ARRIVALS, min_size=1, max_size=12),
    num_pages=st.integers(2, 40),
    page_size=st.integers(1, 6),
    max_seqs=st.integers(1, 6),
    more_tokens=st.integers(0, 30),
    max_prefill_tokens=st.none() | st.integers(1, 20),
)
def test_every_workload_ends_with_every_page_given_back_and_no_row_sees_anothers(
    arrivals: list[Arrival],
    num_pages: int,
    page_size: int,
    max_seqs: int,
    more_tokens: int,
    max_prefill_tokens: int | None,
) -> None:
    world = make_world(num_pages, page_size, max_seqs, more_tokens, max_prefill_tokens)
    _play(world, arrivals)
    cache, pool = world.scheduler.cache, world.scheduler.pages
    assert not any(node.holders for node in world.nodes())
    assert cache.available == pool.capacity
    assert len(set(cache.take(pool.capacity))) == pool.capacity
    assert not any(node.pages for node in world.nodes())


def test_crowds_that_begin_alike_in_pools_too_small_for_them() -> None:
    """What chance alone seldom brings together: shared pages, equal answers, preemption and chunks."""
    rng = random.Random(6)
    preemptions = cached = 0
    for _ in range(150):
        page_size = rng.randint(1, 4)
        arrivals = [
            Arrival(
                step=rng.randint(0, 6),
                prompt=(*[0] * rng.randint(0, 12), *(rng.randint(0, 1) for _ in range(rng.randint(1, 3)))),
                max_tokens=rng.randint(4, 14),
                stack=Stack(rng.choice([(), (5,)])),
                scored_from=rng.choice([None, None, None, 0, 3, 9]),
                fails=rng.random() < 0.1,
            )
            for _ in range(10)
        ]
        num_pages = 2 + 60 // page_size
        world = make_world(num_pages, page_size, 6, rng.randint(0, 10), max_prefill_tokens=rng.randint(1, 16))
        preemptions += _play(world, arrivals)
        cached += world.num_cached
    assert preemptions > 100
    assert cached > 5000


def test_a_pool_too_small_for_all_preempts_and_all_still_end() -> None:
    arrivals = [Arrival(0, own_text(name, 6), 10) for name in range(5)]
    assert _play(make_world(9, 4, 5, 20), arrivals) > 0


def test_the_newest_is_preempted_first_and_resumes_first() -> None:
    world = make_world(7, 4, 4, 20)  # 6 pages
    first, second, third = (Arrival(0, own_text(name, 7), 9).sequence(str(name)) for name in range(3))
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
    late = Arrival(0, (5,), 1).sequence("d")
    world.scheduler.add(late)
    world.scheduler.remove(first)
    world.scheduler.remove(second)
    world.step()
    assert world.scheduler.running == [third, late]


def test_a_sequence_that_needs_exactly_the_whole_pool_runs_to_its_end() -> None:
    for virtual in ((), (4,), (5,), (8,), (1,), (-4,), (-5,)):
        for prompt in (0, 1, 4, 7):
            for max_tokens in (0, 1, 4, 9):
                for scored_from in (None, 0, 3):
                    arrival = Arrival(0, own_text(0, prompt), max_tokens, Stack(virtual), None, scored_from)
                    sequence = arrival.sequence("0")
                    if not prompt and not (virtual and virtual[-1] > 0):
                        continue
                    needed = make_world(2, 4, 1, 7).scheduler.pages_needed(sequence, sequence.num_tokens + max_tokens)
                    world = make_world(needed + 1, 4, 1, 7)
                    assert _play(world, [arrival]) == 0
                    assert _play(world, [arrival]) == 0, "what the first left in the cache is in the way"


def test_prefix_pages_are_held_once_for_all_its_sequences() -> None:
    world = make_world(40, 4, 16, 100)
    for index in range(16):
        world.scheduler.add(Arrival(0, (1,), 3, Stack((12,))).sequence(str(index)))
    world.step()
    assert len(world.scheduler.running) == 16
    assert world.scheduler.pages.used == 3 + 16  # the prefix's, and one page of its own for each


def test_streams_are_never_limited_by_the_prompts_share_of_a_step() -> None:
    world = make_world(60, 4, 8, 20, max_prefill_tokens=3)
    streams = [Arrival(0, (name,), 9).sequence(str(name)) for name in range(6)]
    for sequence in streams:
        world.scheduler.add(sequence)
    for _ in range(2):
        schedule = world.step()
        assert len(schedule.rows) <= 6
        for sequence in scheduled(schedule):
            sequence.output.append(0)
    assert all(len(sequence.output) for sequence in streams)
    long = Arrival(0, own_text(0, 20), 1).sequence("long")
    world.scheduler.add(long)
    schedule = world.step()
    assert [row.count for row in schedule] == [1] * 6 + [3]

"""The waiting queue by itself: whose turn it is, what is charged, and who makes room in a full queue."""

from __future__ import annotations

from collections import Counter
from zlib import crc32

import pytest

from server.engine.protocol import Generate, Sampling
from server.engine.queue import _MAX_DEBTS, OUTPUT_WEIGHT, PATIENCE, WaitingQueue, who_makes_room
from server.engine.sequence import Sequence


def sequence(name: str, client: str = "", priority: int = 0, prompt: int = 1, max_tokens: int = 1) -> Sequence:
    sampling = Sampling(max_tokens=max_tokens)
    prompt_ids = [crc32(name.encode())] * prompt  # of its own: nothing comes from the page cache
    return Sequence(
        Generate(id=name, prompt=prompt_ids, sampling=sampling, client=client, priority=priority, deadline=0.0)
    )


def queue_of(*sequences: Sequence) -> WaitingQueue:
    queue = WaitingQueue()
    for item in sequences:
        queue.add(item)
    return queue


def start_next(queue: WaitingQueue, *, run: bool = True) -> Sequence:
    """Start the head; its whole prompt runs."""
    head = queue.head()
    queue.start(head)
    if run:
        queue.charge(head, 0, head.num_tokens)
    return head


def test_one_clients_sequences_start_in_order_of_arrival() -> None:
    items = [sequence(str(index), prompt=9 - index) for index in range(5)]
    queue = queue_of(*items)
    assert len(queue) == 5
    assert list(queue) == items
    assert [start_next(queue) for _ in items] == items
    assert not queue


def test_the_client_with_the_least_counter_goes_next() -> None:
    queue = queue_of(*(sequence(f"a{index}", "a", prompt=10) for index in range(3)))
    for index in range(6):
        queue.add(sequence(f"b{index}", "b", prompt=3))
    order = [start_next(queue).id for _ in range(9)]
    # 12 for each of a's, 5 for each of b's: the counters at each choice are 0 0, 12 0, 12 5, 12 10, 12 15, …
    assert order == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "a2", "b5"]


def test_prompts_cost_one_a_position_and_tokens_two_and_nothing_is_charged_twice() -> None:
    queue = queue_of(item := sequence("x", "a", prompt=10, max_tokens=5))

    def charged(start: int, stop: int) -> int:
        before = queue._levels[0].shares["a"].counter
        queue.charge(item, start, stop)
        return queue._levels[0].shares["a"].counter - before

    queue.start(item)
    assert charged(4, 7) == 3  # the first four were cached
    assert charged(7, 10) == 3 + OUTPUT_WEIGHT
    item.output.append(0)
    assert charged(10, 11) == OUTPUT_WEIGHT
    item.output.append(0)
    queue.put_back(item)
    queue.start(item)
    assert charged(0, 8) == 0
    assert charged(8, 11) == 0
    assert charged(11, 12) == OUTPUT_WEIGHT


def test_a_prompt_that_is_only_scored_costs_no_token() -> None:
    queue = queue_of(item := sequence("x", "a", prompt=10, max_tokens=0))
    queue.charge(item, 0, 10)
    assert queue._levels[0].shares["a"].counter == 10


def test_a_shared_prefix_is_charged_to_whom_it_runs_for() -> None:
    queue = queue_of(first := sequence("a0", "a"), sequence("b0", "b"), sequence("a1", "a"))
    queue.charge_prefix(first, 20)
    assert [start_next(queue).id for _ in range(3)] == ["b0", "a0", "a1"]
    assert queue._levels[0].shares["a"].counter == 20 + 2 * 3


def test_preempted_sequences_stand_first_the_newest_behind() -> None:
    queue = queue_of(*(old := [sequence(f"a{index}", "a") for index in range(2)]))
    for item in old:
        assert start_next(queue) is item
    queue.add(urgent := sequence("b0", "b"))
    for item in reversed(old):  # the newest is preempted first
        queue.put_back(item)
    assert len(queue) == 3
    assert all(item in queue for item in [*old, urgent])
    assert list(queue) == [*old, urgent]
    assert [start_next(queue, run=False) for _ in range(3)] == [*old, urgent]


def test_the_head_stays_the_head_whatever_is_charged_until_one_of_a_higher_priority_comes() -> None:
    first, second = sequence("a", "a", priority=1), sequence("b", "b", priority=1)
    queue = queue_of(first, second)
    assert queue.head() is first
    queue.charge_prefix(first, 100)
    assert queue.head() is first
    queue.add(urgent := sequence("c", "c", priority=0))
    assert queue.head() is urgent
    queue.end(urgent)
    assert queue.head() is second


def test_a_head_that_goes_away_leaves_the_next() -> None:
    queue = queue_of(first := sequence("a", "a"), second := sequence("b", "b"))
    assert queue.head() is first
    queue.end(first)
    assert first not in queue
    assert len(queue) == 1
    assert queue.head() is second


def test_idle_time_earns_nothing() -> None:
    queue = queue_of(sequence("c0", "c"))
    start_next(queue)  # c was there before, and is idle from here on
    for index in range(200):
        queue.add(sequence(f"a{index}", "a", prompt=10))
    for _ in range(100):
        start_next(queue)
    for index in range(20):
        queue.add(sequence(f"c{index + 1}", "c", prompt=10))
    order = [start_next(queue).request.client for _ in range(20)]
    assert order.count("c") in {10, 11}


def test_one_who_comes_while_nobody_waits_starts_level_with_who_runs() -> None:
    queue = queue_of(running := sequence("a0", "a", prompt=1000))
    start_next(queue)
    queue.add(sequence("b0", "b"))
    assert queue._levels[0].shares["b"].counter == 1000 + OUTPUT_WEIGHT
    queue.end(running)


def test_leaving_forgives_no_debt_while_others_are_there() -> None:
    queue = queue_of(burst := sequence("b0", "b", prompt=100))
    for index in range(30):
        queue.add(sequence(f"a{index}", "a", prompt=8))
    assert start_next(queue) is burst  # b owes 102 from here on
    queue.end(burst)
    queue.add(sequence("b1", "b"))
    order = [start_next(queue).request.client for _ in range(12)]
    assert order == ["a"] * 11 + ["b"]  # eleven of ten each are more than 102


def test_clients_that_left_take_no_memory_but_a_bounded_number_of_debts() -> None:
    queue = queue_of(staying := sequence("stays", "a"))
    start_next(queue)
    for index in range(2 * _MAX_DEBTS):
        queue.add(item := sequence(str(index), str(index)))
        start_next(queue)
        queue.end(item)
    level = queue._levels[0]
    assert len(level.shares) == 1
    assert len(level._debts) == _MAX_DEBTS
    queue.end(staying)
    assert not level.shares
    assert not level._debts


def test_priorities_go_in_order_and_each_is_fair_by_itself() -> None:
    queue = WaitingQueue()
    for _ in range(4):
        for client in ("a", "b"):
            for priority in (9, 0, 3):
                queue.add(sequence(f"{client}{priority}", client, priority))
    order = [start_next(queue).id for _ in range(24)]
    assert order == ["a0", "b0"] * 4 + ["a3", "b3"] * 4 + ["a9", "b9"] * 4


@pytest.mark.parametrize("newcomers", [False, True], ids=["one flood", "ever new clients"])
@pytest.mark.parametrize("priority", [0, 9])
def test_a_rare_request_waits_for_a_bounded_number_of_others(priority: int, newcomers: bool) -> None:
    """Under a flood of others that never ends, even with a debt and at the lowest priority."""
    queue = queue_of(burst := sequence("burst", "rare", priority, prompt=10**6), sequence("other", "other", priority))
    assert start_next(queue) is burst
    queue.add(rare := sequence("rare", "rare", priority))
    for starts in range(PATIENCE + 1):
        for number in range(2):
            queue.add(sequence(f"{starts}.{number}", f"{starts}.{number}" if newcomers else "hog"))
        started = start_next(queue)
        if started is rare:
            break
    assert started is rare
    assert starts > 0


def test_who_has_waited_too_long_goes_once_not_with_all_that_it_sent() -> None:
    queue = WaitingQueue()
    for index in range(50):
        queue.add(sequence(f"slow{index}", "hog", priority=9))
    order = []
    for index in range(3 * (PATIENCE + 1)):
        queue.add(sequence(str(index), "b"))
        order.append(start_next(queue).request.client)
    assert order.count("hog") == 3
    assert order[PATIENCE] == "hog"


def _room(client: str, waiting: list[Sequence], running: dict[str, int] | None = None) -> Sequence | None:
    held = Counter(item.request.client for item in waiting) + Counter(running or {})
    return who_makes_room(client, held, waiting)


def _waiting(**counts: int) -> list[Sequence]:
    return [sequence(f"{client}{index}", client) for client, count in counts.items() for index in range(count)]


def test_a_full_queue_has_room_for_a_client_with_less_than_its_share() -> None:
    waiting = _waiting(a=9, b=3)
    victim = _room("c", waiting)
    assert victim is not None
    assert victim.id == "a8", "the newest of the one that holds the most"
    assert _room("b", waiting) is victim
    assert _room("a", waiting) is None


def test_a_full_queue_comes_to_be_shared_equally_and_stays_so() -> None:
    waiting = _waiting(a=12)
    for number in range(100):
        client = "abc"[number % 3]
        victim = _room(client, waiting)
        if victim is not None:
            waiting.remove(victim)
            waiting.append(sequence(f"{client} {number}", client))
        elif number > 30:
            assert Counter(item.request.client for item in waiting) == {"a": 4, "b": 4, "c": 4}
    assert len(waiting) == 12


def test_what_runs_counts_but_only_what_waits_makes_room() -> None:
    waiting = _waiting(a=4, b=4)
    victim = _room("c", waiting, {"a": 2})
    assert victim is waiting[3]
    assert _room("c", waiting, {"c": 3}) is None
    assert _room("b", waiting, {"hog": 50}) is None, "the hog has nothing waiting, and a holds no more than b"


def test_one_that_had_begun_makes_no_room() -> None:
    waiting = _waiting(a=3)
    waiting[2].num_charged = 1  # preempted: its client has read tokens already
    assert _room("b", waiting) is waiting[1]
    for item in waiting:
        item.num_charged = 1
    assert _room("b", waiting) is None

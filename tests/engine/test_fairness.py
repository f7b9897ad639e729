"""Fairness of the real scheduler, over simulated steps: no tensors, every sequence generates to its full length."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from server.adapters import Adapter, Bank, RowPool
from server.adapters.loads import AdapterKey
from server.engine.engine import Engine
from server.engine.pages import PagePool
from server.engine.protocol import Generate
from server.engine.queue import OUTPUT_WEIGHT, PATIENCE
from server.engine.scheduler import Schedule, Scheduler
from server.engine.sequence import Sequence
from server.model import FrozenBase
from tests.engine.test_queue import sequence
from tests.harness import Result, collect, greedy, make_engine, request

OTHERS = ("ann", "bob", "cy", "dee")
PAGE_SIZE = 4


@dataclass
class Simulation:
    """What the engine would do with each step, and what each client has been served by the paper's weights."""

    scheduler: Scheduler
    served: Counter[str] = field(default_factory=Counter)
    started: list[Sequence] = field(default_factory=list)  # in the order of their first step
    ended: Counter[str] = field(default_factory=Counter)  # by sequence
    reached: Counter[str] = field(default_factory=Counter)  # positions computed, by sequence: none is served twice
    num_preempted: int = 0

    def send(self, client: str, count: int, *, prompt: int, max_tokens: int, priority: int = 0) -> None:
        for index in range(count):
            name = f"{client}.{priority}.{index}.{len(self.started)}"
            self.scheduler.add(sequence(name, client, priority, prompt, max_tokens))

    def step(self) -> Schedule:
        schedule = self.scheduler.schedule()
        self.num_preempted += schedule.num_preempted
        for run, [row] in schedule.rows.items():
            assert isinstance(run, Sequence)
            if run not in self.started:
                self.started.append(run)
            first = max(row.start, self.reached[run.id])
            self.served[run.request.client] += max(min(row.stop, run.num_prompt) - first, 0)
            self.reached[run.id] = max(row.stop, self.reached[run.id])
            if run.num_remaining == 0:
                self._generate(run)
        return schedule

    def _generate(self, run: Sequence) -> None:
        self.served[run.request.client] += OUTPUT_WEIGHT
        run.output.append(0)
        if len(run.output) == run.sampling.max_tokens:
            self.ended[run.id] += 1
            self.scheduler.remove(run)

    def waits(self, client: str) -> bool:
        return any(waiting.request.client == client for waiting in self.scheduler.waiting)


def simulation(*, max_seqs: int = 8, max_batch_tokens: int = 64, num_pages: int = 2000) -> Simulation:
    return Simulation(
        Scheduler(
            PagePool(num_pages, PAGE_SIZE),
            max_seqs=max_seqs,
            max_batch_tokens=max_batch_tokens,
            max_prefill_tokens=max_batch_tokens,
        )
    )


@pytest.mark.parametrize(
    ("hog", "other"),
    [((16, 16), (16, 16)), ((2, 60), (30, 4)), ((100, 2), (4, 14))],
    ids=["alike", "the hog writes much", "the hog sends much"],
)
@pytest.mark.parametrize("num_pages", [2000, 60], ids=["room for all", "few pages"])
def test_each_client_gets_its_fair_share_beside_one_that_sends_a_hundred_times_as_much(
    hog: tuple[int, int], other: tuple[int, int], num_pages: int
) -> None:
    world = simulation(num_pages=num_pages)
    world.send("hog", 3000, prompt=hog[0], max_tokens=hog[1])
    for client in OTHERS:
        world.send(client, 30, prompt=other[0], max_tokens=other[1])
    while all(map(world.waits, OTHERS)):  # the period in which all are backlogged
        world.step()
    fair = world.served.total() / (1 + len(OTHERS))
    assert all(0.8 <= world.served[client] / fair <= 1.2 for client in OTHERS), world.served
    assert world.waits("hog")


def test_a_small_pool_preempts_and_nobody_is_charged_for_it() -> None:
    world = simulation(num_pages=30)
    for client in OTHERS:
        world.send(client, 6, prompt=9, max_tokens=12)
    queue = world.scheduler.waiting
    while len(queue) > 2:
        world.step()
    assert world.num_preempted > 0
    counters = {client: share.counter for client, share in queue._levels[0].shares.items()}
    for client, counter in counters.items():
        begun = [item for item in world.started if item.request.client == client]
        assert counter <= sum(9 + OUTPUT_WEIGHT * (len(item.output) + 1) for item in begun)


def test_one_who_returns_from_idleness_gets_its_share_and_no_more() -> None:
    world = simulation()
    world.send("cy", 1, prompt=4, max_tokens=4)
    world.send("hog", 600, prompt=16, max_tokens=16)
    for _ in range(200):
        world.step()
    assert not world.waits("cy")
    before = Counter(world.served)
    world.send("cy", 30, prompt=16, max_tokens=16)
    while world.waits("cy"):
        world.step()
    gained = world.served - before
    assert 0.8 <= gained["cy"] / (gained.total() / 2) <= 1.2


def test_lower_priorities_start_first_whoever_came_first() -> None:
    world = simulation(max_seqs=1)
    for priority in (9, 4, 0):
        for client in ("ann", "bob"):
            world.send(client, 5, prompt=3, max_tokens=2, priority=priority)
    while world.scheduler.waiting:
        world.step()
    assert [item.request.priority for item in world.started] == [0] * 10 + [4] * 10 + [9] * 10


def test_a_cold_or_rare_task_waits_a_bounded_number_of_steps() -> None:
    """The flood comes at a higher priority, faster than it is served, from many clients, and never ends."""
    world = simulation(max_seqs=4)
    world.send("rare", 1, prompt=4, max_tokens=2, priority=9)
    steps_with_starts = step = 0
    while not any(item.request.client == "rare" for item in world.started):
        for index in range(4):
            world.send(f"client {step}.{index}", 1, prompt=4, max_tokens=2)
        before = len(world.started)
        world.step()
        steps_with_starts += len(world.started) > before
        step += 1
        assert steps_with_starts <= PATIENCE
    assert len(world.started) >= PATIENCE, "it went before its priority allows"


def test_every_sequence_ends_once() -> None:
    world = simulation(max_seqs=3, num_pages=20)
    world.send("hog", 60, prompt=7, max_tokens=5)
    for priority, client in enumerate(OTHERS):
        world.send(client, 5, prompt=5, max_tokens=9, priority=priority)
    while world.scheduler.waiting or world.scheduler.running:
        world.step()
    assert set(world.ended.values()) == {1}
    assert len(world.ended) == 80
    assert all(not level.shares and not level._debts for level in world.scheduler.waiting._levels.values())


def _ask(client: str, index: int) -> Generate:
    return request(f"{client}{index}", [5, 6], greedy(2), client=client)


def test_a_client_that_fills_the_queue_makes_room_for_others_and_all_end_once(base: FrozenBase) -> None:
    engine = make_engine(base, max_queue=12, max_seqs=1)
    sent = [_ask("hog", index) for index in range(40)]
    sent += [_ask(client, index) for index in range(2) for client in OTHERS]
    outcome = _run(engine, sent)
    for client in OTHERS:
        assert [outcome[f"{client}{index}"].failed for index in range(2)] == [None] * 2, "within its share"
    refused = {name: result.failed for name, result in outcome.items() if result.failed is not None}
    assert len(refused) == 36
    for name, failed in refused.items():
        assert name.startswith("hog")
        assert failed.code == "queue_full"
        assert "12 requests wait already" in failed.message
    assert sum("made room" in failed.message for failed in refused.values()) == 8
    assert [outcome[f"hog{index}"].failed for index in range(4)] == [None] * 4, "the oldest stay"


def test_a_flood_of_cold_adapters_makes_room_too(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base, max_queue=4, max_seqs=1)
    cold = [request(f"hog{index}", [5], greedy(2), tasks["lora"], client="hog") for index in range(4)]
    outcome = _run(engine, [*cold, _ask("ann", 0)])
    assert outcome["ann0"].failed is None
    assert [name for name, result in outcome.items() if result.failed is not None] == ["hog3"]


def _run(engine: Engine, sent: list[Generate]) -> dict[str, Result]:
    """All at once; every one ends, and once."""
    outcome = {item.id: Result() for item in sent}
    for item in sent:
        engine.add(item)
    while engine.has_work:
        collect(engine, outcome)
    engine.close()
    assert {result.ends for result in outcome.values()} == {1}
    return outcome


def test_a_cold_task_does_not_wait_for_all_cold_tasks_of_another_client() -> None:
    pool = RowPool(1000, 4, dtype=torch.float32, device=torch.device("cpu"))
    bank = Bank(1000, pool, lambda files: Adapter("none"), lambda: None)
    try:
        flood = [bank.request(f"hog{index}", [AdapterKey(f"hog{index}", {})], "hog") for index in range(40)]
        settled = bank.advance()  # as many of them as load at once are under way
        ticket = bank.request("ann", [AdapterKey("ann", {})], "ann")
        while ticket not in settled:
            settled += bank.advance()
            time.sleep(0.001)
        granted = len(settled) - 1
        assert granted <= 12, "two rounds of loads, and those that are beside it"
        while len(settled) < 1 + len(flood):
            settled += bank.advance()
            time.sleep(0.001)
    finally:
        bank.close()

"""Tasks that change, move out of memory or vanish while they answer: nobody's answer is mixed, wrong or missing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import psutil

from tests.faults.adapters import Adapters
from tests.faults.churn import Churn, keep_changing
from tests.faults.client import Client, Said, whole
from tests.faults.cluster import SMALL_BANK, Cluster, everywhere, until
from tests.faults.conftest import Record, Scale
from tests.faults.load import load

LONG = 400  # tokens
BUSY = ("medley_running_sequences", "medley_waiting_sequences", "medley_kv_pages_used")
LOADS = "medley_adapter_load_seconds_count"


def test_every_answer_during_changes_is_what_its_stated_version_alone_gives(
    cluster: Cluster, prompts: Adapters, loras: Adapters, scale: Scale, record_property: Record
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown with a failure
    clients = cluster.clients()
    _, text = cluster.key("invoke")
    adapters = [(each, number) for each in (prompts, loras) for number in range(400, 400 + scale.contents)]
    tasks = [f"alone-{place}" for place in range(len(adapters))]
    alone = [alone_gives(clients[0], task, *each) for task, each in zip(tasks, adapters, strict=True)]
    assert len(set(alone)) == len(alone)
    churn = Churn("churned", adapters, random.Random(seed))
    churn.publish(clients[0])
    clients[0].http.patch("/v1/tasks/churned", json={"active_version": 1})
    everywhere(clients, lambda client: client.generate("churned").status_code == 200)
    held = [held_after(client, tasks) for client in clients]

    answers: list[Said] = []
    streams = [cluster.client(number % 3, text) for number in range(scale.clients)]

    def ask(number: int) -> Callable[[], None]:
        user = f"user-{number}" if number % 2 else None  # of whom the canary has some
        return lambda: answers.append(streams[number].streamed("churned", max_tokens=24, user=user))

    with load([ask(number) for number in range(len(streams))]) as counts:
        keep_changing(churn, clients, scale.churn_seconds / 2)
        memory = memory_of(cluster)
        changes = keep_changing(churn, clients, scale.churn_seconds)
        grown = max(after - before for before, after in zip(memory, memory_of(cluster), strict=True))
    assert min(counts) > 0
    assert set(churn.done) == {"publish", "activate", "roll_back", "delete", "try_out"}
    assert len({said.version for said in answers}) > 1
    for said in answers:
        assert said.output == alone[churn.content_of[said.version]], f"version {said.version}"
    assert grown < scale.grown_bytes
    for client, before in zip(clients, held, strict=True):
        client.said("churned")
        assert held_after(client, tasks) == before
    record_property("changes", changes)
    record_property("of these and of those that warmed up, made", dict(churn.done))
    record_property("streams, all whole and of one version", len(answers))
    record_property("versions among them", len({said.version for said in answers}))
    record_property("MiB that a process grew by at most", round(grown / 2**20, 1))


def test_a_task_deleted_and_made_anew_during_a_stream_lets_it_end_and_answers_others_anew(
    cluster: Cluster, prompts: Adapters, loras: Adapters
) -> None:
    clients = cluster.clients()
    one, other, _ = clients
    old = alone_gives(one, "alone-old", prompts, 210, max_tokens=LONG)
    new = alone_gives(one, "alone-new", loras, 211)
    one.published("reloaded", prompts[210])
    until(lambda: other.generate("reloaded").status_code == 200)
    events = one.stream("reloaded", max_tokens=LONG)
    begun = [next(events)]
    assert other.http.delete("/v1/tasks/reloaded").status_code == 204
    until(lambda: one.generate("reloaded").status_code == 404)
    assert other.published("reloaded", loras[211]) == 2, "a version's number is never used again"
    everywhere(clients, lambda client: client.generate("reloaded").status_code == 200)
    for client in clients:
        said = client.said("reloaded", max_tokens=24)
        assert (said.version, said.output) == (2, new)
    ended = whole(iter([*begun, *events]))
    assert (ended.version, ended.output) == (1, old)


def test_more_adapters_than_the_bank_holds_all_answer_and_a_cold_one_is_not_kept_waiting_by_hot_ones(
    cluster: Cluster, loras: Adapters
) -> None:
    one, _, small = cluster.clients()
    numbers = range(220, 220 + SMALL_BANK + 3)
    alone = {f"bank-{number}": alone_gives(one, f"bank-{number}", loras, number) for number in numbers}
    until(lambda: all(small.generate(task).status_code == 200 for task in alone))
    _, text = cluster.key("invoke")
    callers = {task: cluster.client(2, text) for task in alone}

    def ask(task: str) -> Callable[[], None]:
        def check() -> None:
            assert callers[task].streamed(task, max_tokens=24).output == alone[task]

        return check

    with load([ask(task) for task in alone]) as counts:
        until(lambda: min(counts) >= 2)
        assert 0 < small.figure("medley_bank_adapters") <= SMALL_BANK

    *cold, _ = alone
    hot = [task for task in alone if task not in cold[:3]]
    assert len(hot) == SMALL_BANK
    with load([ask(task) for task in hot]) as counts:
        until(lambda: min(counts) > 0)  # they fill the bank, and none of them pauses
        for task in cold[:3]:
            ask(task)()
        then = list(counts)
        until(lambda: all(now > before for now, before in zip(counts, then, strict=True)))


def test_a_pinned_task_stays_loaded_while_more_others_are_asked_for_than_the_bank_holds(
    cluster: Cluster, loras: Adapters
) -> None:
    *_, small = cluster.clients()
    others = [f"passing-{number}" for number in range(SMALL_BANK + 3)]
    for number, task in enumerate(["staying", *others], 240):
        small.published(task, loras[number])
    assert small.http.put("/v1/tasks/staying", json={"pinned": True}).status_code == 200
    try:
        until(lambda: small.figure("medley_bank_pinned_bytes") > 0)
        small.said("staying")
        for task in others:
            small.said(task)
        loads = small.figure(LOADS)
        small.said("staying")
        assert small.figure(LOADS) == loads
        small.said(others[0])
        until(lambda: small.figure(LOADS) == loads + 1)
    finally:
        small.http.put("/v1/tasks/staying", json={"pinned": False})
    until(lambda: small.figure("medley_bank_pinned_bytes") == 0)


def alone_gives(client: Client, task: str, adapters: Adapters, number: int, max_tokens: int = 24) -> str:
    """The adapter's answer as the only request of the server."""
    client.published(task, adapters[number])
    return client.said(task, max_tokens=max_tokens).output


def held_after(client: Client, tasks: Sequence[str]) -> dict[str, float]:
    """What a server holds once these tasks were the last that were asked for, one after the other, and it is idle."""
    for task in tasks:
        until(lambda task=task: client.generate(task).status_code == 200)  # type: ignore[misc]
    until(lambda: all(client.figure(figure) == 0 for figure in BUSY))
    return {figure: client.figure(figure) for figure in ("medley_bank_bytes", "medley_bank_adapters", *BUSY)}


def memory_of(cluster: Cluster) -> list[int]:
    """Resident bytes of each server's HTTP process and engine."""
    processes = []
    for server in cluster.servers:
        processes += [psutil.Process(server.process.pid), server.child("engine")]
    return [process.memory_info().rss for process in processes]

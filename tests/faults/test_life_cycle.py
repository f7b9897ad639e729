"""Tasks that change, move out of memory or vanish while they answer: nobody's answer is mixed, wrong or missing."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

import httpx
import psutil

from tests.faults.adapters import Adapters
from tests.faults.client import Client, Said, whole
from tests.faults.cluster import SMALL_BANK, Cluster, everywhere, until
from tests.faults.conftest import Scale
from tests.faults.load import load

CONTENTS = 8  # of each method
CHANGE_EVERY = 0.05  # seconds
LONG = 400  # tokens


class Churn:
    """Changes one task at random, as several operators at several servers would; it always has an active version."""

    def __init__(self, task: str, adapters: Sequence[tuple[Adapters, int]], chance: random.Random) -> None:
        self.content_of: dict[int, int] = {}
        """Of each version that there ever was."""
        self.done: Counter[str] = Counter()
        self._task = task
        self._adapters = adapters
        self._chance = chance
        self._next: list[Callable[[Client], httpx.Response]] = []

    def change(self, client: Client) -> None:
        """One change; the server may refuse what others before it made impossible."""
        if not self._next:
            self._next = [self.publish, self.publish, self.activate, self.roll_back, self.delete, self.try_out]
            self._chance.shuffle(self._next)
        action = self._next.pop()
        response = action(client)
        assert response.is_success or response.status_code in (404, 409), response.text
        self.done[action.__name__] += response.is_success

    def publish(self, client: Client) -> httpx.Response:
        content = self._chance.randrange(len(self._adapters))
        adapters, number = self._adapters[content]
        response = client.publish(self._task, adapters[number], activate=self._chance.random() < 0.7)
        assert response.status_code in (200, 201), response.text
        assert self.content_of.setdefault(response.json()["version"], content) == content
        return response

    def activate(self, client: Client) -> httpx.Response:
        return client.http.patch(f"/v1/tasks/{self._task}", json={"active_version": self._any()})

    def roll_back(self, client: Client) -> httpx.Response:
        return client.http.post(f"/v1/tasks/{self._task}/rollback")

    def delete(self, client: Client) -> httpx.Response:
        return client.http.delete(f"/v1/tasks/{self._task}/versions/{self._any()}")

    def try_out(self, client: Client) -> httpx.Response:
        canary = {"version": self._any(), "percent": 50}
        return client.http.patch(f"/v1/tasks/{self._task}", json={"canary": canary})

    def _any(self) -> int:
        return self._chance.choice(sorted(self.content_of)[-10:])


def test_every_answer_during_changes_is_what_its_stated_version_alone_gives(
    cluster: Cluster, prompts: Adapters, loras: Adapters, scale: Scale
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown with a failure
    clients = cluster.clients()
    _, text = cluster.key("invoke")
    adapters = [(each, number) for each in (prompts, loras) for number in range(200, 200 + CONTENTS)]
    alone = [alone_gives(clients[0], f"alone-{place}", each, number) for place, (each, number) in enumerate(adapters)]
    assert len(set(alone)) == len(alone)
    churn = Churn("churned", adapters, random.Random(seed))
    churn.publish(clients[0])
    clients[0].http.patch("/v1/tasks/churned", json={"active_version": 1})
    everywhere(clients, lambda client: client.generate("churned").status_code == 200)

    answers: list[Said] = []
    streams = [cluster.client(number % 3, text) for number in range(scale.clients)]

    def ask(number: int) -> Callable[[], None]:
        user = f"user-{number}" if number % 2 else None  # of whom the canary has some
        return lambda: answers.append(streams[number].streamed("churned", max_tokens=24, user=user))

    with load([ask(number) for number in range(len(streams))]) as counts:
        keep_changing(churn, clients, scale.churn_seconds / 5)
        memory = memory_of(cluster)
        keep_changing(churn, clients, scale.churn_seconds)
    assert min(counts) > 0
    assert set(churn.done) == {"publish", "activate", "roll_back", "delete", "try_out"}
    assert min(churn.done.values()) > 0
    assert len({said.version for said in answers}) > 1
    for said in answers:
        assert said.output == alone[churn.content_of[said.version]], f"version {said.version}"
    for before, after in zip(memory, memory_of(cluster), strict=True):
        assert after - before < scale.grown_bytes
    for client in clients:
        client.said("churned")
        for figure in ("medley_running_sequences", "medley_waiting_sequences", "medley_kv_pages_used"):
            until(lambda client=client, figure=figure: client.figure(figure) == 0)  # type: ignore[misc]


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


def alone_gives(client: Client, task: str, adapters: Adapters, number: int, max_tokens: int = 24) -> str:
    """The adapter's answer as the only request of the server."""
    client.published(task, adapters[number])
    return client.said(task, max_tokens=max_tokens).output


def keep_changing(churn: Churn, clients: list[Client], seconds: float) -> None:
    """A change every `CHANGE_EVERY`, each at another server."""
    begun = time.monotonic()
    due = begun
    number = 0
    while due < begun + seconds:
        churn.change(clients[number % len(clients)])
        number += 1
        due = max(due + CHANGE_EVERY, time.monotonic())  # a busy machine makes fewer
        time.sleep(max(0.0, due - time.monotonic()))


def memory_of(cluster: Cluster) -> list[int]:
    """Resident bytes of each server's HTTP process and engine."""
    processes = []
    for server in cluster.servers:
        processes += [psutil.Process(server.process.pid), server.child("engine")]
    return [process.memory_info().rss for process in processes]

"""Redis stopped, killed, slow, emptied: what the servers know is served, what they cannot know is said, and they catch
up when it is back."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from adapters_store import Quotas, RedisIndex, StoreUnavailable, TaskDirectory, TaskSettings
from tests.faults.adapters import Adapters
from tests.faults.client import Client, Said, error_of
from tests.faults.cluster import Cluster, everywhere, until
from tests.faults.conftest import Record, Scale
from tests.faults.load import load
from tests.server_process import ServerProcess, one_line, run_medley

AT_ONCE = 8  # changes
PER_MINUTE = 20  # requests of the key with a quota


@contextmanager
def away(cluster: Cluster, how: str) -> Iterator[None]:
    """Redis stands still, or is killed, while the block runs."""
    pid = cluster.redis.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    try:
        yield
    finally:
        if how == "stopped":
            os.kill(pid, signal.SIGCONT)
        else:
            until(cluster.redis.ended.done)
            cluster.redis.start()


def together(*calls: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """The answers to calls at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [answer.result() for answer in [pool.submit(call) for call in calls]]


class Writer:
    """Publishes one task after the other, whatever comes of it."""

    def __init__(self, client: Client, prefix: str, prompts: Adapters) -> None:
        self.acknowledged: list[str] = []
        self.refused: list[str] = []
        self._client = client
        self._prefix = prefix
        self._prompts = prompts

    def write(self) -> None:
        number = len(self.acknowledged) + len(self.refused)
        task = f"{self._prefix}-{number}"
        response = self._client.publish(task, self._prompts[300 + number % 20])
        if response.status_code == 201:
            self.acknowledged.append(task)
        else:
            check_refused(response)
            self.refused.append(task)

    def check(self) -> None:
        """What was acknowledged is served, the rest is absent; but for one whose answer was under way."""
        for task in self.acknowledged:
            assert self._client.said(task).version == 1
        statuses = [self._client.generate(task).status_code for task in self.refused]
        assert set(statuses) <= {200, 404}
        assert statuses.count(200) <= 1


def check_refused(response: httpx.Response) -> None:
    """Redis is away, and when to come back."""
    assert error_of(response) == (503, "store_unavailable"), response.request.url
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_known_tasks_are_served_the_rest_is_503_and_all_is_caught_up_when_redis_is_back(
    cluster: Cluster, prompts: Adapters, scale: Scale, how: str, record_property: Record
) -> None:
    clients = cluster.clients()
    one = clients[0]
    task = f"known-{how}"
    _, quota_text = cluster.key("invoke", quotas=Quotas(requests_per_minute=PER_MINUTE))
    limited = [cluster.client(server, quota_text) for server in range(3)]
    _, unseen_text = cluster.key("invoke")
    stranger = cluster.client(1, unseen_text)
    clients[1].published(task, prompts[1])  # once the first server has this by the feed, it has the keys' making too
    until(lambda: one.generate(task).status_code == 200)
    assert one.customize("ann", task, prompts[2]).status_code == 201
    everywhere(clients, lambda client: client.generate(task).status_code == 200)
    said, anns = one.said(task), one.said(task, user="ann")
    assert said != anns
    everywhere(clients, lambda client: client.said(task, user="ann") == anns)
    assert [client.generate(task).status_code for client in limited] == [200] * 3
    stands = one.http.get(f"/v1/tasks/{task}").headers["etag"]
    writer = Writer(clients[1], f"written-{how}", prompts)
    errors_before = one.figure("medley_store_errors_total")
    asks = [ask(client, task, said) for client in clients]
    asks += [ask(client, task, anns, user="ann") for client in clients]
    with load([*asks, writer.write]) as counts, away(cluster, how):
        everywhere(clients, lambda client: client.ready()["redis"] == "away")
        begun, counts_then, refused_then = time.monotonic(), list(counts), len(writer.refused)
        for client in clients:
            assert client.figure("medley_redis_available") == 0
        for refused in together(*writes(one, task, prompts[3]), *unknowns(one, stranger, task)):
            check_refused(refused)
        assert one.figure("medley_store_errors_total") > errors_before
        for client in limited:
            check_own_count(client, task)
        while time.monotonic() < begun + scale.away_seconds:
            time.sleep(0.05)
        meanwhile = [now - then for now, then in zip(counts, counts_then, strict=True)]
        assert min(meanwhile) > 0, "requests went on all the while"
        assert len(writer.refused) > refused_then
        record_property("requests for known tasks and layers while Redis was away", sum(meanwhile[:-1]))
        record_property("publishes refused with 503 meanwhile", len(writer.refused) - refused_then)
    everywhere(clients, lambda client: client.ready()["redis"] == "ok")
    for client in clients:
        assert client.figure("medley_redis_available") == 1
    writer.check()
    one.published(f"{task}-2", prompts[2])
    seconds = everywhere(clients, lambda client: client.generate(f"{task}-2").status_code == 200, scale.soon_seconds)
    record_property("seconds until a publish after it was every server's", round(seconds, 3))
    assert stranger.generate(task).status_code == 200
    assert one.said(task, user="ben") == said
    assert one.said(task, user="ann") == anns
    assert one.http.get(f"/v1/tasks/{task}").headers["etag"] == stands
    assert limited[0].generate(task).status_code == 200, "what the servers counted by themselves is over"


def ask(client: Client, task: str, expected: Said, **fields: str) -> Callable[[], None]:
    """A caller of `load` who always expects the same answer."""

    def check() -> None:
        assert client.said(task, **fields) == expected

    return check


def check_own_count(client: Client, task: str) -> None:
    """The client's server counts its requests for itself, from nothing."""
    statuses = [client.generate(task).status_code for _ in range(PER_MINUTE + 1)]
    assert statuses == [200] * PER_MINUTE + [429]


def writes(client: Client, task: str, never: Path) -> list[Callable[[], httpx.Response]]:
    """Each change of a task with the version 1 and of its user ann's layer."""
    http, pair = client.http, f"/v1/users/ann/tasks/{task}"
    canary = {"canary": {"version": 1, "percent": 5}}
    return [
        lambda: client.publish(task, never),
        lambda: client.customize("ann", task, never),
        lambda: http.put(f"/v1/tasks/{task}", json={"description": "d"}),
        lambda: http.patch(f"/v1/tasks/{task}", json={"active_version": 1}),
        lambda: http.patch(f"/v1/tasks/{task}", json=canary),
        lambda: http.post(f"/v1/tasks/{task}/rollback"),
        lambda: http.delete(f"/v1/tasks/{task}/versions/1"),
        lambda: http.delete(f"/v1/tasks/{task}"),
        lambda: http.delete(pair),
        lambda: http.delete("/v1/users/ann"),
    ]


def unknowns(client: Client, stranger: Client, task: str) -> list[Callable[[], httpx.Response]]:
    """What only Redis can tell; the `stranger` has a key that its server has not seen."""
    return [
        lambda: client.generate("unknown"),
        lambda: client.generate(task, user="ben"),
        lambda: stranger.generate(task),
        lambda: client.http.get(f"/v1/tasks/{task}"),
        lambda: client.http.get(f"/v1/tasks/{task}/history"),
        lambda: client.http.get("/v1/users/ann/tasks"),
    ]


def test_what_is_refused_while_redis_is_known_to_stand_still_is_not_made_when_it_goes_on(cluster: Cluster) -> None:
    names = [f"late-{number}" for number in range(AT_ONCE)]

    async def change_while_away(index: RedisIndex) -> list[object]:
        directory = TaskDirectory(index)
        await directory.start()
        await index.put_task("in-time", TaskSettings())  # its script is in Redis now
        await asyncio.gather(*(index.get_task("in-time") for _ in names))  # so many connections stay open
        with away(cluster, "stopped"):
            await asyncio.to_thread(until, lambda: not directory.available)
            calls = [index.put_task(name, TaskSettings()) for name in names]
            refused: list[object] = await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.to_thread(until, lambda: directory.available)
        await index.put_task("in-time", TaskSettings())
        await directory.stop()
        return refused

    refused = cluster.index(change_while_away)
    assert {type(each) for each in refused} == {StoreUnavailable}
    assert cluster.index(lambda index: index.read_tasks([*names])) == [None] * AT_ONCE


def test_a_slow_redis_is_waited_for_so_long_and_known_tasks_are_not_delayed(
    cluster: Cluster, prompts: Adapters
) -> None:
    *_, client = cluster.clients()
    _, unseen_text = cluster.key("invoke")
    stranger = cluster.client(2, unseen_text)
    client.published("known", prompts[1])
    assert client.customize("ann", "known", prompts[2]).status_code == 201
    said = client.said("known")
    cluster.proxy.delay = 0.1
    client.published("slowly", prompts[2])
    assert client.said("slowly").version == 1
    cluster.proxy.delay = 3600.0
    try:
        known, *others = together(
            lambda: client.generate("known"),
            *writes(client, "known", prompts[3]),
            *unknowns(client, stranger, "known")[1:],  # a task is unknown to no server that does not miss Redis yet
        )
        assert known.json()["output"] == said.output
        for refused in others:
            check_refused(refused)
        until(lambda: client.ready()["redis"] == "away")
        assert error_of(client.generate("unknown")) == (503, "store_unavailable")
        assert client.said("known") == said
        command = run_medley("keys", "list", "--redis-url", cluster.proxy.url)
        assert command.returncode == 1
        assert "Redis is not available" in one_line(command.stderr)
    finally:
        cluster.proxy.delay = 0.0
    until(lambda: client.ready()["redis"] == "ok")
    client.published("never", prompts[3])
    assert client.said("never").version == 1


def test_of_a_redis_that_comes_back_empty_the_servers_say_what_is_missing(
    cluster: Cluster, base: Path, prompts: Adapters, tmp_path: Path
) -> None:
    lost = "0-lost"  # the first of all names: the log names only some
    clients = cluster.clients()
    one = clients[0]
    one.published(lost, prompts[1])
    said = one.said(lost)
    assert one.customize("ann", lost, prompts[2]).status_code == 201
    everywhere(clients, lambda client: client.generate(lost, user="ann").status_code == 200)
    cluster.redis.stop()
    everywhere(clients, lambda client: client.ready()["redis"] == "away")
    shutil.rmtree(cluster.redis_folder)
    cluster.redis.start()
    everywhere(clients, lambda client: client.ready()["redis"] == "ok")
    assert one.generate(lost).status_code == 401, "the keys went with the rest"

    clients = cluster.clients()
    for client, server in zip(clients, cluster.servers, strict=True):
        assert error_of(client.generate(lost)) == (404, "task_not_found")
        [line] = [line for line in server.log().splitlines() if "redis was emptied" in line]
        assert lost in line.partition("among_them")[2]
    assert clients[0].http.get("/v1/tasks").json()["data"] == []
    options = ["--redis-url", cluster.redis.url, "--store", str(cluster.blobs.parent)]
    with ServerProcess(base, tmp_path / "later", *options) as later, Client(later.url) as client:
        assert error_of(client.generate(lost)) == (404, "task_not_found")
        until(lambda: "the store belongs to another index" in later.log())

    clients[0].published(lost, prompts[1])
    everywhere(clients, lambda client: client.generate(lost).status_code == 200)
    assert clients[0].said(lost) == said
    for client in clients:
        assert client.said(lost, user="ann") == said, "her layer went with the rest"

"""Redis stopped, killed, slow, emptied: what the servers know is served, what they cannot know is said, and they catch
up when it is back."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from adapters_store import Quotas
from tests.faults.adapters import Adapters
from tests.faults.client import Client, Said, error_of
from tests.faults.cluster import Cluster, everywhere, until
from tests.faults.conftest import Scale
from tests.faults.load import load

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
            until(lambda: cluster.redis.poll() is not None)
            cluster.redis.start()


def together(*calls: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """The answers to calls at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [answer.result() for answer in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_known_tasks_are_served_the_rest_is_503_and_all_is_caught_up_when_redis_is_back(
    cluster: Cluster, prompts: Adapters, scale: Scale, how: str
) -> None:
    clients = cluster.clients()
    one = clients[0]
    task = f"known-{how}"
    _, quota_text = cluster.key("invoke", quotas=Quotas(requests_per_minute=PER_MINUTE))
    limited = cluster.client(0, quota_text)
    _, unseen_text = cluster.key("invoke")
    stranger = cluster.client(1, unseen_text)
    clients[1].published(task, prompts[1])  # once the first server has this by the feed, it has the keys' making too
    until(lambda: one.generate(task).status_code == 200)
    assert one.customize("ann", task, prompts[2]).status_code == 201
    everywhere(clients, lambda client: client.generate(task).status_code == 200)
    said, anns = one.said(task), one.said(task, user="ann")
    assert said != anns
    everywhere(clients, lambda client: client.said(task, user="ann") == anns)
    assert limited.generate(task).status_code == 200
    errors_before = one.figure("medley_store_errors_total")

    def ask(client: Client, expected: Said, **fields: str) -> Callable[[], None]:
        def check() -> None:
            assert client.said(task, **fields) == expected

        return check

    asks = [ask(client, said) for client in clients] + [ask(client, anns, user="ann") for client in clients]
    with load(asks) as counts, away(cluster, how):
        everywhere(clients, lambda client: client.ready()["redis"] == "away")
        begun, counts_then = time.monotonic(), list(counts)
        assert one.figure("medley_redis_available") == 0
        for refused in together(
            lambda: one.publish(f"{task}-2", prompts[2]),
            lambda: one.customize("ann", task, prompts[3]),
            lambda: one.http.put(f"/v1/tasks/{task}", json={"description": "d"}),
            lambda: one.http.patch(f"/v1/tasks/{task}", json={"active_version": 1}),
            lambda: one.http.delete(f"/v1/tasks/{task}"),
            lambda: one.generate("unknown"),
            lambda: one.generate(task, user="ben"),
            lambda: stranger.generate(task),
        ):
            assert error_of(refused) == (503, "store_unavailable"), refused.request.url
            assert int(refused.headers["retry-after"]) >= 1
        assert one.figure("medley_store_errors_total") > errors_before
        statuses = [limited.generate(task).status_code for _ in range(PER_MINUTE + 1)]
        assert statuses == [200] * PER_MINUTE + [429], "this server counts for itself, from nothing"
        while time.monotonic() < begun + scale.away_seconds:
            time.sleep(0.05)
        assert all(now > then for now, then in zip(counts, counts_then, strict=True)), "requests went on all the while"
    everywhere(clients, lambda client: client.ready()["redis"] == "ok")
    assert one.figure("medley_redis_available") == 1
    one.published(f"{task}-2", prompts[2])
    everywhere(clients, lambda client: client.generate(f"{task}-2").status_code == 200, scale.soon_seconds)
    assert stranger.generate(task).status_code == 200
    assert one.said(task, user="ben") == said


def test_a_slow_redis_is_waited_for_so_long_and_known_tasks_are_not_delayed(
    cluster: Cluster, prompts: Adapters
) -> None:
    *_, client = cluster.clients()
    client.published("known", prompts[1])
    said = client.said("known")
    cluster.proxy.delay = 0.1
    client.published("slowly", prompts[2])
    assert client.said("slowly").version == 1
    cluster.proxy.delay = 3600.0
    try:
        publish, known = together(lambda: client.publish("never", prompts[3]), lambda: client.generate("known"))
        assert error_of(publish) == (503, "store_unavailable")
        assert known.json()["output"] == said.output
        until(lambda: client.ready()["redis"] == "away")
        assert error_of(client.generate("unknown")) == (503, "store_unavailable")
        assert client.said("known") == said
    finally:
        cluster.proxy.delay = 0.0
    until(lambda: client.ready()["redis"] == "ok")
    client.published("never", prompts[3])
    assert client.said("never").version in (1, 2)


def test_of_a_redis_that_comes_back_empty_the_servers_say_what_is_missing(cluster: Cluster, prompts: Adapters) -> None:
    lost = "0-lost"  # the first of all names: the log names only some
    clients = cluster.clients()
    one = clients[0]
    one.published(lost, prompts[1])
    said = one.said(lost)
    everywhere(clients, lambda client: client.generate(lost).status_code == 200)
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
    clients[0].published(lost, prompts[1])
    everywhere(clients, lambda client: client.generate(lost).status_code == 200)
    assert clients[0].said(lost) == said

"""`kill -9` of each process of a server at random moments of many publishes: what was acknowledged is there afterwards,
what was not is absent, and no file is left over.

One publish of each kill may stand though nobody was told: the one whose answer was under way. It stands whole.
"""

from __future__ import annotations

import hashlib
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import httpx

from tests.faults.adapters import CONFIG, WEIGHTS, Adapters
from tests.faults.client import Client, error_of
from tests.faults.cluster import until
from tests.faults.conftest import Record, Scale
from tests.server_process import PATIENCE_SECONDS, ServerProcess

Victim = Literal["http", "engine", "redis"]
BATCH = 5  # publishes, during which one process is killed


class Publisher:
    """Publishes one adapter after the other, each as a task of its own, from a thread; `wait` for its end."""

    def __init__(self, url: str, prompts: Adapters, numbers: range) -> None:
        self.acknowledged: list[int] = []
        self.unknown: list[int] = []
        """Those whose answer was lost on its way or said that Redis was: they may stand or not."""
        self.refused: list[int] = []
        self._client = Client(url)
        self._prompts = prompts
        self._numbers = numbers
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()
        assert len(self.acknowledged) + len(self.unknown) + len(self.refused) == len(self._numbers)

    def _run(self) -> None:
        with self._client as client:
            for number in self._numbers:
                try:
                    response = client.publish(f"task-{number}", self._prompts[number])
                except httpx.ConnectError:  # it was not even sent
                    self.refused.append(number)
                    continue
                except httpx.TransportError:
                    self.unknown.append(number)
                    continue
                if response.status_code == 201:
                    self.acknowledged.append(number)
                elif error_of(response) == (503, "store_unavailable"):
                    self.unknown.append(number)
                else:
                    assert response.status_code == 503, response.text
                    self.refused.append(number)


def test_of_publishes_during_kills_every_acknowledged_one_is_served_and_none_is_half_there(
    base: Path, prompts: Adapters, tmp_path: Path, scale: Scale, record_property: Record
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown with a failure
    chance = random.Random(seed)
    data, temporary = tmp_path / "data", tmp_path / "tmp"
    temporary.mkdir()
    acknowledged: set[int] = set()
    counted: Counter[str] = Counter()

    def start() -> ServerProcess:
        return ServerProcess(base, data, TMPDIR=str(temporary)).__enter__()

    server = start()
    try:
        begun = time.monotonic()
        with Client(server.url) as client:
            client.published("task-0", prompts[0])
            client.published("task-1", prompts[1])
        batch_seconds = (time.monotonic() - begun) / 2 * BATCH
        acknowledged |= {0, 1}
        around = files_beside_blobs(data)
        victims: list[Victim] = ["http", "engine", "redis"]
        chance.shuffle(victims)
        for first in range(2, 2 + scale.publishes, BATCH):
            victim = victims[first // BATCH % len(victims)]
            publisher = Publisher(server.url, prompts, range(first, first + BATCH))
            time.sleep(chance.uniform(0, batch_seconds))
            kill(server, victim)
            publisher.wait()
            if victim != "redis":
                server.end()
                assert server.orphans() == []
                server = start()
            with Client(server.url) as client:
                until(lambda client=client: client.ready()["redis"] == "ok")  # type: ignore[misc]
                counted[f"kills of the {victim} process"] += 1
                counted["acknowledged with 201"] += len(publisher.acknowledged)
                counted["whose answer was lost"] += len(publisher.unknown)
                counted["of these, whole and visible"] += check(client, data, prompts, publisher)
                counted["refused"] += len(publisher.refused)
                acknowledged |= publish_again(client, prompts, publisher)
            assert files_beside_blobs(data) == around, "no temporary file stays"
            assert [path for path in temporary.rglob("*") if path.is_file()] == []
        with Client(server.url) as client:
            tasks = {task["task"] for task in client.http.get("/v1/tasks?limit=1000").json()["data"]}
            assert tasks == {f"task-{number}" for number in acknowledged}
            for number in acknowledged:
                check_served(client, number, prompts)
    finally:
        server.end()
    check_blobs(data / "blobs")
    for name, count in {"publishes": scale.publishes, **counted}.items():
        record_property(name, count)


def kill(server: ServerProcess, victim: Victim) -> None:
    """Kill one of its processes and see it, or all of them, end."""
    if victim == "http":
        server.signal(signal.SIGKILL)
        server.wait()
    elif victim == "engine":
        server.child("engine").kill()
        assert server.wait() == 1
    else:
        redis = server.child("redis")
        redis.kill()
        redis.wait(PATIENCE_SECONDS)


def check(client: Client, data: Path, prompts: Adapters, publisher: Publisher) -> int:
    """What a batch left behind; how many publishes stand whose answer was lost."""
    assert list((data / "blobs" / "staging").iterdir()) == [], "no temporary file stays"
    for number in publisher.acknowledged:
        check_served(client, number, prompts)
    for number in publisher.refused:
        assert error_of(client.generate(f"task-{number}")) == (404, "task_not_found")
    standing = [number for number in publisher.unknown if client.generate(f"task-{number}").status_code != 404]
    for number in standing:
        check_served(client, number, prompts)
    assert len(standing) <= 1, "publishes came one after the other: only one of them met the kill"
    return len(standing)


def publish_again(client: Client, prompts: Adapters, publisher: Publisher) -> set[int]:
    """What has no acknowledgement gets one, and never makes a second version; all numbers of the batch."""
    for number in [*publisher.unknown, *publisher.refused]:
        assert client.published(f"task-{number}", prompts[number]) == 1
    return {*publisher.acknowledged, *publisher.unknown, *publisher.refused}


def check_served(client: Client, number: int, prompts: Adapters) -> None:
    """It answers, and its files are those that were uploaded."""
    assert client.said(f"task-{number}").version == 1
    for name in (CONFIG, WEIGHTS):
        file = client.http.get(f"/v1/tasks/task-{number}/versions/1/files/{name}")
        assert file.content == (prompts[number] / name).read_bytes()


def check_blobs(folder: Path) -> None:
    """Only whole blobs, under the hash of their content; nothing is being uploaded."""
    assert list((folder / "staging").iterdir()) == []
    for path in (folder / "blobs").rglob("*"):
        assert path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest() == path.name, path


def files_beside_blobs(data: Path) -> set[str]:
    """All files of a data folder that are no blobs."""
    files = (path.relative_to(data) for path in data.rglob("*") if path.is_file())
    return {str(path) for path in files if path.parts[:2] != ("blobs", "blobs")}

"""Operators who change one task without a pause: publish, activate, roll back, delete, try out."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import httpx

from tests.faults.adapters import Adapters
from tests.faults.client import Client

CHANGE_EVERY = 0.05  # seconds
AT_ONCE = 2  # changes under way at one server


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
        self._choosing = threading.Lock()

    def change(self, client: Client) -> None:
        """One change; the server may refuse what others before it made impossible."""
        with self._choosing:
            if not self._next:
                self._next = [self.publish, self.publish, self.activate, self.roll_back, self.delete, self.try_out]
                self._chance.shuffle(self._next)
            action = self._next.pop()
        response = action(client)
        assert response.is_success or response.status_code in (404, 409), response.text
        if response.is_success:
            with self._choosing:
                self.done[action.__name__] += 1

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


def keep_changing(churn: Churn, clients: Sequence[Client], seconds: float) -> int:
    """Begin a change every `CHANGE_EVERY`, each at another server, and see all of them end; how many there were.

    On a busy machine they pile up, and it takes longer than `seconds`: none is left out.
    """
    changes: list[Future[None]] = []
    begun = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE * len(clients)) as pool:
        while (due := len(changes) * CHANGE_EVERY) < seconds:
            time.sleep(max(0.0, begun + due - time.monotonic()))
            changes.append(pool.submit(churn.change, clients[len(changes) % len(clients)]))
        for change in changes:
            change.result()
    return len(changes)

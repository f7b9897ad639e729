"""The index's calls for versions: publish, read, activate, canary, roll back, delete. Each change is one script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from adapters_store.errors import Conflict, NotFound
from adapters_store.index.stored import blobs_deleting, content_of, decode_version, size_of
from adapters_store.index.tasks import TaskCalls
from adapters_store.records import BY_NOBODY, Canary, Change, NewVersion, Task, TaskSettings, Version
from adapters_store.scope import id_of


class VersionCalls(TaskCalls):
    """The part of `RedisIndex` that is about a task's versions and which of them requests get.

    A caller that names its `base` (a fingerprint) has no version made for another one put before requests: `Conflict`
    "base_mismatch". Servers of other bases on the index do so with theirs.
    """

    async def publish(
        self, task: str, new: NewVersion, *, activate: bool, change: Change = BY_NOBODY, begun: float | None = None
    ) -> tuple[Version, bool]:
        """Add a version whose blobs are durable already; returns it and whether it is new.

        The same digest for the same base again gives the version that stands. The task is created if there is none.
        Its blobs are condemned no longer; `Conflict` "blobs_deleting" where one of them is being deleted at this
        moment, or was since `begun` (a time by `garbage.now()` before they were put), and nothing is changed: put the
        blobs again, and repeat.
        """
        of_task = [self.keys.versions(task), self.keys.digests(task), self.keys.activations(task)]
        keys = [self.keys.task(task), self.keys.tasks, *of_task, self.keys.numbers, self.keys.revisions]
        keys += [self.keys.condemned, self.keys.deleting, self.keys.history(task), self.keys.feed]
        keys += self._of_bills(task)
        settings = msgspec.json.encode(TaskSettings())
        blobs = [record.sha256 for record in new.files.values()]
        arguments = [task, content_of(new), new.digest, msgspec.json.encode(new), int(activate), settings]
        arguments.append(size_of(new))
        answer = await self.run_change("publish", keys, [*arguments, "" if begun is None else begun, *blobs], change)
        if answer == "retry":
            raise blobs_deleting()
        number, stored, is_new = answer
        return decode_version(task, int(number), stored), bool(is_new)

    async def get_version(self, task: str, number: int) -> Version:
        """A version's record, or `NotFound`."""
        found = await self.read_versions(task, [number])
        if number not in found:
            raise NotFound("version", f"{task}@{number}")
        return found[number]

    async def read_versions(self, task: str, numbers: Sequence[int]) -> dict[int, Version]:
        """Those of the numbered versions (at least one number) that exist."""
        with self.asking():
            rows: list[Any] = await self.redis.hmget(self.keys.versions(task), [str(number) for number in numbers])
        found = zip(numbers, rows, strict=True)
        return {number: decode_version(task, number, row) for number, row in found if row is not None}

    async def list_versions(self, task: str) -> list[Version]:
        """The task's versions by number, or `NotFound`."""
        rows: list[str] | None = await self.read("list_versions", [self.keys.task(task), self.keys.versions(task)], [])
        if rows is None:
            raise NotFound("task", task)
        found = sorted((int(number), stored) for number, stored in zip(rows[::2], rows[1::2], strict=True))
        return [decode_version(task, number, stored) for number, stored in found]

    async def activate(self, task: str, number: int, *, base: str | None = None, change: Change = BY_NOBODY) -> Task:
        """Make a version the active one and return the task; `NotFound` where either is unknown.

        Where it was the canary, there is none after it.
        """
        keys = [self.keys.task(task), self.keys.versions(task), self.keys.activations(task)]
        keys += [self.keys.history(task), self.keys.feed]
        _check(await self.run_change("activate", keys, [task, number, base or ""], change), task, number)
        return await self.get_task(task)

    async def rollback(self, task: str, *, base: str | None = None, change: Change = BY_NOBODY) -> Task:
        """Make the newest version that was active before the active one, and still exists, the active one again.

        What it was rolled back from is none that a further rollback leads to. `NotFound`; `Conflict` "no_previous".
        """
        keys = [self.keys.task(task), self.keys.versions(task), self.keys.activations(task)]
        keys += [self.keys.history(task), self.keys.feed]
        _check(await self.run_change("rollback", keys, [task, base or ""], change), task)
        return await self.get_task(task)

    async def set_canary(
        self, task: str, canary: Canary | None, *, base: str | None = None, change: Change = BY_NOBODY
    ) -> Task:
        """Let a version have its percent of the requests, in place of an earlier canary; None: there is none.

        `NotFound`; `Conflict` "version_active" for the active one, "no_active_version" for a task without one.
        """
        keys = [self.keys.task(task), self.keys.versions(task), self.keys.history(task), self.keys.feed]
        number, percent = ("", "") if canary is None else (canary.version, canary.percent)
        outcome = await self.run_change("set_canary", keys, [task, number, percent, base or ""], change)
        _check(outcome, task, None if canary is None else canary.version)
        return await self.get_task(task)

    async def delete_version(self, task: str, number: int, *, change: Change = BY_NOBODY) -> None:
        """Remove a version; `NotFound`, or `Conflict` "version_active", "version_canary". Its number stays used."""
        version = await self.get_version(task, number)
        of_task = [self.keys.versions(task), self.keys.digests(task), self.keys.activations(task)]
        keys = [self.keys.task(task), *of_task, self.keys.history(task), self.keys.feed, *self._of_bills(task)]
        outcome = await self.run_change("delete_version", keys, [task, number, content_of(version)], change)
        _check(outcome, task, number)


def _check(outcome: str, task: str, number: int | None = None) -> None:
    """Raise what a script refused."""
    name = id_of(task)
    which = "the version before" if number is None else f"version {number}"
    refusals = {
        "base_mismatch": f"{which} of task '{name}' was made for another base than this server's; switch to it at a "
        "server of its base, or upload a version for this one",
        "version_active": f"version {number} is the active one of task '{name}'; activate another one first",
        "version_canary": f"version {number} is the canary of task '{name}'; clear the canary first",
        "no_active_version": f"task '{name}' has no active version; upload or activate one",
        "no_previous": f"task '{name}' has no earlier active version to go back to; activate one by its number",
    }
    if outcome == "no_task":
        raise NotFound("task", task)
    if outcome == "no_version":
        raise NotFound("version", f"{task}@{number}")
    if outcome in refusals:
        raise Conflict(outcome, refusals[outcome])

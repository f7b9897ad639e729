"""The index's calls for tasks: settings, listing, deletion, last use, history. Each change is one script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from adapters_store.errors import Conflict, NotFound
from adapters_store.index.scripts import Scripted
from adapters_store.index.stored import decode_version
from adapters_store.records import (
    BY_NOBODY,
    Canary,
    Change,
    HistoryEntry,
    Task,
    TaskSettings,
    TaskState,
    Version,
)
from adapters_store.scope import id_of


class TaskCalls(Scripted):
    """The part of `RedisIndex` that is about tasks."""

    async def put_task(
        self, name: str, settings: TaskSettings, *, expected_revision: int | None = None, change: Change = BY_NOBODY
    ) -> Task:
        """Create the task, or replace its settings; a new revision either way.

        With `expected_revision` (0: there is no such task) only if the settings are still of that revision, else
        `Conflict` "changed_meanwhile": read again, and repeat. `Conflict` "public_name_taken" where another tenant's
        task of this id is public.
        """
        keys = [self.keys.task(name), self.keys.tasks, self.keys.revisions, self.keys.public, self.keys.history(name)]
        expected = "" if expected_revision is None else expected_revision
        arguments = [name, msgspec.json.encode(settings), id_of(name), int(settings.public), expected]
        outcome = await self.run_change("put_task", [*keys, self.keys.feed], arguments, change)
        if outcome == "changed_meanwhile":
            raise Conflict(outcome, f"the settings of task '{id_of(name)}' were changed meanwhile; read them again")
        if outcome == "public_name_taken":
            message = f"another tenant's task '{id_of(name)}' is public; a public task's id must be the only one"
            raise Conflict(outcome, message)
        return await self.get_task(name)

    async def get_task(self, name: str) -> Task:
        """The task's present record, or `NotFound`."""
        [found] = await self.read_tasks([name])
        if found is None:
            raise NotFound("task", name)
        return found.task

    async def read_tasks(self, names: Sequence[str]) -> list[TaskState | None]:
        """For each name its record, active and canary version, all of one moment; None where there is no task."""
        prefixes = [self.keys.task_of, self.keys.activations_of, self.keys.versions_of]
        rows = await self.read("read_tasks", [], [*prefixes, *names])
        return [_decode_state(name, row) for name, row in zip(names, rows, strict=True)]

    async def list_tasks(self, limit: int, after: str | None = None) -> tuple[list[Task], bool]:
        """Up to `limit` tasks by tenant and name, from the first beyond `after`; and whether more follow."""
        page, has_more = await self.list_states(limit, after)
        return [state.task for state in page], has_more

    async def list_active(self, limit: int, after: str | None = None) -> tuple[list[tuple[Task, Version | None]], bool]:
        """As `list_tasks`, each task with its active version."""
        page, has_more = await self.list_states(limit, after)
        return [(state.task, state.active) for state in page], has_more

    async def list_states(
        self, limit: int, after: str | None = None, *, tenant: str | None = None
    ) -> tuple[list[TaskState], bool]:
        """As `list_tasks`, each task with its versions; of one tenant ("" is the default one) or, with None, of all.

        `after` is the scoped name of a task. A tenant's tasks stand together, the default tenant's first.
        """
        low, high = ("-", "+") if tenant is None else (f"[{tenant}/", f"({tenant}0")  # "0" is the sign after "/"
        if after is not None:
            low = f"({_listed(after)}"
        with self.asking():
            found: list[Any] = await self.redis.zrangebylex(self.keys.tasks, low, high, start=0, num=limit + 1)
        names = [name.removeprefix("/") for name in found[:limit]]
        states = await self.read_tasks(names) if names else []
        return [state for state in states if state is not None], len(found) > limit

    async def count_tasks(self) -> int:
        """How many tasks there are."""
        with self.asking():
            return int(await self.redis.zcard(self.keys.tasks))

    async def delete_task(self, task: str, *, change: Change = BY_NOBODY) -> None:
        """Remove the task with all its versions and customizations, or raise `NotFound`.

        Its version numbers stay used, and its history stays readable.
        """
        of_task = [self.keys.versions(task), self.keys.digests(task), self.keys.activations(task)]
        keys = [self.keys.task(task), self.keys.tasks, *of_task, self.keys.customizations(task), self.keys.last_used]
        keys += [self.keys.public, self.keys.history(task), self.keys.feed, *self._of_bills(task)]
        if await self.run_change("delete_task", keys, [task, id_of(task)], change) == "no_task":
            raise NotFound("task", task)

    async def history(self, task: str, limit: int, before: int | None = None) -> list[HistoryEntry]:
        """Up to `limit` changes of the task, newest first, older than the entry with the id `before`.

        About the last 1000 are kept, also of a task that was deleted; none for a name that never was a task.
        """
        return await self._read_history(self.keys.history(task), limit, before)

    async def customization_history(self, limit: int, before: int | None = None) -> list[HistoryEntry]:
        """As `history`, of all users' customizations of all tasks together.

        They are kept apart: a million users' changes would soon push the operators' out of a task's own history.
        """
        return await self._read_history(self.keys.customization_history, limit, before)

    async def touch(self, names: Mapping[str, float]) -> None:
        """Record when tasks were last used (Unix seconds); never moves a time back, ignores unknown tasks."""
        arguments = [value for pair in names.items() for value in pair]
        await self.run("touch", [self.keys.tasks, self.keys.last_used], arguments)

    async def last_used(self, task: str) -> float | None:
        """When the task was last used, if ever."""
        return (await self.last_uses([task]))[0]

    async def last_uses(self, tasks: Sequence[str]) -> list[float | None]:
        """When each of the tasks was last used, if ever: one call for all."""
        if not tasks:
            return []
        with self.asking():
            scores: list[Any] = await self.redis.zmscore(self.keys.last_used, list(tasks))
        return [None if score is None else float(score) for score in scores]

    async def _read_history(self, key: str, limit: int, before: int | None) -> list[HistoryEntry]:
        rows = await self.read("read_history", [key], [limit, "" if before is None else before])
        return [msgspec.json.decode(row, type=HistoryEntry) for row in rows]


def _listed(name: str) -> str:
    """A task's name in the list of all, as in `change_common.lua`."""
    return name if "/" in name else f"/{name}"


def _decode_state(name: str, row: list[str | None]) -> TaskState | None:
    settings, revision, active, canary, percent, created, updated, previous, active_record, canary_record = row
    if settings is None or revision is None or created is None or updated is None:
        return None
    task = Task(
        name=name,
        settings=msgspec.json.decode(settings, type=TaskSettings),
        settings_revision=int(revision),
        active=None if active is None else int(active),
        previous=None if previous is None else int(previous),
        canary=None if canary is None or percent is None else Canary(int(canary), float(percent)),
        created=float(created),
        updated=float(updated),
    )
    return TaskState(
        task,
        None if active is None or active_record is None else decode_version(name, int(active), active_record),
        None if canary is None or canary_record is None else decode_version(name, int(canary), canary_record),
    )

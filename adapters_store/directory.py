"""A server's mirror of the index: every task with its active version in memory, kept current by the change feed.

Requests are resolved from memory, also while Redis is away. It reads the index and never writes it; it knows neither
files nor who is asking.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from adapters_store.errors import Conflict, NotFound, StoreError, StoreUnavailable
from adapters_store.feed import FeedLost
from adapters_store.index import RedisIndex
from adapters_store.records import Task, Version

PAGE = 500
"""Tasks read at once while loading: the loop is given back between pages."""
FEED_WAIT = 0.25
"""Seconds; also the longest time until an index emptied without a broken connection is noticed."""
RETRY_DELAY = 0.2
REMEMBERED = 16
"""Versions of one task, beside its active one, that are held once asked for."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Entry:
    task: Task
    active: Version | None
    others: dict[int, Version] = field(default_factory=dict)
    """Further versions, the last `REMEMBERED` that somebody asked for, oldest first."""


class TaskDirectory:
    """The mirror of `index`. `start` loads it, `stop` ends its following task."""

    def __init__(self, index: RedisIndex) -> None:
        self._index = index
        self._entries: dict[str, _Entry] = {}
        self._index_id = ""
        self._position = ""
        self._connected = False
        self._stopping = False
        self._follower: asyncio.Task[None] | None = None
        # One reader at a time, so that an older answer never overwrites a newer one.
        self._reading = asyncio.Lock()

    @property
    def available(self) -> bool:
        """Whether the mirror is current: Redis answered, and the feed is followed."""
        return self._connected and self._follower is not None and not self._follower.done()

    async def start(self) -> None:
        """Load all tasks (`StoreUnavailable` if that fails), then follow the feed in a task of its own."""
        await self._load()
        self._follower = asyncio.create_task(self._follow(), name="change feed")

    async def stop(self) -> None:
        """Stop following, within `FEED_WAIT` or a call's timeout. What is held still answers.

        Nothing is cancelled: a call cancelled just as its answer comes would leak its connection in the client's pool.
        """
        self._stopping = True
        if self._follower is not None:
            await self._follower

    def get(self, name: str) -> Task | None:
        """The task's record as mirrored."""
        entry = self._entries.get(name)
        return None if entry is None else entry.task

    async def resolve(self, name: str) -> tuple[Task, Version]:
        """The task and the version that "task", "task@N" or "task@canary" names.

        `NotFound` where there is none; `StoreUnavailable` where that cannot be known while Redis is away; `Conflict`
        "no_active_version" for a task without one.
        """
        task_name, at, selector = name.partition("@")
        entry = self._entries.get(task_name)
        if entry is None:
            if not self.available:
                raise StoreUnavailable(f"task '{task_name}' is not known here, and Redis cannot be asked")
            raise NotFound("task", task_name)
        if not at:
            if entry.active is None:
                raise Conflict("no_active_version", f"task '{task_name}' has no active version; upload or activate one")
            return entry.task, entry.active
        return entry.task, await self._select(entry, selector)

    async def refresh(self, names: Iterable[str]) -> None:
        """Read these tasks anew. A writer calls it after its own change, which the feed would bring a little later."""
        wanted = sorted(set(names))
        async with self._reading:
            for name, found in zip(wanted, await self._index.read_tasks(wanted), strict=True):
                if found is None:
                    self._entries.pop(name, None)
                    continue
                asked = self._entries[name].others if name in self._entries else {}
                others = await self._index.read_versions(name, list(asked)) if asked else {}
                self._entries[name] = _Entry(*found, others)

    async def _select(self, entry: _Entry, selector: str) -> Version:
        if selector == "canary":
            if entry.task.canary is None:
                raise NotFound("canary", f"{entry.task.name}@canary")
            number = entry.task.canary.version
        elif re.fullmatch("[1-9][0-9]{0,15}", selector):
            number = int(selector)
        else:
            raise NotFound("version", f"{entry.task.name}@{selector}")
        if entry.active is not None and entry.active.number == number:
            return entry.active
        version = entry.others.pop(number, None) or await self._index.get_version(entry.task.name, number)
        entry.others[number] = version
        while len(entry.others) > REMEMBERED:
            del entry.others[next(iter(entry.others))]
        return version

    async def _load(self) -> None:
        async with self._reading:
            index_id = await self._index.identify()
            position = await self._index.feed.end()
            entries: dict[str, _Entry] = {}
            has_more, last = True, None
            while has_more:
                page, has_more = await self._index.list_active(PAGE, last)
                entries.update({task.name: _Entry(task, active) for task, active in page})
                last = page[-1][0].name if page else last
            if self._index_id not in ("", index_id):
                missing = len(self._entries.keys() - entries.keys())
                log.error("redis was emptied or replaced", tasks_missing=missing, tasks=len(entries))
            self._entries, self._index_id, self._position = entries, index_id, position
            self._connected = True

    async def _follow(self) -> None:
        while not self._stopping:
            try:
                wait = FEED_WAIT if self._connected else None  # once Redis is back, say so at once
                events = await self._index.feed.after(self._position, self._index_id, wait=wait)
                if events:
                    await self.refresh(event.task for event in events)
                    self._position = events[-1].id
                if not self._connected:
                    log.info("redis is back")
                self._connected = True
            except FeedLost as reason:
                log.warning("reading the whole index anew", reason=str(reason))
                await self._reload()
            except StoreError as error:
                await self._wait_out(error)

    async def _reload(self) -> None:
        try:
            await self._load()
        except (StoreError, FeedLost) as error:
            await self._wait_out(error)

    async def _wait_out(self, error: Exception) -> None:
        if self._connected:
            log.warning("redis is away; known tasks are served from memory", reason=str(error))
        self._connected = False
        await asyncio.sleep(RETRY_DELAY)

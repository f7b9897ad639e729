"""A server's mirror of the index: every task with its active version and canary in memory, kept current by the feed.

Requests are resolved from memory, also while Redis is away. It reads the index and never writes it; it knows no files.
It is the one follower of the feed: other memories of the index subscribe to it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterable

import structlog

from adapters_store.errors import Conflict, NotFound, StoreError, StoreUnavailable
from adapters_store.index.feed import TASK_EVENTS, FeedListener, FeedLost
from adapters_store.index.index import RedisIndex
from adapters_store.index.versions import VersionCalls
from adapters_store.mirror.entries import Mirror, Mirrored
from adapters_store.records import Task, TaskState, Version
from adapters_store.scope import id_of, scoped

PAGE = 500
"""Tasks read at once while loading: the loop is given back between pages."""
FEED_WAIT = 0.9
"""Seconds, and up to a turn of Redis' own clock more (its `hz`); also the longest time until an index emptied without a
broken connection is noticed."""
RETRY_DELAY = 0.2
REMEMBERED = 16
"""Versions of one task, beside its active one and its canary, that are held once asked for."""
MISSING_NAMED = 20
"""Tasks that the log names when an index came back without them."""

log = structlog.get_logger(__name__)


class TaskDirectory:
    """The mirror of `index`. `start` loads it, `stop` ends its following task."""

    def __init__(self, index: RedisIndex) -> None:
        self._index = index
        self._reader = VersionCalls(index.redis, index.keys)  # its calls do not end while `index` says `is_away`
        self._mirror = Mirror()
        self._listeners: list[FeedListener] = []
        self._watchers: list[Callable[[], None]] = []
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
        """Load all tasks (`StoreUnavailable` if that fails), then follow the feed in a task of its own.

        From then on until `stop` the index asks nothing of Redis while that is not available.
        """
        await self._load()
        self._follower = asyncio.create_task(self._follow(), name="change feed")
        self._index.is_away = lambda: not self.available

    async def stop(self) -> None:
        """Stop following, within a call's timeout. What is held still answers."""
        self._stopping = True
        self._index.is_away = lambda: False
        if self._follower is not None:
            await self._index.feed.stop_waiting()
            await self._follower

    def subscribe(self, listener: FeedListener) -> None:
        """Have every event handed on to `listener`, and be told when some may have been missed."""
        self._listeners.append(listener)
        listener.subscribed(self)

    def watch(self, watcher: Callable[[], None]) -> None:
        """Have `watcher` called whenever what is held of some task may have changed: behind the change, where
        `subscribe` gives the events before it."""
        self._watchers.append(watcher)

    def get(self, name: str) -> Task | None:
        """The task's record as mirrored."""
        entry = self._mirror.entries.get(name)
        return None if entry is None else entry.state.task

    def list_states(self, limit: int, after: str | None, *, tenant: str) -> tuple[list[TaskState], bool]:
        """What the index's call of this name answers, as mirrored: for when Redis cannot be asked. It looks at every
        task."""
        return self._mirror.page(tenant, limit, after)

    def states(self, names: Iterable[str]) -> list[TaskState]:
        """Those of the tasks that there are, as mirrored."""
        return [self._mirror.entries[name].state for name in names if name in self._mirror.entries]

    def pinned(self) -> list[Task]:
        """All pinned tasks, by name."""
        return self._mirror.pinned()

    def public(self) -> list[Task]:
        """All public tasks, by id."""
        return self._mirror.public()

    def seen_by(self, tenant: str, name: str) -> str:
        """The scoped name of the task that a tenant's caller means by `name` ("id", "id@N" or "id@canary").

        Their own task, else the public one; where there is neither, their own name, which nothing has.
        """
        own = scoped(tenant, name)
        task_id, at, selector = name.partition("@")
        if scoped(tenant, task_id) in self._mirror.entries:
            return own
        public = self._mirror.public_name(task_id)
        return own if public is None else f"{public}{at}{selector}"

    async def resolve(self, name: str, *, pick: str | None = None) -> tuple[Task, Version]:
        """The task and the version that the scoped "task", "task@N" or "task@canary" names.

        `pick` (a user, else a request's id) decides whether "task" is the canary: always alike for one `pick`.
        `NotFound` where there is none; `StoreUnavailable` where that cannot be known while Redis is away; `Conflict`
        "no_active_version" for a task without one.
        """
        task_name, at, selector = name.partition("@")
        entry = self._mirror.entries.get(task_name)
        if entry is None:
            if not self.available:
                raise StoreUnavailable(f"task '{id_of(task_name)}' is not known here, and Redis cannot be asked")
            raise NotFound("task", task_name)
        task, active, canary = entry.state
        if at:
            return task, await self._select(entry, selector)
        if active is None:
            message = f"task '{id_of(task_name)}' has no active version; upload or activate one"
            raise Conflict("no_active_version", message)
        if canary is not None and task.canary is not None and pick is not None:
            return task, canary if _percentile(task_name, pick) < task.canary.percent else active
        return task, active

    async def refresh(self, names: Iterable[str]) -> None:
        """Read these tasks anew. A writer calls it after its own change, which the feed would bring a little later."""
        wanted = sorted(set(names))
        try:
            async with self._reading:
                for name, found in zip(wanted, await self._reader.read_tasks(wanted), strict=True):
                    if found is None:
                        self._mirror.drop(name)
                        continue
                    held = self._mirror.entries.get(name)
                    asked = [] if held is None else list(held.others)
                    self._mirror.hold(found, await self._reader.read_versions(name, asked) if asked else {})
        finally:  # some are held anew also where another could not be read
            self._tell_watchers()

    async def _select(self, entry: Mirrored, selector: str) -> Version:
        task, active, canary = entry.state
        if selector == "canary":
            if canary is None:
                raise NotFound("canary", f"{task.name}@canary")
            return canary
        if not re.fullmatch("[1-9][0-9]{0,15}", selector):
            raise NotFound("version", f"{task.name}@{selector}")
        number = int(selector)
        for held in (active, canary):
            if held is not None and held.number == number:
                return held
        version = entry.others.pop(number, None) or await self._index.get_version(task.name, number)
        entry.others[number] = version
        while len(entry.others) > REMEMBERED:
            del entry.others[next(iter(entry.others))]
        return version

    async def _load(self) -> None:
        async with self._reading:
            index_id = await self._index.identify()
            position = await self._index.feed.end()
            self._clear_listeners()  # not earlier: what they read from here on, the feed from `position` keeps right
            mirror = Mirror()
            has_more, last = True, None
            while has_more:
                page, has_more = await self._reader.list_states(PAGE, last)
                for state in page:
                    mirror.hold(state, {})
                last = page[-1].task.name if page else last
            self._clear_listeners()  # the feed was not read meanwhile: what changed since is not to wait for it
            if self._index_id not in ("", index_id):
                _say_what_is_missing(self._mirror.entries.keys() - mirror.entries.keys(), len(mirror.entries))
            self._mirror = mirror
            self._index_id, self._position = index_id, position
            self._connected = True
        self._tell_watchers()

    def _tell_watchers(self) -> None:
        for watcher in self._watchers:
            watcher()

    def _clear_listeners(self) -> None:
        for listener in self._listeners:
            listener.clear()

    async def _follow(self) -> None:
        while not self._stopping:
            try:
                await self._take_news()
            except StoreError as error:
                await self._wait_out(error)
            except Exception as error:  # whatever it was: a server that stopped following would stay blind
                log.error("the change feed could not be read", exc_info=True)
                await self._wait_out(error)

    async def _take_news(self) -> None:
        """Read what changed since the last time, waiting for it a little."""
        try:
            wait = FEED_WAIT if self._connected else None  # once Redis is back, say so at once
            events = await self._index.feed.after(self._position, self._index_id, wait=wait)
            for listener in self._listeners:
                for event in events:
                    listener.changed(event)
            if changed := {event.task for event in events if event.kind in TASK_EVENTS}:
                await self.refresh(changed)
            if events:
                self._position = events[-1].id
            if not self._connected:
                log.info("redis is back")
            self._connected = True
        except FeedLost as reason:
            log.warning("reading the whole index anew", reason=str(reason))
            try:
                await self._load()
            except FeedLost as error:
                await self._wait_out(error)

    async def _wait_out(self, error: Exception) -> None:
        if self._stopping:  # it has broken the connection
            return
        if self._connected:
            why = "redis is away" if isinstance(error, StoreUnavailable) else "the index cannot be followed"
            log.warning(f"{why}; known tasks are served from memory", reason=str(error))
        self._connected = False
        await asyncio.sleep(RETRY_DELAY)


def _say_what_is_missing(names: set[str], left: int) -> None:
    log.error(
        "redis was emptied or replaced; restore a backup or publish anew",
        tasks=left,
        tasks_missing=len(names),
        among_them=", ".join(sorted(names)[:MISSING_NAMED]),
    )


def _percentile(task: str, pick: str) -> float:
    """Where `pick` stands among all: uniform in 0 ≤ x < 100, for each task another place."""
    digest = hashlib.sha256(f"{task}/{pick}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48 * 100  # 48 bits: even the largest is below 100 as a float

"""The change feed: a Redis stream with one entry per change of the index, for servers that mirror it.

An entry names what changed: a task, a user's customization of a task, a user, an API key. Its new state is read from
the index, so that applying an entry twice, late or out of order is harmless. A follower that missed entries cannot be
told which: it is told that it missed some.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from adapters_store.index.connection import redis_errors
from adapters_store.index.keys import Keys

FEED_LENGTH = 10_000
"""Entries kept at least: how many changes a server may miss without reading everything anew."""
BATCH = 500

TaskEvent = Literal[
    "task_put", "task_deleted", "version_published", "version_activated", "version_deleted", "canary_set"
]
EventKind = Literal["feed_begun", TaskEvent, "customized", "uncustomized", "user_deleted", "key_changed"]
TASK_EVENTS: frozenset[str] = frozenset(get_args(TaskEvent))
"""After these the task is to be read anew."""


class FeedEvent(msgspec.Struct, frozen=True):
    """A change; `id` is its place in the feed. What a kind has no use for is empty.

    A `TaskEvent` is of `task`, "customized" and "uncustomized" of `user` and `task`, "user_deleted" of `user`,
    "key_changed" of `key`, an API key's id.
    """

    id: str
    kind: EventKind
    task: str = ""
    user: str = ""
    key: str = ""


class Follower(Protocol):
    """Who hands the feed's events on: `TaskDirectory`."""

    @property
    def available(self) -> bool:
        """Whether the feed is followed."""


class FeedListener(Protocol):
    """A memory of something in the index that is kept right by the feed; see `TaskDirectory.subscribe`."""

    def subscribed(self, follower: Follower) -> None:
        """From now on `follower` hands events on."""

    def changed(self, event: FeedEvent) -> None:
        """Forget what this change makes wrong. The same event may come again."""

    def clear(self) -> None:
        """Forget everything: changes may have been missed."""


class FeedLost(Exception):  # noqa: N818 - named as the store's errors are
    """The feed does not lead from the follower's position to the present: everything must be read anew."""


class ChangeFeed:
    """Reads the feed of one index."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._waiting: Pipeline | None = None

    async def end(self) -> str:
        """The id of the newest entry: read before the index is, it is where following starts."""
        with redis_errors():
            newest = await self._redis.xrevrange(self._keys.feed, count=1)
        if not newest:
            raise FeedLost("the feed is empty")
        return str(newest[0][0])

    async def after(self, position: str, index_id: str, *, wait: float | None) -> list[FeedEvent]:
        """The oldest changes after `position`, at most `BATCH`; waits up to `wait` seconds for the first, if at all.
        One call waits at a time: a feed has one follower.

        Raises `FeedLost` when Redis now holds another index than `index_id`, or when the entry at `position` was
        trimmed away, and with it perhaps some after it; also when this release does not understand one of them.
        """
        block = None if wait is None else int(wait * 1000)
        # All of it is asked at once: to be woken costs a process more than what it does then. No transaction, which
        # would not wait, and in which a full Redis refuses even reads. None is needed: an entry that is there at the
        # end was there when the others were read, and another index has other entries.
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.xread({self._keys.feed: position}, count=BATCH, block=block)
                pipeline.get(self._keys.index_id)
                pipeline.xrange(self._keys.feed, position, position)
                self._waiting = pipeline
                try:
                    answer, found_id, found_entry = await pipeline.execute()
                finally:
                    self._waiting = None
        if found_id != index_id:
            raise FeedLost("Redis holds another index than before: it was emptied or replaced")
        if not found_entry:
            raise FeedLost("the feed was trimmed past this server's position")
        entries: list[tuple[str, dict[str, str]]] = answer[0][1] if answer else []
        try:
            return [msgspec.convert({"id": at, **fields}, FeedEvent) for at, fields in entries]
        except msgspec.ValidationError as error:
            raise FeedLost(f"the feed has an entry that this release does not understand: {error}") from error

    async def stop_waiting(self) -> None:
        """End the call of `after` that waits, if one does; it raises `StoreUnavailable`. One that is still connecting
        ends by itself.

        Its connection is closed, without waiting for the other side, which with TLS may take until the call's timeout.
        Were the call cancelled just as its answer comes, the client's pool would lose the connection.
        """
        if self._waiting is not None and self._waiting.connection is not None:
            await self._waiting.connection.disconnect(nowait=True)

"""The index's side of a restore: all keys are written under a namespace of their own, and become the index in one step.

Reading the backup's file, and the blobs, are not known here.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, get_args

import msgspec
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline

from adapters_store.backup.backup import pairs, public_id
from adapters_store.backup.file import ListKind, Part
from adapters_store.errors import Conflict, StoreUnavailable
from adapters_store.index.connection import redis_errors
from adapters_store.index.keys import Keys
from adapters_store.index.packed import paid_by
from adapters_store.index.scripts import Scripted
from adapters_store.records import BY_NOBODY

LAST_STEP_SECONDS = 120.0
"""A client's patience with the last step; it takes some seconds for a million customizations."""
AT_ONCE = 1000


class IndexWriter(Scripted):
    """Writes parts under the namespace `Keys.restoring`, and makes them the index in one step."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        super().__init__(redis, keys)
        self._staged = Keys(keys.restoring)
        self._payers: dict[str, str] = {}  # API keys, and the numbers that customizations name them by
        self._paid: Counter[tuple[str, str]] = Counter()  # bytes, by task and API key or "#" and its number
        self._task = ""  # whose customizations are being written
        self._bills_of: dict[str, tuple[int, int]] = {}  # of its users: who pays, for how many bytes

    async def demand_empty(self) -> None:
        """`Conflict` where there is, or ever was, anything."""
        with redis_errors():
            if await self.redis.exists(*self._roots()):
                raise _not_empty()

    async def remove_leftovers(self) -> None:
        """Remove what this restore, or one that died, has written."""
        with redis_errors():
            while found := await self.redis.srandmember(self.keys.restored, AT_ONCE):
                names = [str(name) for name in found]
                # No transaction, which a full Redis refuses. The keys go first: a name is there as long as its key.
                async with self.redis.pipeline(transaction=False) as pipeline:
                    pipeline.unlink(*(f"{self.keys.restoring}{name}" for name in names))
                    pipeline.srem(self.keys.restored, *names)
                    await pipeline.execute()

    async def write(self, parts: list[Part]) -> None:
        """A batch of parts, as one transaction."""
        async with self.redis.pipeline(transaction=True) as pipeline:
            written = {key for part in parts for key in self._write(pipeline, part)}
            await self._execute(pipeline, written)

    async def finish_sums(self) -> None:
        """Write what was counted over all parts: what the API keys have stored."""
        self._count_customizations()
        left = iter(self._paid.items())
        while batch := list(islice(left, AT_ONCE)):
            async with self.redis.pipeline(transaction=True) as pipeline:
                for (task, payer), size in batch:
                    api_key = self._payers[payer] if payer.startswith("#") else payer
                    pipeline.hincrby(self._staged.paid(task), api_key, size)
                    pipeline.hincrby(self._staged.stored_bytes, api_key, size)
                written = {self._staged.paid(task) for (task, _), _ in batch}
                await self._execute(pipeline, {*written, self._staged.stored_bytes})

    async def end(self, begun: float) -> None:
        """The last step. `begun` is a time before the blobs were put."""
        keys = [self.keys.index_id, self.keys.feed, self.keys.condemned, self.keys.deleting, self.keys.restored]
        index_id = secrets.token_hex(16)
        arguments = [self.keys.restoring, self.keys.namespace, begun, index_id]
        patient = IndexWriter(_patient(self.redis), self.keys)
        try:
            outcome = await patient.run_change("restore_end", [*keys, *self._roots()], arguments, BY_NOBODY)
        except StoreUnavailable:
            with redis_errors():
                if await self.redis.get(self.keys.index_id) == index_id:
                    return  # it was carried out; only the answer was lost
            raise
        finally:
            await patient.redis.aclose()
        if outcome == "not_empty":
            raise _not_empty()
        if outcome == "retry":
            message = (
                "files were being deleted as garbage; run the restore again, some minutes later if this comes again"
            )
            raise Conflict("blobs_deleting", message)

    async def _execute(self, pipeline: Pipeline, written: set[str]) -> None:
        """With the names of the keys that are written: each that exists can be found."""
        if written:
            pipeline.sadd(self.keys.restored, *(key.removeprefix(self.keys.restoring) for key in written))
            with redis_errors():
                await pipeline.execute()

    def _write(self, pipeline: Pipeline, part: Part) -> Iterator[str]:
        """Queue what a part means; the keys that it is written to."""
        key = self._key(part)
        if not part.values:
            return
        if part.kind == "last_used":
            pipeline.zadd(key, {part.name: float(part.values[0])})
        elif part.kind in get_args(ListKind):
            pipeline.rpush(key, *part.values)
        else:
            fields = dict(pairs(part.values))
            pipeline.hset(key, mapping=fields)  # type: ignore[arg-type]  # its keys are invariant there: str | bytes
            yield from self._derive(pipeline, part, fields)
        yield key

    def _derive(self, pipeline: Pipeline, part: Part, fields: dict[str, Any]) -> Iterator[str]:
        """What a part implies: lists of all tasks and of a user's, sums."""
        if part.kind == "task":
            pipeline.zadd(self._staged.tasks, {part.name if "/" in part.name else f"/{part.name}": 0})
            yield self._staged.tasks
            if (task_id := public_id(part)) is not None:
                pipeline.hset(self._staged.public, task_id, part.name)
                yield self._staged.public
        elif part.kind == "customizations":
            if part.name != self._task:
                self._count_customizations()
                self._task = part.name
            for user, stored in fields.items():
                pipeline.zadd(self._staged.user(user), {part.name: 0})
                yield self._staged.user(user)
                self._bills_of[user] = paid_by(stored)
        elif part.kind == "bills":
            for bill in fields.values():
                size, _, payer = bill.partition(" ")
                self._paid[part.name, payer] += int(size)
        elif part.kind == "payers":
            self._payers.update(fields)
        elif part.kind == "api_keys":
            for sha256, record in fields.items():
                key_id = msgspec.json.decode(record.partition(" ")[2])["id"]
                pipeline.hset(self._staged.api_key_ids, key_id, sha256)
            yield self._staged.api_key_ids

    def _count_customizations(self) -> None:
        """Of the task whose parts have ended: a user may stand in several of them, and the last one is what is written.
        A backup has a task's parts behind each other."""
        for payer, size in self._bills_of.values():
            if payer:
                self._paid[self._task, f"#{payer}"] += size
        self._bills_of.clear()

    def _key(self, part: Part) -> str:
        spelled = getattr(self._staged, part.kind)
        return str(spelled(part.name)) if callable(spelled) else str(spelled)

    def _roots(self) -> list[str]:
        """What no index lacks that ever had a task or a key."""
        keys = self.keys
        return [keys.tasks, keys.revisions, keys.numbers, keys.words, keys.customization_history, keys.api_keys]


def _patient(redis: Redis) -> Redis:
    """A client of the same Redis that waits for the last step."""
    pool = redis.connection_pool
    arguments = {**pool.connection_kwargs, "socket_timeout": LAST_STEP_SECONDS}
    return Redis.from_pool(BlockingConnectionPool(connection_class=pool.connection_class, **arguments))


def _not_empty() -> Conflict:
    message = (
        "the index is not empty, and a backup becomes an index of its own: restore it into another --data-dir, "
        "another Redis, or empty this one first"
    )
    return Conflict("index_not_empty", message)

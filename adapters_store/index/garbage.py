"""What the index knows of blobs that nobody names, and who may delete them. It deletes no file itself.

    stored, named by nobody → condemned → (grace) → claimed: being deleted → deleted, remembered for a day

Whoever names a blob (`publish`, `put_customization`) takes it off the condemned in the same step, and is refused while
it is being deleted or if it was since the upload began to put its files; then the files are put again. So a blob that
is claimed is named by nobody and cannot come to be, and a name never outlives its blob.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
from redis.asyncio.lock import Lock
from redis.client import NEVER_DECODE
from redis.exceptions import LockError

from adapters_store.errors import Conflict, StoreError, StoreUnavailable
from adapters_store.index.connection import redis_errors
from adapters_store.index.packed import blobs_of
from adapters_store.index.scripts import Scripted
from adapters_store.records import FileRecord

REMEMBERED = 86_400
"""Seconds for which a deletion is remembered: longer than any upload takes."""
LOCK_SECONDS = 120.0
"""Until a collector that died has lost its turn; a living one renews it."""
PAGE = 100
"""Tasks, and values of each of them, that are asked for at once."""


class _Files(msgspec.Struct):
    """Of a version's record, what garbage collection needs."""

    files: dict[str, FileRecord]


class Turn:
    """The right to collect, for `LOCK_SECONDS` from its last renewal."""

    def __init__(self, lock: Lock) -> None:
        self._lock = lock

    async def renew(self) -> None:
        """Go on having it; `StoreUnavailable` where it was lost meanwhile."""
        try:
            with redis_errors():
                await self._lock.reacquire()
        except LockError as error:
            raise StoreUnavailable("the turn to collect garbage was lost; Redis was away for too long") from error


class GarbageIndex(Scripted):
    """The index's calls for the garbage collector. Times are Unix seconds by the clock of Redis."""

    async def now(self) -> float:
        """The time by Redis."""
        with redis_errors():
            seconds, microseconds = await self.redis.time()
        return float(seconds + microseconds / 1e6)

    async def begin(self) -> float:
        """The time by Redis, for an upload that is about to put its files. Raises what naming them would where Redis
        takes no writes, so that they are not put for nothing."""
        async with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.setrange(self.keys.nothing, 0, "")
            pipeline.time()
            with redis_errors():
                _, (seconds, microseconds) = await pipeline.execute()
        return float(seconds + microseconds / 1e6)

    async def index_id(self) -> str:
        """The id of the index that stands in Redis now; `StoreUnavailable` where none does."""
        with redis_errors():
            found: Any = await self.redis.get(self.keys.index_id)
        if found is None:
            raise StoreUnavailable("there is no index in Redis at the moment; was Redis emptied?")
        return str(found)

    async def named(self) -> AsyncIterator[list[str]]:
        """The blobs of all versions and customizations, page by page, some of them several times.

        What is named from the first page to the last is among them, whatever else changes meanwhile.
        """
        cursor = 0
        while True:
            with redis_errors():
                answer: Any = await self.redis.zscan(self.keys.tasks, cursor, count=PAGE)
            cursor, page = answer
            tasks = [str(listed).removeprefix("/") for listed, _ in page]
            async for records in self._values([self.keys.versions(task) for task in tasks]):
                yield [file.sha256 for record in records for file in _files_of_version(record)]
            async for records in self._values([self.keys.customizations(task) for task in tasks]):
                yield [sha256 for record in records for sha256 in blobs_of(record)]
            if cursor == 0:
                return

    async def condemn(self, blobs: Sequence[str]) -> None:
        """Note that these blobs are named by nobody, as it seems; from then on they have their grace."""
        await self.run("garbage_condemn", [self.keys.condemned, self.keys.deleting], list(blobs))

    async def condemned(self, before: float) -> list[str]:
        """The blobs that have been condemned since before a time."""
        with redis_errors():
            found: list[Any] = await self.redis.zrangebyscore(self.keys.condemned, "-inf", f"({before!r}")
        return found

    async def pardon(self, blobs: Sequence[str]) -> None:
        """They are named after all, or not stored any more."""
        with redis_errors():
            await self.redis.zrem(self.keys.condemned, *blobs)

    async def claim(self, blobs: Sequence[str]) -> list[str]:
        """Those of the blobs that are condemned still: nobody can name them until they are `deleted`."""
        claimed: list[str] = await self.run("garbage_claim", [self.keys.condemned, self.keys.deleting], list(blobs))
        return claimed

    async def deleted(self, blobs: Sequence[str]) -> None:
        """Claimed blobs have been deleted: putting and naming them makes sense again."""
        await self.run("garbage_deleted", [self.keys.deleting], [REMEMBERED, *blobs])

    async def abandoned(self, before: float) -> list[str]:
        """Blobs that were claimed before a time and are not deleted: their collector died."""
        with redis_errors():
            found: list[Any] = await self.redis.zrangebyscore(self.keys.deleting, f"({-before!r}", "(0")
        return found

    async def is_time(self, interval: float) -> bool:
        """Whether no server has asked this, and got a yes, for `interval` seconds."""
        with redis_errors():
            return bool(await self.redis.set(self.keys.garbage_pause, "1", nx=True, px=int(interval * 1000)))

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """The right to collect, which one collector at a time has. `Conflict` where another has it.

        It is renewed meanwhile, whatever a listing or a blob takes. Whether it was kept is seen by the caller's own
        `renew` before each step that needs it.
        """
        lock = self.redis.lock(self.keys.garbage_lock, timeout=LOCK_SECONDS, blocking=False)
        with redis_errors():
            if not await lock.acquire():
                raise Conflict("garbage_locked", "another server or command is collecting garbage; try again later")
        turn = Turn(lock)
        renewing = asyncio.create_task(_renew(turn), name="garbage turn")
        try:
            yield turn
        finally:
            while not renewing.done():  # a call to Redis may take a cancellation for its own timeout
                renewing.cancel()
                await asyncio.wait([renewing], timeout=1.0)
            with suppress(StoreError, LockError), redis_errors():
                await lock.release()

    async def _values(self, hashes: Sequence[str]) -> AsyncIterator[list[bytes]]:
        """The values of some hashes, in pages."""
        cursors = dict.fromkeys(hashes, 0)
        while cursors:
            async with self.redis.pipeline(transaction=False) as pipeline:
                for name, cursor in cursors.items():
                    pipeline.execute_command("HSCAN", name, cursor, "COUNT", PAGE, **{NEVER_DECODE: True})
                with redis_errors():
                    answers: list[tuple[int, dict[bytes, bytes]]] = await pipeline.execute()
            for name, (cursor, rows) in zip(list(cursors), answers, strict=True):
                yield list(rows.values())
                if cursor == 0:
                    del cursors[name]
                else:
                    cursors[name] = cursor


async def _renew(turn: Turn) -> None:
    while True:
        await asyncio.sleep(LOCK_SECONDS / 8)
        with suppress(StoreError):
            await turn.renew()


def _files_of_version(stored: bytes) -> Iterable[FileRecord]:
    """Of a version as `publish.lua` stores it: the time, a space, a record."""
    return msgspec.json.decode(stored.partition(b" ")[2], type=_Files).files.values()

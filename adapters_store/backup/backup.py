"""A backup: the whole index and every file that it names, in one file, while servers go on.

Each task is read in one step, each of its customizations in another, and all blobs after the index: so every version
and every customization in the file is whole, and as it was at some moment of the backup. What is counted over all tasks
(numbers, words) is read last, so that it covers what was read before. Not kept: the change feed and the index's id, of
which a restored index has its own; what expires; users' lists of their tasks and sums of stored bytes, which a restore
makes from the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from adapters_store.backup.file import FORMAT, BackupWriter, Header, Kind, Part, Totals, writing
from adapters_store.blobs.local import BlobStore
from adapters_store.errors import Conflict, VersionCorrupt
from adapters_store.index.connection import redis_errors
from adapters_store.index.index import SCHEMA, RedisIndex
from adapters_store.index.packed import blobs_of
from adapters_store.index.scripts import Scripted
from adapters_store.index.stored import decode_version
from adapters_store.records import TaskSettings
from adapters_store.scope import id_of

PAGE = 500
_TASK_KINDS: tuple[Kind, ...] = ("task", "versions", "digests", "activations", "history", "bills", "last_used")


async def write_backup(index: RedisIndex, blobs: BlobStore, path: Path) -> Totals:
    """Write `index`, and those of `blobs` that it names, to a new file at `path`.

    Raises `FileExistsError`; `StoreFull`; `VersionCorrupt` for a blob that is missing or altered; `Conflict`
    "changed_meanwhile" where a change came in between: run it again. No file is left then. The hashes of all blobs are
    in memory meanwhile, some hundred bytes each.
    """
    named: dict[bytes, None] = {}  # in the order in which the index names them
    header = Header(format=FORMAT, schema=SCHEMA, created=await index.garbage.now())
    with writing(path, header) as writer:
        async for part in _IndexReader(index.redis, index.keys).parts():
            writer.add(part)
            named.update((bytes.fromhex(sha256), None) for sha256 in blobs_named(part))
        for raw in named:
            await _add_blob(index, blobs, writer, raw.hex())
        return writer.totals


def blobs_named(part: Part) -> list[str]:
    """The hashes of the files of the versions or customizations in it."""
    if part.kind == "versions":
        versions = [decode_version(part.name, int(number), row) for number, row in pairs(part.values)]
        return [file.sha256 for version in versions for file in version.files.values()]
    if part.kind == "customizations":
        return [sha256 for row in part.values[1::2] for sha256 in blobs_of(row)]
    return []


def public_id(task: Part) -> str | None:
    """The id by which all tenants know this "task", if it is public."""
    settings = msgspec.json.decode(dict(pairs(task.values))["settings"], type=TaskSettings)
    return id_of(task.name) if settings.public else None


def pairs(values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """A hash's fields, each with its value."""
    yield from zip(values[::2], values[1::2], strict=True)


async def _add_blob(index: RedisIndex, blobs: BlobStore, writer: BackupWriter, sha256: str) -> None:
    def add() -> None:
        with blobs.file(sha256) as path:
            writer.add_blob(sha256, path)

    try:
        await asyncio.to_thread(add)
    except VersionCorrupt as error:
        with redis_errors():
            deleted = await index.redis.zscore(index.keys.deleting, sha256)
        if deleted is None:
            raise
        raise Conflict("changed_meanwhile", "a file was deleted as garbage during the backup; run it again") from error


class _IndexReader(Scripted):
    """Reads an index as parts."""

    async def parts(self) -> AsyncIterator[Part]:
        """All of them; the customizations of a task come after its "task"."""
        known: set[str] = set()
        public: dict[str, str] = {}
        async for name in self._tasks():
            async for part in self._task(name):
                if part.kind == "task":
                    known.add(name)
                    if public_id(part) is not None and public.setdefault(id_of(name), name) != name:
                        message = f"which task '{id_of(name)}' is public was changed during the backup; run it again"
                        raise Conflict("changed_meanwhile", message)
                yield part
        async for part in self._hash("revisions", self.keys.revisions):
            yield part
            for name, _ in pairs(part.values):
                if name not in known:  # deleted; its history outlives it
                    known.add(name)
                    yield Part("history", name, await self._list(self.keys.history(name)))
        for kind, key in self._of_all():
            async for part in self._hash(kind, key):
                yield part
        yield Part("customization_history", "", await self._list(self.keys.customization_history))

    def _of_all(self) -> list[tuple[Kind, str]]:
        return [
            ("numbers", self.keys.numbers),
            ("words", self.keys.words),
            ("payers", self.keys.payers),
            ("api_keys", self.keys.api_keys),
        ]

    async def _tasks(self) -> AsyncIterator[str]:
        """All tasks that are there all the time, and perhaps others."""
        last = "-"
        while True:
            with redis_errors():
                page: list[Any] = await self.redis.zrangebylex(self.keys.tasks, last, "+", start=0, num=PAGE)
            for listed in page:
                yield listed.removeprefix("/")
            if len(page) < PAGE:
                return
            last = f"({page[-1]}"

    async def _task(self, name: str) -> AsyncIterator[Part]:
        """Nothing where it was deleted meanwhile."""
        before = await self._read_task(name)
        if before is None:
            return
        for part in before:
            if part.values:
                yield part
        is_customized = False
        async for part in self._customizations(name):
            yield part
            is_customized = True
        if is_customized:
            after = await self._read_task(name)
            if after is None or _created(after) != _created(before):
                message = f"task '{id_of(name)}' was deleted while it was read for the backup; run it again"
                raise Conflict("changed_meanwhile", message)

    async def _read_task(self, name: str) -> list[Part] | None:
        of_task = [self.keys.task, self.keys.versions, self.keys.digests, self.keys.activations, self.keys.history]
        keys = [*(key(name) for key in of_task), self.keys.bills(name), self.keys.last_used]
        answers = await self.read("backup_task", keys, [name])
        parts = [Part(kind, name, values) for kind, values in zip(_TASK_KINDS, answers, strict=True)]
        return parts if parts[0].values else None

    async def _customizations(self, task: str) -> AsyncIterator[Part]:
        """Each that is there all the time, once or more."""
        cursor = 0
        while True:
            cursor, rows = await self.run_raw("HSCAN", self.keys.customizations(task), cursor, "COUNT", PAGE)
            if rows:
                values = chain(*((user.decode(), row) for user, row in rows.items()))
                yield Part("customizations", task, list(values))
            if cursor == 0:
                return

    async def _hash(self, kind: Kind, key: str) -> AsyncIterator[Part]:
        """A hash of texts, in pages; a field that changes meanwhile may come twice."""
        cursor = 0
        while True:
            with redis_errors():
                answer: Any = await self.redis.hscan(key, cursor, count=PAGE)
            cursor, rows = answer
            if rows:
                yield Part(kind, "", list(chain(*rows.items())))
            if cursor == 0:
                return

    async def _list(self, key: str) -> list[Any]:
        with redis_errors():
            found: list[Any] = await self.redis.lrange(key, 0, -1)
        return found


def _created(parts: Sequence[Part]) -> Any:
    """When the task was made: what tells it from a later one of its name."""
    return dict(pairs(parts[0].values))["created"]

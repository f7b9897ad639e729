"""A restore: an empty index becomes what a backup has. Until its last step nobody sees anything of it.

    the whole file is read and checked, its blobs put → its keys written beside the index → one step: they are the index

What fails or dies before that step leaves an index that is as empty as before, blobs that nobody names (the garbage
collector's), and, if it died, keys that nothing reads, which the next restore of any file removes first. The right to
collect garbage is held all the time, so that no blob leaves between being put and being named.
"""

from __future__ import annotations

import asyncio
import struct
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from shutil import copyfileobj
from typing import get_args

import msgspec

from adapters_store.backup.backup import blobs_named, pairs
from adapters_store.backup.file import BackupBlob, ListKind, Part, Totals, reading
from adapters_store.backup.restore_index import IndexWriter
from adapters_store.blobs.local import BlobStore, is_sha256
from adapters_store.errors import BackupDamaged, Conflict, StoreFull, StoreUnavailable
from adapters_store.garbage import FOREIGN
from adapters_store.index.api_keys import NewApiKey
from adapters_store.index.index import SCHEMA, RedisIndex
from adapters_store.index.packed import paid_by, unpack
from adapters_store.records import HistoryEntry, TaskSettings

_NUMBERS = ("digests", "numbers", "revisions", "words")  # hashes whose values are whole numbers


async def restore_backup(index: RedisIndex, blobs: BlobStore, path: Path, *, adopt: bool = False) -> Totals:
    """Make `index`, which must be empty, what the backup at `path` holds, and put its files into `blobs`.

    Raises `BackupDamaged`; `Conflict` "index_not_empty", "store_of_another_index" unless `adopt`, and "garbage_locked"
    or "blobs_deleting" while garbage is collected; `OSError` for the file. Nothing is visible then. Servers on the
    index read it anew by themselves, and it owns `blobs` from then on. The hashes of all blobs are in memory meanwhile,
    some hundred bytes each.
    """
    writer = IndexWriter(index.redis, index.keys)
    async with index.garbage.turn() as turn:
        await writer.remove_leftovers()
        await writer.demand_empty()
        if not adopt:
            await _demand_own(index, blobs)
        begun = await index.garbage.now()
        totals = await _take_in(blobs, path)
        try:
            for item in reading(path, SCHEMA):
                if not isinstance(item, list):
                    break  # the blobs were all there is after the index
                await writer.write(item)
            await writer.finish_sums()
            await turn.renew()
            await writer.end(begun)
        except BaseException:
            with suppress(StoreUnavailable, StoreFull):
                await writer.remove_leftovers()
            raise
    await asyncio.to_thread(blobs.own, await index.identify())
    return totals


async def _demand_own(index: RedisIndex, blobs: BlobStore) -> None:
    """`Conflict` where another index owns the store: the restored one's collector would delete what that one names."""
    owner = await asyncio.to_thread(blobs.owner)
    if owner not in (None, await index.garbage.index_id()):
        raise Conflict(
            FOREIGN,
            "the store belongs to another index, and a store has one: restore into another --store or --data-dir; or, "
            "if that index is gone and nobody needs its files, take the store over with `medley restore --adopt`",
        )


async def _take_in(blobs: BlobStore, path: Path) -> Totals:
    """Check the whole file and put its blobs."""
    named: set[bytes] = set()
    totals, check = Totals(), _Check(path)
    for item in reading(path, SCHEMA):
        if isinstance(item, BackupBlob):
            check.references()
            if not is_sha256(item.sha256) or bytes.fromhex(item.sha256) not in named:
                raise BackupDamaged(f"{path} is damaged: it holds a file {item.sha256!r}, which nothing in it names")
            named.remove(bytes.fromhex(item.sha256))
            await asyncio.to_thread(_put, blobs, item, path)
        elif isinstance(item, Totals):
            totals = item
        else:
            named.update(sha256 for part in item for sha256 in check.part(part))
    check.references()
    if named:
        raise BackupDamaged(f"{path} is damaged: {len(named)} of the files that it names are missing")
    return totals


def _put(blobs: BlobStore, blob: BackupBlob, path: Path) -> None:
    with blobs.staging() as folder:
        staged = folder / blob.sha256
        with staged.open("wb") as file:
            copyfileobj(blob.content, file)
        # Damaged content is put under its own hash, where it is garbage and does no harm.
        if blobs.put(staged).sha256 != blob.sha256:
            raise BackupDamaged(f"{path} is damaged: the content of the file {blob.sha256} has another sha256")


class _Check:
    """Whether the parts of a backup can be read by all who read an index. A file may be whole and yet made wrongly."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._words: dict[int, str] = defaultdict(str)  # the numbers of those that customizations name, and ""
        self._payers: set[int] = set()  # likewise
        self._known: dict[str, set[int]] = {"words": set(), "payers": set()}

    def part(self, part: Part) -> list[bytes]:
        """The hashes of the blobs that it names. `BackupDamaged` says which field of what is missing or wrong."""
        try:
            if part.kind in get_args(ListKind):
                self._list(part)
            elif part.kind == "last_used":
                float(part.values[0])
            else:
                self._hash(part)
            return [bytes.fromhex(sha256) for sha256 in blobs_named(part)]
        except KeyError as error:
            raise self._damaged(part, f"it has no field {error}") from error
        except (msgspec.MsgspecError, ValueError, TypeError, AttributeError, IndexError, struct.error) as error:
            raise self._damaged(part, str(error)) from error

    def references(self) -> None:
        """All parts have come: `BackupDamaged` where one names what is in none. Only the first call costs anything."""
        for kind, used in (("words", set(self._words)), ("payers", self._payers)):
            if missing := used - self._known[kind]:
                message = f"customizations name the number {min(missing)}, which '{kind}' lacks"
                raise BackupDamaged(f"{self._path} is damaged: {message}")
        self._words.clear()
        self._payers.clear()

    def _list(self, part: Part) -> None:
        for value in part.values:
            if part.kind == "activations":
                int(value)
            else:
                msgspec.json.decode(value, type=HistoryEntry)

    def _hash(self, part: Part) -> None:
        fields = dict(pairs(part.values))
        if part.kind == "task":
            msgspec.json.decode(fields["settings"], type=TaskSettings)
            for field in ("revision", "created", "updated"):
                float(fields[field])
        elif part.kind == "customizations":
            for user, stored in fields.items():
                unpack(user, part.name, stored, self._words)
                payer, _ = paid_by(stored)
                self._payers |= {payer} - {0}
        elif part.kind == "bills":
            for number, bill in fields.items():
                size, _ = bill.split(" ")  # and the API key
                for count in (number, size):
                    int(count)
        elif part.kind == "api_keys":
            for stored in fields.values():
                created, _, record = stored.partition(" ")
                float(created)
                msgspec.json.decode(record, type=NewApiKey)
        elif part.kind == "payers":
            self._known["payers"] |= {int(number) for key, number in fields.items() if not key.startswith("#")}
        elif part.kind in _NUMBERS:
            numbers = {int(number) for number in fields.values()}
            if part.kind == "words":
                self._known["words"] |= numbers

    def _damaged(self, part: Part, why: str) -> BackupDamaged:
        whose = f" of '{part.name}'" if part.name else ""
        return BackupDamaged(f"{self._path} is damaged: its part '{part.kind}'{whose} cannot be read: {why}")

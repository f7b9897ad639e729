"""A restore: an empty index becomes what a backup has. Until its last step nobody sees anything of it.

    the whole file is read and checked, its blobs put → its keys written beside the index → one step: they are the index

What fails or dies before that step leaves an index that is as empty as before, blobs that nobody names (the garbage
collector's), and, if it died, keys that nothing reads, which the next restore of any file removes first. The right to
collect garbage is held all the time, so that no blob leaves between being put and being named.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from shutil import copyfileobj

from adapters_store.backup.backup import blobs_named
from adapters_store.backup.file import BackupBlob, Totals, reading
from adapters_store.backup.restore_index import IndexWriter
from adapters_store.blobs.local import BlobStore, is_sha256
from adapters_store.errors import BackupDamaged, StoreUnavailable
from adapters_store.index.index import SCHEMA, RedisIndex


async def restore_backup(index: RedisIndex, blobs: BlobStore, path: Path) -> Totals:
    """Make `index`, which must be empty, what the backup at `path` holds, and put its files into `blobs`.

    Raises `BackupDamaged`; `Conflict` "index_not_empty", and "garbage_locked" or "blobs_deleting" while garbage is
    collected; `OSError` for the file. Nothing is visible then. Servers on the index read it anew by themselves, and it
    owns `blobs` from then on, whichever index did before. The hashes of all blobs are in memory meanwhile, some hundred
    bytes each.
    """
    writer = IndexWriter(index.redis, index.keys)
    async with index.garbage.turn() as turn:
        await writer.remove_leftovers()
        await writer.demand_empty()
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
            with suppress(StoreUnavailable):
                await writer.remove_leftovers()
            raise
    await asyncio.to_thread(blobs.own, await index.identify())
    return totals


async def _take_in(blobs: BlobStore, path: Path) -> Totals:
    """Check the whole file and put its blobs."""
    named: set[bytes] = set()
    totals = Totals()
    for item in reading(path, SCHEMA):
        if isinstance(item, BackupBlob):
            if not is_sha256(item.sha256) or bytes.fromhex(item.sha256) not in named:
                raise BackupDamaged(f"{path} is damaged: it holds a file {item.sha256!r}, which nothing in it names")
            named.remove(bytes.fromhex(item.sha256))
            await asyncio.to_thread(_put, blobs, item, path)
        elif isinstance(item, Totals):
            totals = item
        else:
            named.update(bytes.fromhex(sha256) for part in item for sha256 in blobs_named(part))
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

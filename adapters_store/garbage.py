"""The garbage collector: deletes the blobs that no version and no customization names, after a period of grace.

Two steps. A stored blob that is named by nobody is condemned; one that has been for the grace period, and is named by
nobody still, is claimed and deleted. `garbage_index` says why none of them can be one that a running upload is about to
name, whatever the grace. What a collector that died had claimed is deleted by a later one.

The blobs that another index names look like garbage from here. So a store has one index that owns it, and the collector
of any other is refused.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import structlog

from adapters_store.blobs.local import BlobStore
from adapters_store.errors import Conflict, StoreError, StoreUnavailable
from adapters_store.index.garbage import GarbageIndex

INTERVAL = 3600
"""Seconds from one collection to the next, whichever of the servers on the index does it."""
LISTED_AT_ONCE = 1000
DELETED_AT_ONCE = 100
DELETED_WITHIN = 60.0
"""Seconds after its claim in which a blob is deleted, or left to a later collector, which waits for `ABANDONED`: two
must not delete the same blob, since it may be put again in between. Only a process that stands still, between looking
at the clock and deleting, for as long as lies between the two would be mistaken."""
ABANDONED = 600.0

FOREIGN = "store_of_another_index"

log = structlog.get_logger(__name__)

T = TypeVar("T")


class GarbageReport(NamedTuple):
    """What a collection found, sizes in bytes."""

    stored: int
    """Blobs in the store."""
    unnamed: int
    """Of them, those that nobody names."""
    unnamed_bytes: int
    due: int
    """Of these, those whose grace is over: they were deleted, unless it was a dry run."""
    due_bytes: int


class GarbageCollector:
    """Collects from `blobs` what `index` does not name; `grace` in seconds."""

    def __init__(self, index: GarbageIndex, blobs: BlobStore, grace: float) -> None:
        self._index = index
        self._blobs = blobs
        self._grace = grace

    async def run_forever(self) -> None:
        """Collect once an hour, unless another server does, until cancelled; a collection that fails is logged.

        A store that may be claimed is claimed at the start. That it is another index's is logged as an error, once.
        """
        rested = foreign = False
        while True:
            try:
                await self._take_store()
                foreign = False
                if rested and await self._index.is_time(INTERVAL):
                    log.info("garbage collected", **(await self.collect())._asdict())
            except (StoreError, OSError) as error:
                if not (isinstance(error, Conflict) and error.code == FOREIGN):
                    log.warning("garbage is not collected this time", reason=str(error))
                elif not foreign:
                    foreign = True
                    log.error("garbage is not collected", reason=str(error))
            await asyncio.sleep(INTERVAL / 12)
            rested = True

    async def survey(self, *, adopt: bool = False) -> GarbageReport:
        """What `collect` would find and delete now; nothing is changed. It is refused where `collect` would be."""
        await self._claimable(adopt=adopt)
        stored, unnamed = await self._unnamed()
        due = unnamed if self._grace <= 0 else await self._due()
        return _report(stored, unnamed, [sha256 for sha256 in due if sha256 in unnamed])

    async def collect(self, *, adopt: bool = False) -> GarbageReport:
        """Condemn what nobody names, delete what is due. `adopt` takes over a store that is another index's.

        `Conflict` "garbage_locked" while another collector runs, "store_of_another_index" unless the index owns the
        store or may claim it.
        """
        async with self._index.turn() as turn:
            await self._take_store(adopt=adopt)
            abandoned = await self._index.abandoned(await self._index.now() - ABANDONED)
            for batch in _batches(abandoned, DELETED_AT_ONCE):
                await turn.renew()
                await self._delete(batch)
            stored, unnamed = await self._unnamed()
            for batch in _batches(unnamed, LISTED_AT_ONCE):
                await self._index.condemn(batch)
            deleted: list[str] = []
            if due := await self._due():
                # Read again, after they were condemned: whoever named one before then is seen, and who does later takes
                # it off the condemned.
                names = await self._names()
                for batch in _batches([sha256 for sha256 in due if sha256 in names], LISTED_AT_ONCE):
                    await self._index.pardon(batch)
                for batch in _batches([sha256 for sha256 in due if sha256 not in names], DELETED_AT_ONCE):
                    await turn.renew()
                    await self._claimable()  # still: another may have adopted it, or restored a backup
                    claimed = await self._index.claim(batch)
                    await self._delete(claimed)
                    deleted += claimed
        return _report(stored, unnamed, [sha256 for sha256 in deleted if sha256 in unnamed])

    async def _take_store(self, *, adopt: bool = False) -> None:
        if index_id := await self._claimable(adopt=adopt):
            await asyncio.to_thread(self._blobs.own, index_id)

    async def _claimable(self, *, adopt: bool = False) -> str | None:
        """None if the index owns the store, its id if it may claim the store; `Conflict` if it may not."""
        index_id = await self._index.index_id()
        owner = await asyncio.to_thread(self._blobs.owner)
        if owner == index_id:
            return None
        if adopt or (owner is None and (await self._names_any() or await asyncio.to_thread(self._is_empty))):
            return index_id
        what = "the store belongs to another index" if owner else "the store has files, and this index names none"
        raise Conflict(
            FOREIGN,
            f"{what}, so none of its files is deleted: correct --redis-url or --store; or, if no other index needs "
            "them, let this one take the store over with `medley gc --adopt`",
        )

    async def _names_any(self) -> bool:
        async for page in self._index.named():
            if page:
                return True
        return False

    def _is_empty(self) -> bool:
        return next(self._blobs.list(), None) is None

    async def _due(self) -> list[str]:
        return await self._index.condemned(await self._index.now() - self._grace)

    async def _unnamed(self) -> tuple[int, dict[str, int]]:
        """How many blobs are stored; those that nobody named when this began, with their sizes."""
        names = await self._names()
        stored, unnamed = 0, {}
        listing = self._blobs.list()
        while page := await asyncio.to_thread(lambda: list(islice(listing, LISTED_AT_ONCE))):
            stored += len(page)
            unnamed.update({blob.sha256: blob.size for blob in page if blob.sha256 not in names})
        return stored, unnamed

    async def _names(self) -> _Names:
        names = _Names()
        async for page in self._index.named():
            for sha256 in page:
                names.add(sha256)
            await asyncio.sleep(0)  # the loop serves requests beside this
        return names

    async def _delete(self, claimed: Sequence[str]) -> None:
        """Delete blobs that were claimed just now, or so long ago that nobody else is deleting them."""
        begun = time.time()  # which goes on while a machine sleeps

        def delete() -> None:
            if time.time() - begun > DELETED_WITHIN:
                raise StoreUnavailable("deleting garbage took too long to begin; a later collection goes on with it")
            self._blobs.delete(*claimed)

        if claimed:
            await asyncio.to_thread(delete)
            await self._index.deleted(claimed)


class _Names:
    """A set of hashes of bounded size: 16 MiB, however many there are.

    It may seem to hold one that was not added (a million make that one in a hundred), never the opposite: then garbage
    stays until a later collection, whose set confuses others.
    """

    _BITS = 27

    def __init__(self) -> None:
        self._marks = bytearray(2**self._BITS // 8)
        self._factor = secrets.randbits(64) | 1

    def add(self, sha256: str) -> None:
        byte, bit = self._place(sha256)
        self._marks[byte] |= bit

    def __contains__(self, sha256: str) -> bool:
        byte, bit = self._place(sha256)
        return self._marks[byte] & bit != 0

    def _place(self, sha256: str) -> tuple[int, int]:
        mixed = (int(sha256[:16], 16) * self._factor & 2**64 - 1) >> 64 - self._BITS
        return mixed >> 3, 1 << (mixed & 7)


def _report(stored: int, unnamed: dict[str, int], due: Sequence[str]) -> GarbageReport:
    return GarbageReport(stored, len(unnamed), sum(unnamed.values()), len(due), sum(unnamed[sha256] for sha256 in due))


def _batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(values)
    while batch := list(islice(left, size)):
        yield batch

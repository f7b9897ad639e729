"""A publish, from checked files to a visible version, or to a user's customization.

    files in staging → each blob durable at its address → one atomic change of the index → acknowledged

The index names a blob only after it is durable, and is itself changed in one step; so what was acknowledged is whole,
and a death before leaves at most staged files (swept at the next start) and blobs that nobody names, which the garbage
collector finds. Where it deleted one of them in between, they are put again. Whether the files are a good adapter is
the caller's to check before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from adapters_store.blobs.local import BlobStore
from adapters_store.errors import Conflict, StoreUnavailable
from adapters_store.identity import adapter_digest
from adapters_store.index.index import RedisIndex
from adapters_store.records import (
    BY_NOBODY,
    Change,
    Customization,
    FileRecord,
    Mode,
    NewCustomization,
    NewVersion,
    Version,
)

RETRY_SECONDS = 10.0
"""For which a publish waits for the end of a deletion of its blobs; the garbage collector's take less."""
RETRY_DELAY = 0.05

T = TypeVar("T")


class NewVersionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the check of the files found out, in the words of `NewVersion`."""

    method: str
    parameters: int
    bytes: int
    virtual_tokens: int = 0
    rank: int | None = None
    base_fingerprint: str
    warnings: list[str] = []


async def publish_files(
    index: RedisIndex,
    blobs: BlobStore,
    task: str,
    folder: Path,
    facts: NewVersionFacts,
    *,
    activate: bool,
    change: Change = BY_NOBODY,
) -> tuple[Version, bool]:
    """Publish all files of `folder` (one of `blobs.staging()`) as a version of `task`.

    Returns the version and whether it is new: the same content for the same base again gives the existing version,
    which is activated if asked. The task is created if there is none. Raises `StoreFull`, `StoreUnavailable`: nothing
    is visible then, unless the connection broke while the answer was under way; publishing again is always safe.
    """

    async def name(files: dict[str, FileRecord], begun: float) -> tuple[Version, bool]:
        new = NewVersion(digest=adapter_digest(files), files=files, **msgspec.structs.asdict(facts))
        return await index.publish(task, new, activate=activate, change=change, begun=begun)

    return await _put_and_name(index, blobs, folder, name)


async def customize_files(
    index: RedisIndex,
    blobs: BlobStore,
    user: str,
    task: str,
    folder: Path,
    facts: NewVersionFacts,
    *,
    mode: Mode,
    change: Change = BY_NOBODY,
) -> Customization:
    """Lay the files of `folder` over `task` for `user`, in place of what the user had there; fails as `publish_files`
    does, and with `NotFound` where there is no such task."""
    known = msgspec.structs.asdict(facts)
    del known["warnings"]

    async def name(files: dict[str, FileRecord], begun: float) -> Customization:
        new = NewCustomization(digest=adapter_digest(files), files=files, mode=mode, **known)
        return await index.put_customization(user, task, new, change=change, begun=begun)

    return await _put_and_name(index, blobs, folder, name)


async def _put_and_name(
    index: RedisIndex, blobs: BlobStore, folder: Path, name: Callable[[dict[str, FileRecord], float], Awaitable[T]]
) -> T:
    """Put the files, then have the index name them: again, as long as they may have been deleted in between."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + RETRY_SECONDS
    while True:
        with index.asking():
            begun = await index.garbage.begin()
        files = await asyncio.to_thread(_put_all, blobs, folder)
        try:
            return await name(files, begun)
        except Conflict as conflict:
            if conflict.code != "blobs_deleting":
                raise
            if loop.time() > give_up:
                raise StoreUnavailable(str(conflict)) from conflict
        await asyncio.sleep(RETRY_DELAY)


def _put_all(blobs: BlobStore, folder: Path) -> dict[str, FileRecord]:
    return {path.name: blobs.put(path) for path in sorted(folder.iterdir())}

"""A publish, from checked files to a visible version.

    files in staging → each blob durable at its address → one atomic change of the index → acknowledged

The index names a blob only after it is durable, and is itself changed in one step; so what was acknowledged is whole,
and a death before leaves at most staged files (swept at the next start) and blobs that nobody names. Whether the files
are a good adapter is the caller's to check before.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import msgspec

from adapters_store.blobs import BlobStore
from adapters_store.index import RedisIndex
from adapters_store.records import FileRecord, NewVersion, Version

#: The files that may define an adapter: its config, weights and head under the names that libraries give them, and what
#: the server found out when they were uploaded. Others (README.md) are stored with it and are no part of its identity.
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter.safetensors",
    "head_config.json",
    "model_head.safetensors",
    "medley.json",
)


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
    index: RedisIndex, blobs: BlobStore, task: str, folder: Path, facts: NewVersionFacts, *, activate: bool
) -> tuple[Version, bool]:
    """Publish all files of `folder` (one of `blobs.staging()`; its files are moved away) as a version of `task`.

    Returns the version and whether it is new: the same content for the same base again gives the existing version,
    which is activated if asked. The task is created if there is none. Raises `StoreFull`, `StoreUnavailable`: nothing
    is visible then, unless the connection broke while the answer was under way; publishing again is always safe.
    """
    files = await asyncio.to_thread(_put_all, blobs, folder)
    new = NewVersion(digest=adapter_digest(files), files=files, **msgspec.structs.asdict(facts))
    return await index.publish(task, new, activate=activate)


def adapter_digest(files: dict[str, FileRecord]) -> str:
    """An adapter's identity: the sha256 of one line "name sha256" for each of `ADAPTER_FILES` that it has, in this
    order."""
    manifest = "".join(f"{name} {files[name].sha256}\n" for name in ADAPTER_FILES if name in files)
    return hashlib.sha256(manifest.encode()).hexdigest()


def _put_all(blobs: BlobStore, folder: Path) -> dict[str, FileRecord]:
    return {path.name: blobs.put(path) for path in sorted(folder.iterdir())}

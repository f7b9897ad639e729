"""How the index's scripts and its calls write down a version. No reading or writing here."""

from __future__ import annotations

import msgspec

from adapters_store.errors import Conflict
from adapters_store.records import AdapterRecord, NewVersion, Version


def content_of(version: NewVersion) -> str:
    """What makes an upload "the same again". Checked against another base, the same files are another version."""
    return f"{version.digest} {version.base_fingerprint}"


def size_of(adapter: AdapterRecord) -> int:
    """The bytes of its files: what it counts for in a quota."""
    return sum(record.size for record in adapter.files.values())


def decode_version(task: str, number: int, stored: str) -> Version:
    """A version as `publish.lua` stored it: the time, a space, the `NewVersion` as JSON."""
    created, _, record = stored.partition(" ")
    content = msgspec.json.decode(record, type=NewVersion)
    return Version(task=task, number=number, created=float(created), **msgspec.structs.asdict(content))


def blobs_deleting() -> Conflict:
    """The refusal of a change that names a blob which the garbage collector is deleting at this moment."""
    return Conflict("blobs_deleting", "a file of it is being deleted as garbage at this moment; upload it again")

"""The file of a backup: a tar archive that is written and read from its beginning to its end, never held in memory.

    medley-backup.json    format, the layout of the index, when it was made
    index/00000001 …      `Part`s of the index, as MessagePack; about a megabyte each
    blobs/<sha256> …      every file that the index names, once
    end.json              counts, and the sha256 of all `index/`: a file without it is not whole

Only what has been finished stands under the file's name. How an index becomes parts, and parts an index, is not known
here.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import msgspec

from adapters_store.blobs.staging import full_disk_named, sync
from adapters_store.errors import BackupDamaged

FORMAT = 1
BATCH = 2**20
"""Bytes of parts that become one member."""
_ARRAY = struct.Struct(">BI")  # MessagePack's "array 32": so many elements follow

HashKind = Literal[
    "task", "versions", "digests", "bills", "customizations", "numbers", "revisions", "words", "payers", "api_keys"
]
ListKind = Literal["activations", "history", "customization_history"]
Kind = Literal[HashKind, ListKind, "last_used"]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """All or some of the content of the key that `Keys.kind` spells; `name` is a scoped task, "" for one key of all.

    `values` are fields and values in turn for a hash, the elements of a list in their order, and for "last_used" the
    score of the task. Only customizations are bytes.
    """

    kind: Kind
    name: str
    values: list[Any]


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first member. `created` in Unix seconds, by the clock of Redis."""

    format: int
    schema: str
    created: float


class Totals(msgspec.Struct, kw_only=True):
    """What a backup holds; `bytes` are those of the blobs."""

    tasks: int = 0
    versions: int = 0
    customizations: int = 0
    api_keys: int = 0
    blobs: int = 0
    bytes: int = 0

    def count(self, part: Part) -> None:
        """Add what the part has."""
        if part.kind == "task":
            self.tasks += 1
        elif part.kind in ("versions", "customizations", "api_keys"):
            setattr(self, part.kind, getattr(self, part.kind) + len(part.values) // 2)


class _End(msgspec.Struct, frozen=True, kw_only=True):
    totals: Totals
    index_sha256: str


class BackupBlob(NamedTuple):
    """A blob in the file: its content can be read until the next member is asked for. It is not verified."""

    sha256: str
    content: IO[bytes]


class BackupWriter:
    """Writes one backup; made by `writing`."""

    def __init__(self, tar: tarfile.TarFile, header: Header) -> None:
        self._tar = tar
        self._packer = msgspec.msgpack.Encoder()
        self._batch: list[bytes] = []
        self._batches = 0
        self._size = 0
        self._sha256 = hashlib.sha256()
        self.totals = Totals()
        self._add("medley-backup.json", msgspec.json.encode(header))

    def add(self, part: Part) -> None:
        """The next part; all parts come before all blobs."""
        self.totals.count(part)
        self._batch.append(self._packer.encode(part))
        self._size += len(self._batch[-1])
        if self._size >= BATCH:
            self._flush()

    def add_blob(self, sha256: str, path: Path) -> None:
        """A blob's verified file."""
        self._flush()
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._add(f"blobs/{sha256}", file, size)
        self.totals.blobs += 1
        self.totals.bytes += size

    def finish(self) -> None:
        """Nothing comes after it."""
        self._flush()
        self._add("end.json", msgspec.json.encode(_End(totals=self.totals, index_sha256=self._sha256.hexdigest())))

    def _flush(self) -> None:
        if self._batch:
            content = b"".join([_ARRAY.pack(0xDD, len(self._batch)), *self._batch])
            self._sha256.update(content)
            self._batches += 1
            self._add(f"index/{self._batches:08}", content)
            self._batch, self._size = [], 0

    def _add(self, name: str, content: bytes | IO[bytes], size: int = 0) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content) if isinstance(content, bytes) else size
        member.mode = 0o600
        self._tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else content)
        self._tar.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it; it would remember a million


@contextmanager
def writing(path: Path, header: Header) -> Iterator[BackupWriter]:
    """Write a backup that appears at `path`, readable by its owner alone, if the block ends well; else nothing stays.

    `FileExistsError` where there is a file; `StoreFull` where the disk has no room.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with full_disk_named(), os.fdopen(descriptor, "wb") as file:
            with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                writer = BackupWriter(tar, header)
                yield writer
                writer.finish()
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def reading(path: Path, schema: str) -> Iterator[list[Part] | BackupBlob | Totals]:
    """The batches of parts of a backup for an index of this layout, its blobs, and last, once all else was found to be
    right, what it holds. Raises `BackupDamaged`, also in the middle, and `OSError`.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            yield from _members(tar, schema)
    except (tarfile.TarError, EOFError, msgspec.MsgspecError) as error:
        raise BackupDamaged(f"{path} is damaged, or no backup: {error}") from error
    except BackupDamaged as error:
        raise BackupDamaged(f"{path} {error}") from None


def _members(tar: tarfile.TarFile, schema: str) -> Iterator[list[Part] | BackupBlob | Totals]:
    found, sha256 = Totals(), hashlib.sha256()
    is_first = True
    while member := tar.next():
        tar.members.clear()  # type: ignore[attr-defined]  # as in `BackupWriter`
        content = tar.extractfile(member)
        if content is None or is_first != (member.name == "medley-backup.json"):
            raise BackupDamaged(f"is damaged, or no backup: it has {member.name!r} in this place")
        if is_first:
            _check(msgspec.json.decode(content.read(BATCH), type=Header), schema)
            is_first = False
        elif member.name.startswith("index/"):
            read = content.read()
            sha256.update(read)
            parts = msgspec.msgpack.decode(read, type=list[Part])
            for part in parts:
                found.count(part)
            yield parts
        elif member.name.startswith("blobs/"):
            found.blobs += 1
            found.bytes += member.size
            yield BackupBlob(member.name.removeprefix("blobs/"), content)
        else:
            end = msgspec.json.decode(content.read(BATCH), type=_End)
            if end != _End(totals=found, index_sha256=sha256.hexdigest()):
                raise BackupDamaged("is damaged: what it holds is not what was written")
            yield found
            return
    raise BackupDamaged("is not whole: its end is missing")


def _check(header: Header, schema: str) -> None:
    if header.format != FORMAT:
        raise BackupDamaged(f"has format {header.format}, this release reads {FORMAT}; restore it with its own release")
    if header.schema != schema:
        raise BackupDamaged(
            f"holds an index of layout {header.schema}, this release has {schema}; restore it with its own release"
        )

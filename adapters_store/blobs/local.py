"""Content-addressed files: a blob's name is the sha256 of its bytes, so a blob never changes.

`BlobStore` is what readers, publishers and the garbage collector need; `LocalBlobs` keeps blobs in a folder that
several servers may share. All calls are synchronous IO: an asyncio caller puts them on a thread. Who still needs a
blob is not known here.

    <folder>/blobs/ab/abcdef…     a blob, complete whenever this name exists
    <folder>/index_id             the index whose collector may delete blobs, if any has claimed them
    <folder>/staging/             see `staging`
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, Protocol

from adapters_store.blobs.staging import Staging, full_disk_named, place, sync
from adapters_store.errors import StoreUnavailable, VersionCorrupt
from adapters_store.records import FileRecord

_SHA256 = re.compile("[0-9a-f]{64}")


class StoredBlob(NamedTuple):
    """A blob as a listing shows it, unverified; `size` in bytes."""

    sha256: str
    size: int


class BlobStore(Protocol):
    """Where the bytes of all versions are. Any call may raise `StoreUnavailable`: a bucket that does not answer, or no
    file that could be opened."""

    def check(self) -> None:
        """Return if the store answers; `BucketRefused` where only an operator can mend that it does not."""

    def read(self, sha256: str) -> bytes:
        """The blob's bytes, verified; `VersionCorrupt` where it is absent or its content does not match."""

    def file(self, sha256: str) -> AbstractContextManager[Path]:
        """The blob as a verified file of this machine, which stays while the context is open; fails as `read` does."""

    def put(self, path: Path) -> FileRecord:
        """Keep the content of a finished file of `staging()`; on return it is durable.

        The file itself stays until its upload ends. What stands under that content's name already is healed by it.
        """

    def exists(self, sha256: str) -> bool:
        """Whether there is such a blob (unverified)."""

    def delete(self, *sha256: str) -> None:
        """Forget blobs; those that are absent are fine."""

    def list(self) -> Iterator[StoredBlob]:
        """All blobs, in no order; one that is put or deleted meanwhile may or may not be among them."""

    def owner(self) -> str | None:
        """The id of the index that alone may have blobs deleted; None where none has claimed the store yet."""

    def own(self, index_id: str) -> None:
        """Make this index the owner, whichever was before."""

    def staging(self) -> AbstractContextManager[Path]:
        """A fresh private folder for the files of one upload; it and what is left in it are removed at the end."""

    def sweep(self) -> int:
        """Remove what uploads of killed processes left; the number of such uploads."""


class LocalBlobs:
    """A `BlobStore` in `folder`, which is made if absent. Raises `StoreFull` when the file system has no room."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs = folder / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._staging = Staging(folder / "staging")
        sync(folder)

    def path(self, sha256: str) -> Path:
        """The file of a blob, whether or not it exists."""
        return self._blobs / sha256[:2] / sha256

    def check(self) -> None:
        """A folder that this process has made is there."""

    def read(self, sha256: str) -> bytes:
        """The blob's bytes; `VersionCorrupt` where it is absent, unreadable or its content does not match its name;
        `StoreUnavailable` where this process has too many files open."""
        with self._open(sha256) as file:
            content = file.read()
        verify(sha256, hashlib.sha256(content).hexdigest())
        return content

    @contextmanager
    def file(self, sha256: str) -> Iterator[Path]:
        """The blob's own file, verified; `VersionCorrupt` as for `read`."""
        with self._open(sha256) as file:
            verify(sha256, hashlib.file_digest(file, "sha256").hexdigest())
        yield self.path(sha256)

    def exists(self, sha256: str) -> bool:
        """Whether there is such a file (unverified)."""
        return self.path(sha256).is_file()

    def delete(self, *sha256: str) -> None:
        """Remove blobs; those that are absent are fine."""
        for name in sha256:
            self.path(name).unlink(missing_ok=True)

    def list(self) -> Iterator[StoredBlob]:
        """All blobs of the folder; other files in it are none."""
        for folder in self._blobs.iterdir():
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
                for entry in entries:
                    if is_sha256(entry.name):
                        with suppress(FileNotFoundError):  # deleted since it was listed
                            yield StoredBlob(entry.name, entry.stat().st_size)

    def owner(self) -> str | None:
        """What the file `index_id` says."""
        try:
            return (self._folder / "index_id").read_text("utf-8").strip() or None
        except FileNotFoundError:
            return None

    def own(self, index_id: str) -> None:
        """Write the file `index_id` in one atomic step and make it durable."""
        with self.staging() as folder:
            path = folder / "index_id"
            path.write_text(f"{index_id}\n", "utf-8")
            sync(path)
            place(path, self._folder / "index_id")
        sync(self._folder)

    def put(self, path: Path) -> FileRecord:
        """Keep a finished file of `staging()` under its address and make it durable.

        An existing blob of that name is replaced in one atomic step: the content is the same, or is healed by it.
        """
        with full_disk_named(), path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
            target = self.path(sha256)
            target.parent.mkdir(exist_ok=True)
            sync(self._blobs)  # even if the folder was there: whoever made it may have died before this
            place(path, target)
            sync(target.parent)
        return FileRecord(sha256, size)

    def staging(self) -> AbstractContextManager[Path]:
        """A fresh private folder; a full disk while it is in use is raised as `StoreFull`."""
        return self._staging.fresh()

    def sweep(self) -> int:
        """Remove the staging folders whose owner is dead; those of living processes stay."""
        return self._staging.sweep()

    @contextmanager
    def _open(self, sha256: str) -> Iterator[BufferedReader]:
        """The blob's file; whatever the file system says, now or while it is read, is one of the store's errors."""
        try:
            with self.path(sha256).open("rb") as file:
                yield file
        except FileNotFoundError:
            raise missing(sha256) from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # the blob is as good as before
                message = f"blob {sha256} cannot be opened now: {error.strerror}; raise the limit on open files"
                raise StoreUnavailable(message) from error
            raise VersionCorrupt(sha256, f"blob {sha256} cannot be read: {error.strerror}") from error


def is_sha256(name: str) -> bool:
    """Whether a file's name can be a blob's."""
    return _SHA256.fullmatch(name) is not None


def verify(sha256: str, found: str) -> None:
    """`VersionCorrupt` unless the content has the sha256 that it is named by."""
    if found != sha256:
        raise VersionCorrupt(sha256, f"blob {sha256} was altered in the blob store: its content has another sha256")


def missing(sha256: str) -> VersionCorrupt:
    """The error for a blob that is not there."""
    return VersionCorrupt(sha256, f"blob {sha256} is missing from the blob store")

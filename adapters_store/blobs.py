"""Content-addressed files: a blob's name is the sha256 of its bytes, so a blob never changes.

`BlobStore` is what readers and publishers need; `LocalBlobs` keeps blobs in a folder that several servers may share.
All calls are synchronous file IO: an asyncio caller puts them on a thread. Who still needs a blob is not known here.

    <folder>/blobs/ab/abcdef…     a blob, complete whenever this name exists
    <folder>/staging/<id>/        the files of one upload that is under way
    <folder>/staging/<id>.lock    held by the process that owns <id>, and freed by the system when that process dies
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from adapters_store.errors import StoreFull, VersionCorrupt
from adapters_store.records import FileRecord


class BlobStore(Protocol):
    """Where the bytes of all versions are."""

    def read(self, sha256: str) -> bytes:
        """The blob's bytes, verified; `VersionCorrupt` where it is absent or its content does not match."""

    def put(self, path: Path) -> FileRecord:
        """Take over a finished file of `staging()`; on return it is durable. Putting the same content again is free."""

    def exists(self, sha256: str) -> bool:
        """Whether there is such a blob (unverified)."""

    def delete(self, sha256: str) -> None:
        """Forget a blob; one that is absent is fine."""

    def staging(self) -> AbstractContextManager[Path]:
        """A fresh private folder for the files of one upload; it and what is left in it are removed at the end."""

    def sweep(self) -> int:
        """Remove what uploads of killed processes left; the number of such uploads."""


class LocalBlobs:
    """A `BlobStore` in `folder`, which is made if absent. Raises `StoreFull` when the file system has no room."""

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs"
        self._staging = folder / "staging"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(exist_ok=True)
        _sync_folder(folder)
        # Held for the instants in which an upload's folder is made or judged to be an orphan: between making a lock
        # file and locking it, a sweep by another server would take the newborn for one.
        self._guard_path = folder / "staging.lock"

    def path(self, sha256: str) -> Path:
        """The file of a blob, whether or not it exists."""
        return self._blobs / sha256[:2] / sha256

    def read(self, sha256: str) -> bytes:
        """The blob's bytes; `VersionCorrupt` where it is absent or its content does not match its name."""
        try:
            content = self.path(sha256).read_bytes()
        except FileNotFoundError:
            raise VersionCorrupt(sha256, f"blob {sha256} is missing from the blob store") from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise VersionCorrupt(sha256, f"blob {sha256} was altered on disk: its content has another sha256")
        return content

    def exists(self, sha256: str) -> bool:
        """Whether there is such a file (unverified)."""
        return self.path(sha256).is_file()

    def delete(self, sha256: str) -> None:
        """Remove a blob; one that is absent is fine."""
        self.path(sha256).unlink(missing_ok=True)

    def put(self, path: Path) -> FileRecord:
        """Move a finished file (of `staging()`: same file system) to its address and make it durable.

        An existing blob of that name is replaced in one atomic step: the content is the same, or is healed by it.
        """
        with _full_disk_named(), path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
            target = self.path(sha256)
            target.parent.mkdir(exist_ok=True)
            _sync_folder(self._blobs)  # even if the folder was there: whoever made it may have died before this
            os.replace(path, target)
            _sync_folder(target.parent)
        return FileRecord(sha256, size)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh private folder; a full disk while it is in use is raised as `StoreFull`."""
        owner = secrets.token_hex(16)
        folder = self._staging / owner
        lock = FileLock(self._staging / f"{owner}.lock", blocking=False, thread_local=False)
        with _full_disk_named():
            with self._guard():
                lock.acquire()
                folder.mkdir()
            try:
                yield folder
            finally:
                self._remove(folder, lock)

    def sweep(self) -> int:
        """Remove the staging folders whose owner is dead; those of living processes stay."""
        swept = 0
        for path in sorted(self._staging.glob("*.lock")):
            lock = FileLock(path, blocking=False, thread_local=False)
            try:
                with self._guard():
                    lock.acquire()
            except Timeout:
                continue
            self._remove(path.with_suffix(""), lock)
            swept += 1
        return swept

    def _guard(self) -> FileLock:
        return FileLock(self._guard_path, timeout=10, poll_interval=0.005, thread_local=False)

    @staticmethod
    def _remove(folder: Path, lock: FileLock) -> None:
        """Folder first, lock file last: a death in between leaves a lock file, which the next sweep finds."""
        if folder.exists():
            shutil.rmtree(folder)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (fsync of a file does not cover its name)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"no room is left on the blob store's disk: {error}") from error
        raise

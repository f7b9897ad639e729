"""A bounded cache of blobs on local disk, in front of a blob store that is far away.

Copies are verified whenever they are used; a damaged one counts as absent. Which copy was used last is its file's
modification time, so it outlives the process. Several processes may share the folder: a copy in use is locked, so
that none of them removes it. Where blobs come from is not known here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from adapters_store.blobs.local import is_sha256
from adapters_store.blobs.staging import place

SLACK = 16
"""A full cache is emptied by one part in so many, and looked through after so much was added: looking costs."""


class _Copy(NamedTuple):
    used: float  # Unix seconds
    size: int
    path: Path


class BlobCache:
    """Copies in `folder`, together at most `capacity` bytes, or one blob that is larger.

    What is in use may exceed that, and each further process on the folder may by one part in `SLACK`.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder = folder
        self._capacity = capacity
        self._mutex = threading.Lock()
        self._counted = 0  # bytes when the folder was last looked through
        self._added = 0  # bytes that this process added since
        folder.mkdir(parents=True, exist_ok=True)
        self._make_room(0)

    def read(self, sha256: str) -> bytes | None:
        """The blob's bytes, or None where there is no good copy."""
        with self._locked(sha256) as file:
            if file is None:
                return None
            content = file.read()
        if hashlib.sha256(content).hexdigest() == sha256:
            return content
        self.remove(sha256)
        return None

    @contextmanager
    def file(self, sha256: str) -> Iterator[Path | None]:
        """The blob's file, which stays while the context is open; None where there is no good copy."""
        with self._locked(sha256) as file:
            if file is None:
                yield None
            elif hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                yield self._path(sha256)
            else:
                self.remove(sha256)
                yield None

    def add(self, sha256: str, path: Path) -> None:
        """Keep a copy of a staged file (see `staging.place`), known to be that blob's; others may have to leave."""
        size = path.stat().st_size
        with self._mutex:
            full = self._counted + self._added + size > self._capacity
            if full or self._added + size > self._capacity // SLACK:
                self._make_room(size)
            self._added += size
        target = self._path(sha256)
        target.parent.mkdir(exist_ok=True)
        os.utime(path)
        place(path, target)

    def remove(self, sha256: str) -> None:
        """Forget a copy; who uses it still can."""
        self._path(sha256).unlink(missing_ok=True)

    @contextmanager
    def _locked(self, sha256: str) -> Iterator[BufferedReader | None]:
        """The open file of a copy that nobody removes meanwhile, marked as just used; None where there is none."""
        try:
            file = self._path(sha256).open("rb")
        except FileNotFoundError:
            yield None
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_SH)
            try:
                kept = os.path.samestat(os.fstat(file.fileno()), self._path(sha256).stat())
            except FileNotFoundError:
                kept = False
            if not kept:  # it left between the two calls
                yield None
                return
            os.utime(file.fileno())
            yield file

    def _make_room(self, size: int) -> None:
        """Count the copies; if `size` more bytes do not fit, let the least recently used leave until some room is."""
        copies = sorted(self._copies())
        self._counted = sum(copy.size for copy in copies)
        self._added = 0
        if self._counted + size <= self._capacity:
            return
        wanted = self._capacity - self._capacity // SLACK - size
        for copy in copies:
            if self._counted <= max(wanted, 0):
                return
            if _leave(copy.path):
                self._counted -= copy.size

    def _copies(self) -> Iterator[_Copy]:
        for folder in self._folder.iterdir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        found = entry.stat()
                    except FileNotFoundError:  # another process let it leave
                        continue
                    if is_sha256(entry.name):
                        yield _Copy(found.st_mtime, found.st_size, Path(entry.path))

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256


def _leave(path: Path) -> bool:
    """Remove a copy unless somebody uses it; whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True

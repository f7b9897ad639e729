"""Staging: private folders for the files of uploads that are under way, and how a finished file gets its final name.

A folder goes when its upload ends; what a killed process left is found by its lock, which the system has freed. What
the files hold, and where they go, is not known here.

    <folder>/<id>/        the files of one upload
    <folder>/<id>.lock    held by the process that owns <id>
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from adapters_store.errors import StoreFull

Entered = TypeVar("Entered")


class Staging:
    """Folders inside `folder`, which is made if absent and may be shared by several processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Held for the instants in which an upload's folder is made or judged to be an orphan: between making a lock
        # file and locking it, a sweep by another server would take the newborn for one.
        self._guard_path = folder.with_suffix(".lock")

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """A folder of the caller's own, removed with what is in it at the end; a full disk is raised as `StoreFull`."""
        owner = secrets.token_hex(16)
        folder = self._folder / owner
        lock = FileLock(self._folder / f"{owner}.lock", blocking=False, thread_local=False)
        with full_disk_named():
            with self._guard():
                lock.acquire()
                folder.mkdir()
            try:
                yield folder
            finally:
                self._remove(folder, lock)

    def sweep(self) -> int:
        """Remove the folders whose owner is dead, and return how many; those of living processes stay."""
        swept = 0
        for path in sorted(self._folder.glob("*.lock")):
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


def place(path: Path, target: Path) -> None:
    """Give a staged file its final name too, in one atomic step, whatever stood there before.

    The staged file stays until its upload ends, since the upload may have to place it again; nobody writes to it any
    more. Both are on one file system; one without hard links gets a copy.
    """
    spare = path.with_name(f".{path.name}.placed")
    try:
        try:
            os.link(path, spare)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            shutil.copyfile(path, spare)
            sync(spare)
        os.replace(spare, target)
    finally:
        # Two names of one file are not replaced but both kept.
        with suppress(FileNotFoundError):
            spare.unlink()


def sync(path: Path) -> None:
    """Make a file's content durable, or a folder's names (which the fsync of a file does not cover)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@asynccontextmanager
async def on_threads(context: AbstractContextManager[Entered]) -> AsyncIterator[Entered]:
    """`context` for an event loop: entering and leaving it is IO, which may wait for a lock, and is done on threads.
    It is left also where the caller is cancelled in the middle of either."""
    entering = asyncio.ensure_future(asyncio.to_thread(context.__enter__))
    try:
        entered = await asyncio.shield(entering)
    except asyncio.CancelledError:
        await asyncio.wait([entering])
        if entering.exception() is None:
            await _leave(context, None)
        raise
    try:
        yield entered
    except BaseException as error:
        if not await _leave(context, error):
            raise
    else:
        await _leave(context, None)


async def _leave(context: AbstractContextManager[Entered], error: BaseException | None) -> bool | None:
    of_error = (None, None, None) if error is None else (type(error), error, error.__traceback__)
    return await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(context.__exit__, *of_error)))


@contextmanager
def full_disk_named() -> Iterator[None]:
    """Raise `StoreFull` for a full file system, a quota, and a limit on the size of a file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFull(f"no room is left on the disk of the files: {error}") from error
        raise

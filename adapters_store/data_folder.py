"""A server's data folder: its lock and the places inside it. It knows nothing of what is kept there."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from adapters_store.errors import DataFolderLocked


class DataFolder:
    """The folder `path`, made if absent and locked while this object is open (the lock ends with the process).

    Raises `DataFolderLocked` when another process, or another `DataFolder` here, holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.redis = self.path / "redis"
        self.blobs = self.path / "blobs"
        self.cache = self.path / "cache"
        self.blob_cache = self.path / "blob-cache"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / "lock", blocking=False, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise DataFolderLocked(
                f"another server uses the data folder {self.path}; stop it, or choose another with --data-dir"
            ) from None

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock.release()

    def __enter__(self) -> DataFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""Every error of the store, on one page. It knows no HTTP: whoever serves it decides on a status.

StoreError
├── StoreUnavailable    Redis is away, too slow or not accepting writes: the same call may succeed later
├── StoreFull           no room is left for the blobs or in the index; nothing of the write is visible
├── NotFound            there is no such task or version
├── Conflict            the change is refused in the present state; `code` says why
├── VersionCorrupt      a blob is missing, cut or altered: what stands there is not what was published
├── RedisMisconfigured  this Redis may lose what was acknowledged, or is of a kind that is not supported
├── RedisNotStarted     the private Redis could not be started
└── DataFolderLocked    another server uses the data folder
"""

# ruff: noqa: N818 - the names say what is the case, as in the contract; all derive from StoreError
from __future__ import annotations


class StoreError(Exception):
    """Base of the tree. `str(error)` is a sentence for a person."""


class StoreUnavailable(StoreError):
    """Redis did not answer in time, or cannot take writes at the moment."""


class StoreFull(StoreError):
    """The file system or Redis' `maxmemory` is exhausted."""


class NotFound(StoreError):
    """`what` is "task", "version" or "canary"; `name` is what was asked for."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"there is no {what} '{name}'")
        self.what = what
        self.name = name


class Conflict(StoreError):
    """`code` is a stable snake_case word: `version_active`, `no_active_version`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class VersionCorrupt(StoreError):
    """The blob `sha256` cannot be trusted; uploading the same content again heals it."""

    def __init__(self, sha256: str, message: str) -> None:
        super().__init__(message)
        self.sha256 = sha256


class RedisMisconfigured(StoreError):
    """The message names the Redis setting and the value that is needed."""


class RedisNotStarted(StoreError):
    """The message says why, and what to install or which log to read."""


class DataFolderLocked(StoreError):
    """Two servers on one data folder would overwrite each other's state."""

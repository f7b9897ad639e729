"""Every error of the store, on one page. It knows no HTTP: whoever serves it decides on a status.

StoreError
├── StoreUnavailable    Redis or the bucket is away, too slow or not accepting writes: the same call may succeed later
│   └── BucketRefused   the bucket does not exist, or does not let this server in
├── StoreFull           no room is left for the blobs or in the index; nothing of the write is visible
├── NotFound            there is no such task, version, customization or key
├── Conflict            the change is refused in the present state; `code` says why
├── VersionCorrupt      a blob is missing, cut or altered: what stands there is not what was published
├── BackupDamaged       a backup's file is not whole, or none at all
├── RedisMisconfigured  this Redis may lose what was acknowledged, or is of a kind that is not supported
├── RedisNotStarted     the private Redis could not be started
└── DataFolderLocked    another server uses the data folder
"""

# ruff: noqa: N818 - the names say what is the case, as in the contract; all derive from StoreError
from __future__ import annotations

from adapters_store.scope import id_of


class StoreError(Exception):
    """Base of the tree. `str(error)` is a sentence for a person."""


class StoreUnavailable(StoreError):
    """Redis or the bucket did not answer in time, or cannot take writes at the moment."""


class BucketRefused(StoreUnavailable):
    """Waiting will not help; the message says what to mend."""


class StoreFull(StoreError):
    """The file system or Redis' `maxmemory` is exhausted."""


class NotFound(StoreError):
    """`what` is "task", "version", "canary", "customization" or "key"; `name` is what was asked for, scoped. The
    sentence has the id alone: a caller knows their own tenant, and is to learn of no other."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"there is no {what} '{id_of(name)}'")
        self.what = what
        self.name = name


class Conflict(StoreError):
    """`code` is a stable snake_case word: `version_active`, `version_canary`, `no_active_version`, `no_previous`,
    `changed_meanwhile`, `public_name_taken`, `blobs_deleting`, `garbage_locked`, `index_not_empty`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class VersionCorrupt(StoreError):
    """The blob `sha256` cannot be trusted; uploading the same content again heals it."""

    def __init__(self, sha256: str, message: str) -> None:
        super().__init__(message)
        self.sha256 = sha256


class BackupDamaged(StoreError):
    """The message says what is wrong with the file; nothing of it was restored."""


class RedisMisconfigured(StoreError):
    """The message names the Redis setting and the value that is needed."""


class RedisNotStarted(StoreError):
    """The message says why, and what to install or which log to read."""


class DataFolderLocked(StoreError):
    """Two servers on one data folder would overwrite each other's state."""

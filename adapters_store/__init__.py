"""The adapter store: an index of tasks and versions in Redis, and their files as content-addressed blobs.

It knows no torch and nothing of the server. `publish_files` writes, `TaskDirectory` answers requests from memory,
`RedisIndex` is everything else; `PrivateRedis` runs a Redis where none is given.
"""

from adapters_store.blobs import BlobStore, LocalBlobs
from adapters_store.data_folder import DataFolder
from adapters_store.directory import TaskDirectory
from adapters_store.errors import (
    Conflict,
    DataFolderLocked,
    NotFound,
    RedisMisconfigured,
    RedisNotStarted,
    StoreError,
    StoreFull,
    StoreUnavailable,
    VersionCorrupt,
)
from adapters_store.index import RedisIndex
from adapters_store.parent_death import signalled_at_parent_death
from adapters_store.private_redis import PrivateRedis
from adapters_store.publish import ADAPTER_FILES, NewVersionFacts, adapter_digest, publish_files
from adapters_store.records import ID_PATTERN, Canary, FileRecord, NewVersion, Task, TaskSettings, Version

__all__ = [
    "ADAPTER_FILES",
    "ID_PATTERN",
    "BlobStore",
    "Canary",
    "Conflict",
    "DataFolder",
    "DataFolderLocked",
    "FileRecord",
    "LocalBlobs",
    "NewVersion",
    "NewVersionFacts",
    "NotFound",
    "PrivateRedis",
    "RedisIndex",
    "RedisMisconfigured",
    "RedisNotStarted",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "Task",
    "TaskDirectory",
    "TaskSettings",
    "Version",
    "VersionCorrupt",
    "adapter_digest",
    "publish_files",
    "signalled_at_parent_death",
]

"""The adapter store: an index of tasks and versions in Redis, and their files as content-addressed blobs.

It knows no torch and nothing of the server. `publish_files` writes, `TaskDirectory` answers requests from memory,
`RedisIndex` is everything else; `PrivateRedis` runs a Redis where none is given.
"""

from adapters_store.backup.backup import write_backup
from adapters_store.backup.file import Totals as BackupTotals
from adapters_store.backup.restore import restore_backup
from adapters_store.blobs.local import BlobStore, LocalBlobs, StoredBlob
from adapters_store.blobs.opening import blobs_url, open_blobs
from adapters_store.blobs.staging import on_threads
from adapters_store.data_folder import DataFolder
from adapters_store.errors import (
    BackupDamaged,
    BucketRefused,
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
from adapters_store.garbage import GarbageCollector, GarbageReport
from adapters_store.identity import ADAPTER_FILES, adapter_digest
from adapters_store.index.api_keys import KEY_SCOPES, MAX_QUOTA, ApiKey, ApiKeys, KeyScope, Quotas
from adapters_store.index.feed import FeedEvent, FeedListener
from adapters_store.index.index import RedisIndex
from adapters_store.index.usage import LEASE_SECONDS, LocalUsage, SharedUsage, Usage
from adapters_store.mirror.api_keys import ApiKeyDirectory
from adapters_store.mirror.customizations import CustomizationDirectory
from adapters_store.mirror.directory import TaskDirectory
from adapters_store.parent_death import signalled_at_parent_death
from adapters_store.private_redis import PrivateRedis
from adapters_store.publish import NewVersionFacts, customize_files, publish_files
from adapters_store.records import (
    BY_NOBODY,
    ID_PATTERN,
    Canary,
    Change,
    Customization,
    CustomizationLimits,
    FileRecord,
    HistoryEntry,
    NewCustomization,
    NewVersion,
    Task,
    TaskSettings,
    TaskState,
    Version,
)
from adapters_store.scope import id_of, scoped, tenant_of

__all__ = [
    "ADAPTER_FILES",
    "BY_NOBODY",
    "ID_PATTERN",
    "KEY_SCOPES",
    "LEASE_SECONDS",
    "MAX_QUOTA",
    "ApiKey",
    "ApiKeyDirectory",
    "ApiKeys",
    "BackupDamaged",
    "BackupTotals",
    "BlobStore",
    "BucketRefused",
    "Canary",
    "Change",
    "Conflict",
    "Customization",
    "CustomizationDirectory",
    "CustomizationLimits",
    "DataFolder",
    "DataFolderLocked",
    "FeedEvent",
    "FeedListener",
    "FileRecord",
    "GarbageCollector",
    "GarbageReport",
    "HistoryEntry",
    "KeyScope",
    "LocalBlobs",
    "LocalUsage",
    "NewCustomization",
    "NewVersion",
    "NewVersionFacts",
    "NotFound",
    "PrivateRedis",
    "Quotas",
    "RedisIndex",
    "RedisMisconfigured",
    "RedisNotStarted",
    "SharedUsage",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "StoredBlob",
    "Task",
    "TaskDirectory",
    "TaskSettings",
    "TaskState",
    "Usage",
    "Version",
    "VersionCorrupt",
    "adapter_digest",
    "blobs_url",
    "customize_files",
    "id_of",
    "on_threads",
    "open_blobs",
    "publish_files",
    "restore_backup",
    "scoped",
    "signalled_at_parent_death",
    "tenant_of",
    "write_backup",
]

"""Blobs in an S3-compatible bucket, behind a bounded cache on local disk.

`s3://bucket/prefix` keeps a blob as the object `prefix/blobs/ab/abcdef…`, and who owns the store in `prefix/index_id`.
Endpoint, region and credentials come from the environment, by the names that all S3 clients read (`AWS_ENDPOINT_URL`,
`AWS_REGION`, `AWS_ACCESS_KEY_ID`, …), and from nowhere else. A put is complete or absent: an object appears as a whole.
What an upload of several parts that was killed leaves in the bucket is its own matter (a life-cycle rule for incomplete
multipart uploads removes it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
import structlog
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from adapters_store.blobs.cache import BlobCache
from adapters_store.blobs.local import StoredBlob, is_sha256, missing, verify
from adapters_store.blobs.staging import Staging, full_disk_named
from adapters_store.errors import BucketRefused, StoreFull, StoreUnavailable
from adapters_store.records import FileRecord

if TYPE_CHECKING:  # the library has these names for type checkers only
    from obstore.store import ClientConfig, RetryConfig

CONNECT_TIMEOUT = timedelta(seconds=3)
SILENCE_TIMEOUT = timedelta(seconds=10)
"""Until a request fails whose answer does not come, or stops coming."""
REQUEST_TIMEOUT = timedelta(minutes=5)
"""Of a request that does make progress: one part of an upload, or a whole blob on its way here."""
RETRY_TIMEOUT = timedelta(seconds=5)
"""After the first attempt, no further one begins once this has passed."""

log = structlog.get_logger(__name__)


class BucketBlobs:
    """A `BlobStore` in the bucket at `url`; `folder` of this machine holds the cache and the files of uploads."""

    def __init__(self, url: str, folder: Path, cache_bytes: int) -> None:
        client: ClientConfig = {
            "allow_http": True,  # the endpoint's URL says which
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": SILENCE_TIMEOUT,
            "timeout": REQUEST_TIMEOUT,
        }
        retry: RetryConfig = {"max_retries": 3, "retry_timeout": RETRY_TIMEOUT}
        self._url = url
        self._bucket = from_url(url, client_options=client, retry_config=retry)
        folder.mkdir(parents=True, exist_ok=True)
        self._staging = Staging(folder / "staging")
        self._cache = BlobCache(folder / "blobs", cache_bytes)

    def check(self) -> None:
        """Ask the bucket for a listing: `BucketRefused` where it says no, `StoreUnavailable` where it says nothing."""
        with self._errors_named():
            next(iter(obstore.list(self._bucket, prefix="blobs/", chunk_size=1)), None)

    def read(self, sha256: str) -> bytes:
        """The blob's bytes, from the cache or the bucket; `VersionCorrupt` where the bucket's object is not it."""
        content = self._cache.read(sha256)
        if content is None:
            content = self._fetch(sha256)
            self._remember(sha256, content)
        return content

    @contextmanager
    def file(self, sha256: str) -> Iterator[Path]:
        """The blob's copy in the cache, fetched if absent, which stays while the context is open."""
        with self._cache.file(sha256) as copy:
            if copy is not None:
                yield copy
                return
        with self._staging.fresh() as folder:
            path = folder / sha256
            path.write_bytes(self._fetch(sha256))
            self._cache.add(sha256, path)
            yield path

    def put(self, path: Path) -> FileRecord:
        """Upload a finished file of `staging()`; on return the bucket has it, whatever stood there before."""
        with full_disk_named():
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
            with self._errors_named():
                obstore.put(self._bucket, _key(sha256), path)
            self._cache.add(sha256, path)
        return FileRecord(sha256, size)

    def exists(self, sha256: str) -> bool:
        """Whether the bucket has such an object (unverified)."""
        with self._errors_named():
            try:
                obstore.head(self._bucket, _key(sha256))
            except FileNotFoundError:
                return False
        return True

    def delete(self, *sha256: str) -> None:
        """Remove objects; those that are absent are fine."""
        if not sha256:
            return
        with self._errors_named():
            obstore.delete(self._bucket, [_key(name) for name in sha256])
        for name in sha256:
            self._cache.remove(name)

    def list(self) -> Iterator[StoredBlob]:
        """All blobs of the bucket; other objects in it are none."""
        with self._errors_named():
            for page in obstore.list(self._bucket, prefix="blobs/"):
                for found in page:
                    name = found["path"].rpartition("/")[2]
                    if is_sha256(name):
                        yield StoredBlob(name, found["size"])

    def owner(self) -> str | None:
        """What the object `index_id` says."""
        found = self._get("index_id")
        return None if found is None else found.decode().strip() or None

    def own(self, index_id: str) -> None:
        """Write the object `index_id`."""
        with self._errors_named():
            obstore.put(self._bucket, "index_id", f"{index_id}\n".encode())

    def staging(self) -> AbstractContextManager[Path]:
        """A fresh private folder of this machine; a full disk while it is in use is raised as `StoreFull`."""
        return self._staging.fresh()

    def sweep(self) -> int:
        """Remove the staging folders whose owner is dead; those of living processes stay."""
        return self._staging.sweep()

    def _fetch(self, sha256: str) -> bytes:
        content = self._get(_key(sha256))
        if content is None:
            raise missing(sha256)
        verify(sha256, hashlib.sha256(content).hexdigest())
        return content

    def _get(self, key: str) -> bytes | None:
        with self._errors_named():
            try:
                return bytes(obstore.get(self._bucket, key).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def _remember(self, sha256: str, content: bytes) -> None:
        """Keep a copy if the disk has room; the caller has the content either way."""
        try:
            with self._staging.fresh() as folder:
                path = folder / sha256
                path.write_bytes(content)
                self._cache.add(sha256, path)
        except StoreFull as error:
            log.warning("a blob is not cached", reason=str(error))

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, BaseError) as error:
            said = str(error)
            if "NoSuchBucket" in said:
                raise BucketRefused(f"there is no bucket at {self._url}; make it, or correct --store") from error
            # Without the pages that the library prints for its own developers.
            why = said.partition("\n")[0].strip()
            if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
                message = f"the bucket at {self._url} refuses the credentials of the environment: {why}"
                raise BucketRefused(message) from error
            raise StoreUnavailable(f"the bucket at {self._url} is not available: {why}") from error


def _key(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"

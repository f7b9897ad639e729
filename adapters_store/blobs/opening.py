"""From the blob store's URL to the store: a folder, `file://…`, or `s3://bucket/prefix`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from adapters_store.blobs.bucket import BucketBlobs
from adapters_store.blobs.local import BlobStore, LocalBlobs


def blobs_url(place: str) -> str:
    """What `open_blobs` takes, wherever it is called: an absolute folder or a bucket's URL. `ValueError` for others."""
    if "://" not in place:
        return str(Path(place).resolve())
    parts = urlsplit(place)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{place}: a file:// URL names a folder of this machine, as file:///folder")
        return str(Path(url2pathname(parts.path)).resolve())
    if parts.scheme != "s3":
        raise ValueError(f"{place}: a store is a folder, file://… or s3://bucket/prefix")
    if "@" in parts.netloc or parts.query:
        raise ValueError("an s3:// URL is s3://bucket/prefix and nothing else; credentials come from the environment")
    if not parts.netloc:
        raise ValueError(f"{place}: the bucket is missing; write s3://bucket/prefix")
    return place


def open_blobs(url: str, cache: Path, cache_bytes: int) -> BlobStore:
    """The store at `url` (of `blobs_url`), which is not asked anything yet.

    `cache` is a folder of this machine for copies of a bucket's blobs, at most `cache_bytes` of them, and for uploads
    on their way to it; several processes may share it. A folder needs none.
    """
    if url.startswith("s3://"):
        return BucketBlobs(url, cache, cache_bytes)
    return LocalBlobs(Path(url))

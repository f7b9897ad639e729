"""Blobs in an S3-compatible bucket: what is put is read back, and each fault of the bucket has its name."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from adapters_store import StoreFull, StoreUnavailable, VersionCorrupt
from adapters_store.blobs.bucket import BucketBlobs
from adapters_store.blobs.local import LocalBlobs, StoredBlob
from adapters_store.blobs.opening import blobs_url, open_blobs
from adapters_store.errors import BucketRefused
from adapters_store.records import FileRecord
from tests.bucket_server import BucketServer, bucket_server, use

ROOM = 10**6  # bytes of cache that no test fills


@pytest.fixture(scope="module")
def server() -> Iterator[BucketServer]:
    with bucket_server() as server:
        yield server


@pytest.fixture
def url(server: BucketServer, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(server, monkeypatch)


@pytest.fixture
def bucket(url: str, tmp_path: Path) -> BucketBlobs:
    return BucketBlobs(url, tmp_path / "cache", ROOM)


@pytest.fixture
def elsewhere(url: str, tmp_path: Path) -> BucketBlobs:
    """The same bucket as another machine sees it: with a cache of its own."""
    return BucketBlobs(url, tmp_path / "elsewhere", ROOM)


def put(blobs: BucketBlobs, content: bytes) -> FileRecord:
    with blobs.staging() as folder:
        (folder / "file").write_bytes(content)
        return blobs.put(folder / "file")


def key(url: str, sha256: str) -> str:
    """The object's path inside the bucket, as the module's docstring promises it."""
    return f"{url.rpartition('/')[2]}/blobs/{sha256[:2]}/{sha256}"


def test_a_blob_is_named_by_its_content_and_read_back_by_others(bucket: BucketBlobs, elsewhere: BucketBlobs) -> None:
    record = put(bucket, b"content")
    assert record == FileRecord(hashlib.sha256(b"content").hexdigest(), 7)
    assert put(bucket, b"content") == record
    for blobs in (bucket, elsewhere):
        assert blobs.read(record.sha256) == b"content"
        assert blobs.exists(record.sha256)
        with blobs.file(record.sha256) as path:
            assert path.read_bytes() == b"content"


def test_a_large_blob_goes_in_parts(bucket: BucketBlobs, elsewhere: BucketBlobs) -> None:
    content = os.urandom(1000) * 11_000
    record = put(bucket, content)
    assert record.size == len(content)
    assert elsewhere.read(record.sha256) == content
    with elsewhere.file(record.sha256) as path:
        assert path.read_bytes() == content


def test_objects_lie_under_the_prefix_and_only_blobs_are_listed(
    bucket: BucketBlobs, server: BucketServer, url: str
) -> None:
    records = [put(bucket, text) for text in (b"one", b"three", b"eleven")]
    server.objects().put(key(url, "ab") + ".tmp", b"no blob")
    assert sorted(bucket.list()) == sorted(StoredBlob(record.sha256, record.size) for record in records)
    assert bytes(server.objects().get(key(url, records[0].sha256)).bytes()) == b"one"


def test_deleted_blobs_are_gone_for_everybody(bucket: BucketBlobs, elsewhere: BucketBlobs) -> None:
    records = [put(bucket, text) for text in (b"one", b"two", b"three")]
    bucket.delete(records[0].sha256, records[1].sha256)
    bucket.delete(records[0].sha256)
    assert [blob.sha256 for blob in bucket.list()] == [records[2].sha256]
    for blobs in (bucket, elsewhere):
        assert not blobs.exists(records[0].sha256)
        with pytest.raises(VersionCorrupt, match="missing"):
            blobs.read(records[0].sha256)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_object_is_refused_and_healed_by_putting_it_again(
    bucket: BucketBlobs, elsewhere: BucketBlobs, server: BucketServer, url: str, damage: str
) -> None:
    sha256 = put(bucket, b"content").sha256
    if damage == "remove":
        server.objects().delete(key(url, sha256))
    else:
        server.objects().put(key(url, sha256), b"conTent" if damage == "flip" else b"conten")
    for read in (elsewhere.read, lambda name: elsewhere.file(name).__enter__()):
        with pytest.raises(VersionCorrupt, match="missing" if damage == "remove" else "altered") as corrupt:
            read(sha256)
        assert corrupt.value.sha256 == sha256
    put(bucket, b"content")
    assert elsewhere.read(sha256) == b"content"


def test_a_damaged_copy_on_this_machine_is_fetched_anew(bucket: BucketBlobs, tmp_path: Path) -> None:
    sha256 = put(bucket, b"content").sha256
    copy = tmp_path / "cache" / "blobs" / sha256[:2] / sha256
    for damage in (b"conTent", b""):
        copy.write_bytes(damage)
        assert bucket.read(sha256) == b"content"
        assert copy.read_bytes() == b"content"
        copy.write_bytes(damage)
        with bucket.file(sha256) as path:
            assert path.read_bytes() == b"content"


def test_a_bucket_that_is_away_is_unavailable_while_copies_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with bucket_server() as server:
        url = use(server, monkeypatch)
        bucket, other = (BucketBlobs(url, tmp_path / name, ROOM) for name in ("a", "b"))
        sha256 = put(bucket, b"content").sha256
        server.stop()
        assert bucket.read(sha256) == b"content"
        for call in (
            bucket.check,
            lambda: other.read(sha256),
            lambda: put(bucket, b"other"),
            lambda: bucket.exists(sha256),
            lambda: bucket.delete(sha256),
            lambda: list(bucket.list()),
        ):
            with pytest.raises(StoreUnavailable, match=f"bucket at {url} is not available") as away:
                call()
            assert "\n" not in str(away.value)
        assert bucket.read(sha256) == b"content"
        server.start()
        bucket.check()
        assert other.read(sha256) == b"content"
        assert put(bucket, b"other").size == 5
        assert list((tmp_path / "a" / "staging").iterdir()) == []


def test_a_bucket_that_says_nothing_is_unavailable_after_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("adapters_store.blobs.bucket.SILENCE_TIMEOUT", timedelta(milliseconds=100))
    monkeypatch.setattr("adapters_store.blobs.bucket.RETRY_TIMEOUT", timedelta(milliseconds=10))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreUnavailable):
            BucketBlobs("s3://medley", tmp_path, ROOM).read("a" * 64)


def test_a_bucket_that_does_not_exist_is_no_missing_blob(url: str, tmp_path: Path) -> None:
    absent = BucketBlobs("s3://no-such-bucket/prefix", tmp_path, ROOM)
    for call in (absent.check, lambda: absent.read("a" * 64), lambda: put(absent, b"content")):
        with pytest.raises(BucketRefused, match="there is no bucket at s3://no-such-bucket/prefix"):
            call()


def test_a_disk_without_room_for_a_copy_does_not_cost_the_answer(
    bucket: BucketBlobs, elsewhere: BucketBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = put(bucket, b"content").sha256

    def full(*arguments: object) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(elsewhere._cache, "add", full)
    assert elsewhere.read(sha256) == b"content"


def test_a_store_is_a_folder_or_a_bucket_by_its_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert blobs_url("here") == blobs_url(f"file://{tmp_path}/here") == str(tmp_path / "here")
    assert blobs_url(url) == url
    assert isinstance(open_blobs(blobs_url("here"), tmp_path / "cache", ROOM), LocalBlobs)
    assert isinstance(open_blobs(url, tmp_path / "cache", ROOM), BucketBlobs)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("ftp://host/folder", "a store is a folder"),
        ("s3:///prefix", "bucket is missing"),
        ("s3://key:secret@bucket", "credentials come from the environment"),
        ("s3://bucket?secret_access_key=secret", "credentials come from the environment"),
        ("file://host/folder", "folder of this machine"),
    ],
)
def test_other_places_are_refused_without_printing_a_secret(place: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        blobs_url(place)
    assert "secret" not in str(refused.value)

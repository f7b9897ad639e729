"""Blobs: complete or absent, verified when read; staged files never outlive their upload."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from filelock import FileLock

from adapters_store import FileRecord, LocalBlobs, StoreFull, StoreUnavailable, VersionCorrupt, on_threads


def put(blobs: LocalBlobs, content: bytes) -> FileRecord:
    with blobs.staging() as folder:
        (folder / "file").write_bytes(content)
        return blobs.put(folder / "file")


def test_a_blob_is_named_by_its_content_and_read_back(blobs: LocalBlobs) -> None:
    record = put(blobs, b"content")
    assert record == FileRecord(hashlib.sha256(b"content").hexdigest(), 7)
    assert blobs.read(record.sha256) == b"content"
    assert blobs.exists(record.sha256)
    assert put(blobs, b"content") == record
    blobs.delete(record.sha256)
    blobs.delete(record.sha256)
    assert not blobs.exists(record.sha256)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_blob_is_refused_and_healed_by_putting_it_again(blobs: LocalBlobs, damage: str) -> None:
    sha256 = put(blobs, b"content").sha256
    path = blobs.path(sha256)
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(b"conTent" if damage == "flip" else b"conten")
    with pytest.raises(VersionCorrupt) as corrupt:
        blobs.read(sha256)
    assert corrupt.value.sha256 == sha256
    put(blobs, b"content")
    assert blobs.read(sha256) == b"content"


@pytest.mark.parametrize("reader", ["read", "file"])
def test_a_blob_that_the_file_system_does_not_give_is_corrupt_and_its_path_stays_unsaid(
    blobs: LocalBlobs, tmp_path: Path, reader: str
) -> None:
    sha256 = put(blobs, b"content").sha256
    blobs.path(sha256).unlink()
    blobs.path(sha256).mkdir()
    with pytest.raises(VersionCorrupt, match=f"^blob {sha256} cannot be read: Is a directory$"), ExitStack() as stack:
        blobs.read(sha256) if reader == "read" else stack.enter_context(blobs.file(sha256))


def test_a_process_with_too_many_open_files_has_no_corrupt_blobs(blobs: LocalBlobs) -> None:
    sha256 = put(blobs, b"content").sha256
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(StoreUnavailable, match="open files"):
            blobs.read(sha256)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert blobs.read(sha256) == b"content"


def staged(blobs_folder: Path) -> list[Path]:
    return list((blobs_folder / "staging").rglob("*"))


def test_staged_files_go_when_the_upload_ends_or_fails(blobs: LocalBlobs, tmp_path: Path) -> None:
    def fail_while_staging() -> None:
        with blobs.staging() as folder:
            (folder / "file").write_bytes(b"x")
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_staging()
    assert staged(tmp_path / "blobs") == []
    put(blobs, b"content")
    assert staged(tmp_path / "blobs") == []


def test_a_sweep_removes_what_killed_processes_left_and_nothing_in_use(blobs: LocalBlobs, tmp_path: Path) -> None:
    die = (
        "import os, pathlib, signal, sys; from adapters_store.blobs.local import LocalBlobs\n"
        "with LocalBlobs(pathlib.Path(sys.argv[1])).staging() as folder:\n"
        "    (folder / 'file').write_bytes(b'x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", die, str(tmp_path / "blobs")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(staged(tmp_path / "blobs")) == 3
    with blobs.staging() as mine:
        (mine / "file").write_bytes(b"y")
        assert LocalBlobs(tmp_path / "blobs").sweep() == 1
        assert (mine / "file").read_bytes() == b"y"
    assert staged(tmp_path / "blobs") == []
    assert blobs.sweep() == 0


def test_a_full_disk_is_named_and_leaves_nothing(blobs: LocalBlobs, tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with blobs.staging() as folder:
            (folder / "file").write_bytes(b"x")
            with open("/dev/full", "wb", buffering=0) as full:  # any write to it fails as on a full disk
                full.write(b"x")

    with pytest.raises(StoreFull):
        fill_the_disk()
    assert staged(tmp_path / "blobs") == []


def test_other_failures_of_the_disk_are_not_called_full(blobs: LocalBlobs) -> None:
    with pytest.raises(OSError, match="I/O") as failure, blobs.staging():
        raise OSError(errno.EIO, os.strerror(errno.EIO).replace("Input/output", "I/O"))
    assert failure.value.errno == errno.EIO


@pytest.mark.anyio
@pytest.mark.parametrize("is_cancelled", ["entering", "inside", "not at all"])
async def test_a_staging_folder_of_a_coroutine_is_gone_however_that_ends(blobs: LocalBlobs, is_cancelled: str) -> None:
    seen: list[Path] = []
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def use() -> None:
        async with on_threads(blobs.staging()) as folder:
            seen.append(folder)
            assert folder.is_dir()
            inside.set()
            await go_on.wait()

    with FileLock(blobs._folder / "staging.lock"):  # so that entering waits
        using = asyncio.create_task(use())
        await asyncio.sleep(0.05)
        assert not seen
        if is_cancelled == "entering":
            using.cancel()
            await asyncio.sleep(0.05)
    if is_cancelled != "entering":
        await inside.wait()
        go_on.set() if is_cancelled == "not at all" else using.cancel()
    with suppress(asyncio.CancelledError):
        await using
    assert bool(seen) is (is_cancelled != "entering")
    assert list((blobs._folder / "staging").iterdir()) == []


@pytest.mark.anyio
async def test_a_full_disk_is_named_also_on_a_thread(blobs: LocalBlobs) -> None:
    with pytest.raises(StoreFull):
        async with on_threads(blobs.staging()):
            raise OSError(errno.ENOSPC, "no space")

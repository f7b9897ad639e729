"""Backup and restore: what was there is there again, all of it or nothing; and indexes and stores that are refused."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from adapters_store import (
    Canary,
    Conflict,
    CustomizationDirectory,
    GarbageCollector,
    LocalBlobs,
    PrivateRedis,
    RedisIndex,
    StoreFull,
    StoreUnavailable,
    TaskDirectory,
    TaskSettings,
    VersionCorrupt,
    restore_backup,
    write_backup,
)
from adapters_store.backup.backup import _IndexReader
from adapters_store.backup.file import Part
from adapters_store.backup.restore_index import IndexWriter
from adapters_store.index.api_keys import hash_of
from adapters_store.records import FileRecord
from tests.store.backups import BY, dump, fill
from tests.store.samples import customize_text, eventually, publish_text, stored

pytestmark = pytest.mark.anyio


async def test_a_restored_index_is_what_was_backed_up(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    text = await fill(index, blobs)
    saved = await write_backup(index, blobs, tmp_path / "file")
    old_id = empty.index_id
    assert await restore_backup(empty, other, tmp_path / "file") == saved
    assert (saved.tasks, saved.versions, saved.customizations, saved.api_keys) == (2, 4, 3, 1)
    assert await dump(empty) == await dump(index)
    assert empty.index_id not in (old_id, index.index_id)
    assert other.owner() == empty.index_id

    assert (await empty.get_task("a")).canary == Canary(1, 12.5)
    found = await empty.find_customization("u", "a")
    assert found == await index.find_customization("u", "a") is not None
    assert await empty.usage.stored_bytes("key-a") == await index.usage.stored_bytes("key-a") > 0
    key = await empty.api_keys.find(hash_of(text))
    assert key is not None
    await empty.api_keys.revoke(key.id)
    version, _ = await publish_text(empty, other, "gone", "again")
    assert version.number == 2
    assert (await empty.history("gone", 10))[-1] == (await index.history("gone", 10))[-1]
    await empty.delete_task("a")
    await empty.delete_user("x/v")
    assert await empty.usage.stored_bytes("key-a") == found_bytes(await index.find_customization("u", "x/b"))


async def test_a_customization_that_a_scan_gave_twice_counts_once(
    index: RedisIndex,
    blobs: LocalBlobs,
    empty: RedisIndex,
    other: LocalBlobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As HSCAN may while a hash shrinks."""
    once = _IndexReader._customizations

    async def twice(self: _IndexReader, task: str) -> AsyncIterator[Part]:
        for _ in range(2):
            async for part in once(self, task):
                yield part

    monkeypatch.setattr(_IndexReader, "_customizations", twice)
    await fill(index, blobs)
    saved = await write_backup(index, blobs, tmp_path / "file")
    assert saved.customizations == 6, "each is in it twice"
    await restore_backup(empty, other, tmp_path / "file")
    assert await empty.usage.stored_bytes("key-a") == await index.usage.stored_bytes("key-a") > 0
    assert await dump(empty) == await dump(index)


def found_bytes(customization: Any) -> int:
    return sum(record.size for record in customization.files.values())


async def test_all_named_files_and_no_others_are_in_it(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")
    await GarbageCollector(index.garbage, blobs, 0).collect()
    await restore_backup(empty, other, tmp_path / "file")
    assert stored(other) == stored(blobs)
    assert (await GarbageCollector(empty.garbage, other, 0).collect()).unnamed == 0
    for sha256 in stored(blobs):
        assert other.read(sha256) == blobs.read(sha256)
    assert (tmp_path / "file").stat().st_mode & 0o077 == 0


async def test_more_than_a_page_of_tasks_and_customizations(
    index: RedisIndex,
    blobs: LocalBlobs,
    empty: RedisIndex,
    other: LocalBlobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapters_store.backup.backup.PAGE", 3)
    monkeypatch.setattr("adapters_store.backup.file.BATCH", 500)
    for number in range(8):
        await index.put_task(f"t{number}", TaskSettings())
        await customize_text(index, blobs, f"u{number}", "t0", str(number))
    await write_backup(index, blobs, tmp_path / "file")
    await restore_backup(empty, other, tmp_path / "file")
    assert await dump(empty) == await dump(index)


async def test_a_server_on_the_index_serves_what_was_restored(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")
    directory = TaskDirectory(empty)
    customizations = CustomizationDirectory(empty, directory)
    directory.subscribe(customizations)
    await directory.start()
    assert await customizations.get("u", "a") is None
    await restore_backup(empty, other, tmp_path / "file")
    await eventually(lambda: directory.get("a") is not None)
    assert directory.seen_by("y", "b") == "x/b"
    assert await customizations.get("u", "a") is not None
    await directory.stop()


async def test_changes_beside_a_backup_leave_every_version_in_it_whole(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    done = False

    async def churn(number: int) -> None:
        step = 0
        while not done:
            step += 1
            await publish_text(index, blobs, f"t{number}", f"{number} {step}")
            await customize_text(index, blobs, f"u{step % 3}", f"t{number}", f"{number} {step} mine", BY)
            if step % 4 == 0:
                await index.delete_task(f"t{number}")

    work = asyncio.gather(*(churn(number) for number in range(4)))
    await asyncio.sleep(0.2)
    for _ in range(50):
        with suppress(Conflict):  # a task was deleted while it was read
            await write_backup(index, blobs, tmp_path / "file")
            break
    done = True
    await work
    await restore_backup(empty, other, tmp_path / "file")
    tasks, _ = await empty.list_tasks(10)
    paid = 0
    for task in tasks:
        versions = await empty.list_versions(task.name)
        assert task.active in [version.number for version in versions]
        customizations, _ = await empty.scan_customizations(task.name, 10)
        paid += sum(found_bytes(customization) for customization in customizations)
        for record in [*versions, *customizations]:
            for file in record.files.values():
                other.read(file.sha256)
    assert await empty.usage.stored_bytes("key-a") == paid


async def test_only_into_an_empty_index(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")
    await empty.put_task("a", TaskSettings())
    await empty.delete_task("a")  # its numbers stay
    before = await dump(empty)
    with pytest.raises(Conflict, match="--data-dir") as refused:
        await restore_backup(empty, other, tmp_path / "file")
    assert refused.value.code == "index_not_empty"
    assert await dump(empty) == before
    assert stored(other) == set()


async def test_a_change_during_a_restore_makes_it_fail_and_stays(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, tmp_path: Path
) -> None:
    class Slow(LocalBlobs):
        def put(self, path: Path) -> FileRecord:
            asyncio.run_coroutine_threadsafe(empty.put_task("a", TaskSettings()), loop).result()
            return super().put(path)

    loop = asyncio.get_running_loop()
    await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")
    with pytest.raises(Conflict, match="not empty"):
        await restore_backup(empty, Slow(tmp_path / "other"), tmp_path / "file")
    assert set(await dump(empty)) == {"schema", "task:a", "tasks", "revisions", "history:a"}


async def test_nothing_is_seen_of_a_restore_that_died_and_the_next_one_heals_it(
    index: RedisIndex,
    blobs: LocalBlobs,
    empty: RedisIndex,
    other: LocalBlobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")

    async def die(*_: object) -> None:
        raise StoreUnavailable("killed")

    with monkeypatch.context() as patched:
        patched.setattr("adapters_store.backup.restore_index.IndexWriter.end", die)
        removed = 0

        async def leave(writer: object) -> None:
            nonlocal removed
            removed += 1

        patched.setattr("adapters_store.backup.restore_index.IndexWriter.remove_leftovers", leave)
        with pytest.raises(StoreUnavailable):
            await restore_backup(empty, other, tmp_path / "file")
    assert removed == 2
    assert await empty.list_tasks(10) == ([], False)
    assert await empty.find_customization("u", "a") is None
    assert await empty.api_keys.find(hash_of(text)) is None
    assert await empty.history("a", 10) == []
    assert len(await dump(empty)) > 10
    await restore_backup(empty, other, tmp_path / "file")
    assert await dump(empty) == await dump(index)


async def test_a_restore_that_fails_removes_what_it_wrote(
    index: RedisIndex,
    blobs: LocalBlobs,
    empty: RedisIndex,
    other: LocalBlobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(*_: object) -> None:
        raise StoreUnavailable("away")

    await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")
    monkeypatch.setattr("adapters_store.backup.restore_index.IndexWriter.end", fail)
    with pytest.raises(StoreUnavailable):
        await restore_backup(empty, other, tmp_path / "file")
    assert set(await dump(empty)) == {"schema"}


async def test_a_store_of_another_index_is_restored_into_only_if_it_is_adopted(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")
    for owner in (blobs, other):
        owner.own(index.index_id)
        before = stored(owner)
        with pytest.raises(Conflict, match="--adopt") as refused:
            await restore_backup(empty, owner, tmp_path / "file")
        assert refused.value.code == "store_of_another_index"
        assert (owner.owner(), stored(owner)) == (index.index_id, before)
        assert set(await dump(empty)) == {"schema"}
    await restore_backup(empty, other, tmp_path / "file", adopt=True)
    assert other.owner() == empty.index_id
    with pytest.raises(Conflict, match="not empty") as refused:  # whoever's the store is
        await restore_backup(empty, blobs, tmp_path / "file", adopt=True)
    assert refused.value.code == "index_not_empty"
    assert blobs.owner() == index.index_id


async def test_a_restore_into_a_full_redis_leaves_nothing(
    index: RedisIndex, blobs: LocalBlobs, own_redis: PrivateRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")
    full = await RedisIndex.connect(own_redis.url)

    async def fill_up(writer: IndexWriter) -> None:
        assert len(await dump(full)) > 10, "much is written already"
        await writer.redis.config_set("maxmemory", 1)
        await finish(writer)

    finish = IndexWriter.finish_sums
    monkeypatch.setattr(IndexWriter, "finish_sums", fill_up)
    with pytest.raises(StoreFull):
        await restore_backup(full, LocalBlobs(tmp_path / "other"), tmp_path / "file")
    assert set(await dump(full)) == {"schema"}
    await full.close()


async def test_a_missing_blob_is_named_and_no_file_is_left(
    index: RedisIndex, blobs: LocalBlobs, tmp_path: Path
) -> None:
    version, _ = await publish_text(index, blobs, "t", "a")
    sha256 = version.files["adapter_config.json"].sha256
    blobs.delete(sha256)
    with pytest.raises(VersionCorrupt, match=sha256):
        await write_backup(index, blobs, tmp_path / "file")
    assert not [name for name in os.listdir(tmp_path) if "file" in name]


async def test_a_file_that_garbage_collection_took_meanwhile_says_run_again(
    index: RedisIndex, blobs: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters_store.backup import backup

    await publish_text(index, blobs, "t", "a")
    blobs.own(index.index_id)
    add = backup._add_blob

    async def collect_first(*arguments: Any) -> None:
        if await index.count_tasks():
            await index.delete_task("t")
            await GarbageCollector(index.garbage, blobs, 0).collect()
        await add(*arguments)

    monkeypatch.setattr(backup, "_add_blob", collect_first)
    with pytest.raises(Conflict, match="run it again") as changed:
        await write_backup(index, blobs, tmp_path / "file")
    assert changed.value.code == "changed_meanwhile"
    assert not [name for name in os.listdir(tmp_path) if "file" in name]


async def test_a_file_that_exists_is_not_replaced(index: RedisIndex, blobs: LocalBlobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        await write_backup(index, blobs, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


async def test_garbage_is_not_collected_during_a_restore(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")
    collector = GarbageCollector(empty.garbage, other, 0)

    class Slow(LocalBlobs):
        def put(self, path: Path) -> FileRecord:
            record = super().put(path)
            with pytest.raises(Conflict, match="collecting garbage"):
                asyncio.run_coroutine_threadsafe(collector.collect(), loop).result()
            return record

    loop = asyncio.get_running_loop()
    await restore_backup(empty, Slow(tmp_path / "other"), tmp_path / "file")
    assert (await collector.collect()).unnamed == 0
    async with empty.garbage.turn():
        with pytest.raises(Conflict, match="garbage"):
            await restore_backup(empty, other, tmp_path / "file")


async def test_blobs_that_a_dead_collector_may_yet_lose_are_not_named(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    await fill(index, blobs)
    await write_backup(index, blobs, tmp_path / "file")
    sha256 = min(stored(blobs))
    await empty.garbage.condemn([sha256])
    await empty.garbage.claim([sha256])
    with pytest.raises(Conflict, match="run the restore again") as refused:
        await restore_backup(empty, other, tmp_path / "file")
    assert refused.value.code == "blobs_deleting"
    assert await empty.count_tasks() == 0
    await empty.garbage.deleted([sha256])
    await restore_backup(empty, other, tmp_path / "file")

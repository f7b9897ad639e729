"""Garbage collection: what nobody needs goes after its grace; what a version or an upload needs never does."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from pathlib import Path

import pytest

from adapters_store import (
    Conflict,
    GarbageCollector,
    LocalBlobs,
    NewCustomization,
    RedisIndex,
    StoreUnavailable,
    TaskSettings,
    adapter_digest,
)
from adapters_store.garbage import ABANDONED
from adapters_store.records import FileRecord
from tests.store.samples import customize_text, eventually, publish_text, put, stored

pytestmark = pytest.mark.anyio

LONG = 3600.0  # a grace that no test waits for


@pytest.fixture(autouse=True)
def owned(index: RedisIndex, blobs: LocalBlobs) -> None:
    blobs.own(index.index_id)


async def test_blobs_of_deleted_versions_go_and_all_others_stay(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector
) -> None:
    kept: set[str] = set()
    for task in ("a", "tenant/b"):
        for text in ("one", "two"):
            version, _ = await publish_text(index, blobs, task, task + text)
            if text == "two":
                kept |= {file.sha256 for file in version.files.values()}
        await index.delete_version(task, 1)
    kept |= await customize_text(index, blobs, "u", "a", "mine")
    gone = stored(blobs) - kept
    report = await collector.collect()
    assert stored(blobs) == kept
    assert (report.stored, report.unnamed, report.due) == (len(kept | gone), len(gone), len(gone))
    assert report.unnamed_bytes == report.due_bytes > 0
    assert await collector.collect() == (len(kept), 0, 0, 0, 0)


async def test_a_customization_s_blobs_go_with_its_task_or_its_replacement(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector
) -> None:
    await publish_text(index, blobs, "t", "task")
    task_s = stored(blobs)
    first = await customize_text(index, blobs, "u", "t", "first")
    second = await customize_text(index, blobs, "u", "t", "second")
    await collector.collect()
    assert stored(blobs) == task_s | second
    assert not (first - second) & stored(blobs)
    await index.delete_task("t")
    await collector.collect()
    assert stored(blobs) == set()


async def test_grace_counts_from_when_a_blob_was_first_seen_to_be_of_no_use(
    index: RedisIndex, blobs: LocalBlobs
) -> None:
    sha256 = put(blobs, b"orphan")
    patient = GarbageCollector(index.garbage, blobs, LONG)
    for _ in range(2):
        report = await patient.collect()
        assert (report.unnamed, report.due) == (1, 0)
    assert stored(blobs) == {sha256}
    assert await index.redis.zincrby(index.keys.condemned, -LONG, sha256)
    assert (await patient.collect()).due == 1
    assert stored(blobs) == set()


async def test_a_dry_run_says_what_a_run_does_and_changes_nothing(index: RedisIndex, blobs: LocalBlobs) -> None:
    await publish_text(index, blobs, "t", "a")
    put(blobs, b"orphan")
    for grace in (LONG, 0.0):
        collector = GarbageCollector(index.garbage, blobs, grace)
        foreseen = await collector.survey()
        assert len(stored(blobs)) == foreseen.stored == 4
        assert await index.redis.zcard(index.keys.condemned) == (0 if grace else 1)
        assert await collector.collect() == foreseen
    assert len(stored(blobs)) == 3


async def test_an_upload_that_begins_before_and_ends_after_a_deletion_is_whole(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector, tmp_path: Path
) -> None:
    """The collector runs, to its end, between the upload's put and its name: the upload puts its files again."""
    put_once = asyncio.Event()

    class Slow(LocalBlobs):
        def put(self, path: Path) -> FileRecord:
            record = super().put(path)
            if path.name == "adapter_model.safetensors" and not put_once.is_set():
                asyncio.run_coroutine_threadsafe(between(), loop).result()
            return record

    async def between() -> None:
        put_once.set()
        await collector.collect()
        assert (await collector.collect()).stored == 0  # all that the upload has put is gone again

    loop = asyncio.get_running_loop()
    slow = Slow(tmp_path / "blobs")
    version, _ = await publish_text(index, slow, "t", "a")
    assert put_once.is_set()
    for file in version.files.values():
        blobs.read(file.sha256)
    assert (await collector.collect()).unnamed == 0


async def test_an_upload_waits_while_its_blob_is_being_deleted(
    index: RedisIndex, blobs: LocalBlobs, tmp_path: Path
) -> None:
    deleting, go_on = threading.Event(), threading.Event()

    class Slow(LocalBlobs):
        def delete(self, *sha256: str) -> None:
            deleting.set()
            assert go_on.wait(60)
            super().delete(*sha256)

    await publish_text(index, blobs, "t", "a")
    await index.delete_task("t")
    run = asyncio.create_task(GarbageCollector(index.garbage, Slow(tmp_path / "blobs"), 0).collect())
    await asyncio.to_thread(deleting.wait, 60)
    upload = asyncio.create_task(publish_text(index, blobs, "t", "a"))
    done, _ = await asyncio.wait([upload], timeout=0.3)
    assert not done
    go_on.set()
    version, _ = await upload
    await run
    for file in version.files.values():
        blobs.read(file.sha256)


async def test_an_upload_whose_blob_stays_in_deletion_is_told_to_come_back(
    index: RedisIndex, blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.publish.RETRY_SECONDS", 0.1)
    sha256 = hashlib.sha256(b"about").hexdigest()  # the README of `publish_text`
    await index.garbage.condemn([sha256])
    assert await index.garbage.claim([sha256]) == [sha256]
    with pytest.raises(StoreUnavailable, match="upload it again"):
        await publish_text(index, blobs, "t", "a")
    with pytest.raises(StoreUnavailable, match="upload it again"):
        await publish_text(index, blobs, "t", "a")
    assert await index.count_tasks() == 0
    await index.garbage.deleted([sha256])
    await publish_text(index, blobs, "t", "a")


async def test_naming_a_condemned_blob_saves_it_also_from_a_collector_that_looked_before(
    index: RedisIndex, blobs: LocalBlobs
) -> None:
    await publish_text(index, blobs, "t", "a")
    names = stored(blobs)
    await index.delete_task("t")
    await index.garbage.condemn(sorted(names))
    due = await index.garbage.condemned(await index.garbage.now())
    assert set(due) == names
    await publish_text(index, blobs, "t", "a")
    assert await index.garbage.claim(due) == []


async def test_what_a_collector_that_died_had_claimed_is_deleted_by_a_later_one(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector
) -> None:
    sha256 = put(blobs, b"orphan")
    await index.garbage.condemn([sha256])
    await index.garbage.claim([sha256])
    await collector.collect()
    assert stored(blobs) == {sha256}  # its own collector may be about to delete it
    assert await index.redis.zincrby(index.keys.deleting, ABANDONED, sha256)  # as if that many seconds had passed
    await collector.collect()
    assert stored(blobs) == set()
    assert await index.garbage.abandoned(await index.garbage.now()) == []


async def test_one_collector_at_a_time(index: RedisIndex, collector: GarbageCollector) -> None:
    async with index.garbage.turn():
        with pytest.raises(Conflict, match="another server or command") as taken:
            await collector.collect()
        assert taken.value.code == "garbage_locked"
        await collector.survey()
    await collector.collect()


async def test_a_collector_that_lost_its_turn_deletes_nothing_more(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(blobs, b"orphan")
    condemned = index.garbage.condemned

    async def lose(before: float) -> list[str]:
        await index.redis.set(index.keys.garbage_lock, "another's")
        return await condemned(before)

    monkeypatch.setattr(index.garbage, "condemned", lose)
    with pytest.raises(StoreUnavailable, match="turn"):
        await collector.collect()
    assert len(stored(blobs)) == 1
    assert await index.redis.get(index.keys.garbage_lock) == "another's"


async def test_a_deletion_that_begins_too_late_is_left_to_others(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(blobs, b"orphan")
    monkeypatch.setattr("adapters_store.garbage.DELETED_WITHIN", -1.0)
    with pytest.raises(StoreUnavailable, match="too long"):
        await collector.collect()
    assert len(stored(blobs)) == 1


async def test_the_servers_of_an_index_collect_once_an_hour_together(
    index: RedisIndex, blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await index.garbage.is_time(3600)
    assert not await index.garbage.is_time(3600)
    await index.redis.delete(index.keys.garbage_pause)
    monkeypatch.setattr("adapters_store.garbage.INTERVAL", 0.06)
    put(blobs, b"orphan")
    servers = [GarbageCollector(index.garbage, blobs, 0) for _ in range(2)]
    running = [asyncio.create_task(server.run_forever()) for server in servers]
    await eventually(lambda: not stored(blobs))
    for task in running:
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.2)
        assert task.cancelled()


async def test_uploads_and_deletions_beside_a_collector_without_grace_leave_every_version_whole(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector
) -> None:
    async def churn(number: int) -> None:
        for step in range(6):
            version, _ = await publish_text(index, blobs, f"task-{number}", f"text-{(number + step) % 3}")
            for file in version.files.values():
                blobs.read(file.sha256)
            if step % 2:
                await index.delete_task(f"task-{number}")

    work = asyncio.gather(*(churn(number) for number in range(6)))
    runs = 0
    while not work.done():
        await collector.collect()
        runs += 1
    await work
    await collector.collect()
    assert runs > 1
    assert stored(blobs) == set()


async def test_all_names_are_read_though_they_fill_many_pages(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector
) -> None:
    def customization(content: bytes) -> NewCustomization:
        files = {"adapter_config.json": FileRecord(hashlib.sha256(content).hexdigest(), len(content))}
        return NewCustomization(
            digest=adapter_digest(files),
            method="lora",
            parameters=1,
            bytes=1,
            files=files,
            base_fingerprint="base",
            mode="compose",
        )

    contents = [str(number).encode() for number in range(1200)]
    for number in range(130):
        await index.put_task(f"task-{number}", TaskSettings())
    await asyncio.gather(
        *(index.put_customization(f"u{number}", "task-7", customization(text)) for number, text in enumerate(contents))
    )
    named: set[str] = set()
    async for page in index.garbage.named():
        named.update(page)
    assert named == {hashlib.sha256(text).hexdigest() for text in contents}
    put(blobs, contents[-1])
    assert await collector.collect() == (1, 0, 0, 0, 0)


async def test_a_listing_skips_stray_files_and_what_vanishes_meanwhile(blobs: LocalBlobs, tmp_path: Path) -> None:
    kept = put(blobs, b"kept")
    (tmp_path / "blobs" / "blobs" / ".DS_Store").write_bytes(b"stray")
    # A link without target is a name that the folder has and `stat` finds no more.
    (blobs.path(kept).parent / ("0" * 64)).symlink_to(tmp_path / "nothing")
    assert stored(blobs) == {kept}


async def test_a_turn_is_kept_while_its_holder_is_busy(index: RedisIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_store.index.garbage.LOCK_SECONDS", 0.8)
    async with index.garbage.turn() as turn:
        await asyncio.sleep(1.6)
        await turn.renew()
    async with index.garbage.turn():
        pass

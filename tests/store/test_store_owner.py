"""A store of files belongs to one index: only its own collectors delete from it, unless another one adopts it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from adapters_store import Conflict, GarbageCollector, LocalBlobs, RedisIndex, StoreUnavailable
from tests.store.samples import eventually, publish_text, put, stored

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def owned(index: RedisIndex, blobs: LocalBlobs) -> None:
    blobs.own(index.index_id)


async def test_a_collector_of_another_index_deletes_nothing_unless_it_adopts_the_store(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector, redis_url: str, namespace: str
) -> None:
    await publish_text(index, blobs, "t", "a")
    before = stored(blobs)
    other = await RedisIndex.connect(redis_url, namespace=f"{namespace}-other")
    try:
        await publish_text(other, blobs, "t", "a")  # that it names some of them makes them not its own
        await other.delete_task("t")
        stranger = GarbageCollector(other.garbage, blobs, 0)
        for call in (stranger.collect, stranger.survey):
            with pytest.raises(Conflict, match=r"--redis-url.*--store.*medley gc --adopt") as refused:
                await call()
            assert refused.value.code == "store_of_another_index"
        assert (await stranger.survey(adopt=True)).due == len(before)
        assert blobs.owner() == index.index_id
        assert stored(blobs) == before
        assert (await stranger.collect(adopt=True)).due == len(before)
        assert blobs.owner() == other.index_id
        with pytest.raises(Conflict):
            await collector.collect()
    finally:
        await other.close()


@pytest.mark.parametrize("owned_before", [True, False])
async def test_after_redis_was_emptied_the_files_stay(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector, tmp_path: Path, owned_before: bool
) -> None:
    await publish_text(index, blobs, "t", "a")
    before = stored(blobs)
    if not owned_before:
        (tmp_path / "blobs" / "index_id").unlink()
    await index.redis.delete(*[key async for key in index.redis.scan_iter(match=f"{index.keys.namespace}:*")])
    with pytest.raises(StoreUnavailable, match="emptied"):
        await collector.collect()
    await index.identify()
    with pytest.raises(Conflict, match="--adopt"):
        await collector.collect()
    assert stored(blobs) == before


async def test_a_store_without_owner_is_claimed_if_it_is_empty_or_the_index_names_a_blob(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector, tmp_path: Path
) -> None:
    for publish in (False, True):
        (tmp_path / "blobs" / "index_id").unlink()
        if publish:
            await publish_text(index, blobs, "t", "a")
        await collector.survey()
        assert blobs.owner() is None
        await collector.collect()
        assert blobs.owner() == index.index_id


async def test_a_store_adopted_by_another_during_a_collection_loses_nothing_more(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(blobs, b"orphan")
    condemned = index.garbage.condemned

    async def adopted(before: float) -> list[str]:
        blobs.own("another")
        return await condemned(before)

    monkeypatch.setattr(index.garbage, "condemned", adopted)
    with pytest.raises(Conflict, match="another index"):
        await collector.collect()
    assert len(stored(blobs)) == 1


async def test_a_server_logs_once_that_the_store_is_another_s_and_survives_errors_of_the_disk(
    index: RedisIndex, blobs: LocalBlobs, collector: GarbageCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.garbage.INTERVAL", 0.06)
    put(blobs, b"orphan")
    blobs.own("another")
    owner, asked = blobs.owner, 0

    def failing_at_first() -> str | None:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise OSError("the disk is away")
        return owner()

    monkeypatch.setattr(blobs, "owner", failing_at_first)
    with capture_logs() as logs:
        running = asyncio.create_task(collector.run_forever())
        await eventually(lambda: asked > 5)
        assert [entry["log_level"] for entry in logs] == ["warning", "error"]
        blobs.own(index.index_id)
        await eventually(lambda: not stored(blobs))
    while not running.done():
        running.cancel()
        await asyncio.wait([running], timeout=0.2)

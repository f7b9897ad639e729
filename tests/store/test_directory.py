"""The mirror: what it answers, how it follows changes, and what it does without Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis import Redis

from adapters_store import Conflict, NotFound, PrivateRedis, RedisIndex, StoreUnavailable, TaskDirectory
from adapters_store.mirror import directory
from adapters_store.records import TaskSettings
from tests.store.samples import eventually, new_version

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def mirror(url: str) -> AsyncIterator[tuple[RedisIndex, TaskDirectory]]:
    index = await RedisIndex.connect(url)
    mirrored = TaskDirectory(index)
    await mirrored.start()
    yield index, mirrored
    await mirrored.stop()
    await index.close()


def active(tasks: TaskDirectory, name: str) -> int | None:
    task = tasks.get(name)
    return None if task is None else task.active


async def test_it_loads_every_task_also_over_several_pages(
    index: RedisIndex, directory: TaskDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.mirror.directory.PAGE", 3)
    names = [f"t{i}" for i in range(7)]
    for name in names:
        await index.publish(name, new_version(name), activate=True)
    late = TaskDirectory(index)
    await late.start()
    assert [(await late.resolve(name))[1].digest for name in names] == names
    await late.stop()


async def test_another_servers_changes_arrive_by_the_feed(
    index: RedisIndex, directory: TaskDirectory, redis_url: str, namespace: str
) -> None:
    other = await RedisIndex.connect(redis_url, namespace=namespace)
    await other.publish("t", new_version("a"), activate=True)
    await eventually(lambda: active(directory, "t") == 1)
    await other.publish("t", new_version("b"), activate=False)
    await other.activate("t", 2)
    await eventually(lambda: active(directory, "t") == 2)
    await other.put_task("t", TaskSettings(description="new"))
    await eventually(lambda: (task := directory.get("t")) is not None and task.settings.description == "new")
    await other.delete_task("t")
    await eventually(lambda: directory.get("t") is None)
    await other.close()


async def test_a_writer_sees_its_own_change_at_once(index: RedisIndex) -> None:
    writer = TaskDirectory(index)
    await writer.start()
    await writer.stop()  # so that no feed can bring it
    await index.publish("t", new_version("a"), activate=True)
    await writer.refresh(["t"])
    assert (await writer.resolve("t"))[1].number == 1
    await index.delete_task("t")
    await writer.refresh(["t"])
    assert writer.get("t") is None


async def test_names_select_the_active_or_a_numbered_version(index: RedisIndex, directory: TaskDirectory) -> None:
    await index.publish("t", new_version("a"), activate=True)
    await index.publish("t", new_version("b"), activate=True)
    await directory.refresh(["t"])
    assert [(await directory.resolve(name))[1].number for name in ("t", "t@1", "t@2")] == [2, 1, 2]
    for name in ("x", "x@1", "t@3", "t@0", "t@01", "t@", "t@x", "t@canary", "t@1@1"):
        with pytest.raises(NotFound):
            await directory.resolve(name)


async def test_a_deleted_version_is_forgotten_even_if_it_was_asked_for(
    index: RedisIndex, directory: TaskDirectory
) -> None:
    for text in "ab":
        await index.publish("t", new_version(text), activate=True)
    await directory.refresh(["t"])
    await directory.resolve("t@1")
    await index.delete_version("t", 1)
    await directory.refresh(["t"])
    with pytest.raises(NotFound):
        await directory.resolve("t@1")


async def test_a_task_without_an_active_version_says_so(index: RedisIndex, directory: TaskDirectory) -> None:
    await index.publish("t", new_version("a"), activate=False)
    await directory.refresh(["t"])
    with pytest.raises(Conflict) as refused:
        await directory.resolve("t")
    assert refused.value.code == "no_active_version"


async def test_without_redis_known_tasks_resolve_and_unknown_ones_are_not_denied(own_redis: PrivateRedis) -> None:
    async with mirror(own_redis.url) as (index, tasks):
        for text in "abc":
            await index.publish("t", new_version(text), activate=True)
        await index.put_task("z", TaskSettings())
        await eventually(lambda: tasks.get("z") is not None)  # so that the feed has no more to bring
        await tasks.resolve("t@1")
        own_redis.stop()
        await eventually(lambda: not tasks.available)
        assert [(await tasks.resolve(name))[1].number for name in ("t", "t@1")] == [3, 1]
        for name in ("unknown", "t@2"):
            with pytest.raises(StoreUnavailable):
                await tasks.resolve(name)
        own_redis.start()
        await eventually(lambda: tasks.available)
        with pytest.raises(NotFound):
            await tasks.resolve("unknown")


async def test_what_happened_while_it_was_cut_off_is_caught_up_without_reading_everything(
    own_redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mirror(own_redis.url) as (_, tasks):
        own_redis.stop()
        await eventually(lambda: not tasks.available)
        monkeypatch.setattr(tasks._reader, "list_states", None)  # reading everything would fail
        own_redis.start()
        other = await RedisIndex.connect(own_redis.url)
        await other.publish("t", new_version("a"), activate=True)
        await other.close()
        await eventually(lambda: active(tasks, "t") == 1 and tasks.available)


async def test_a_feed_trimmed_past_its_position_makes_it_read_everything(own_redis: PrivateRedis) -> None:
    async with mirror(own_redis.url) as (index, tasks):
        await index.publish("gone", new_version("a"), activate=True)
        await eventually(lambda: active(tasks, "gone") == 1)
        own_redis.stop()
        await eventually(lambda: not tasks.available)
        own_redis.start()
        with Redis.from_url(own_redis.url) as redis, redis.pipeline() as change:
            # As if so much had happened meanwhile that no entry of these changes is left.
            change.delete("medley:task:gone").zrem("medley:tasks", "/gone")
            change.xadd("medley:feed", {"kind": "task_put", "task": "other"})
            change.xtrim("medley:feed", maxlen=1, approximate=False)
            change.execute()
        await eventually(lambda: tasks.available and tasks.get("gone") is None)


@pytest.mark.parametrize("refilled", [False, True])
async def test_an_emptied_redis_is_noticed_also_when_no_connection_broke(
    own_redis: PrivateRedis, refilled: bool
) -> None:
    async with mirror(own_redis.url) as (index, tasks):
        await index.publish("t", new_version("a"), activate=True)
        await eventually(lambda: active(tasks, "t") == 1)
        before = index.index_id
        with Redis.from_url(own_redis.url) as redis:
            redis.flushall()
        if refilled:
            other = await RedisIndex.connect(own_redis.url)
            await other.publish("u", new_version("b"), activate=True)
            await other.close()
        await eventually(lambda: tasks.get("t") is None and tasks.available)
        assert index.index_id != before
        assert active(tasks, "u") == (1 if refilled else None)


async def test_another_index_id_alone_makes_it_read_everything(own_redis: PrivateRedis) -> None:
    async with mirror(own_redis.url) as (index, tasks):
        await index.publish("gone", new_version("a"), activate=True)
        await eventually(lambda: active(tasks, "gone") == 1)
        told = []
        tasks.watch(lambda: told.append(active(tasks, "gone")))
        with Redis.from_url(own_redis.url) as redis, redis.pipeline() as change:
            change.delete("medley:task:gone").zrem("medley:tasks", "/gone").set("medley:index_id", "another").execute()
        await eventually(lambda: tasks.get("gone") is None and index.index_id == "another")
        await eventually(lambda: told[-1:] == [None])


async def test_more_changes_than_one_batch_are_all_followed(
    index: RedisIndex, directory: TaskDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.index.feed.BATCH", 2)
    for i in range(9):
        await index.publish(f"t{i}", new_version("a"), activate=True)
    await eventually(lambda: all(active(directory, f"t{i}") == 1 for i in range(9)))


def test_the_feed_is_waited_for_less_long_than_a_call_may_take() -> None:
    from adapters_store.index import connection

    turn = 1.0  # of the private Redis' own clock, at whose end it sees that a wait is over
    assert directory.FEED_WAIT + turn < connection.CALL_TIMEOUT


async def test_a_change_and_the_end_wake_the_follower_whatever_it_would_wait(
    own_redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.index.connection.CALL_TIMEOUT", 7200.0)
    monkeypatch.setattr("adapters_store.mirror.directory.FEED_WAIT", 3600.0)
    told = []
    async with asyncio.timeout(60), mirror(own_redis.url) as (index, tasks):
        tasks.watch(lambda: told.append(active(tasks, "t")))
        await index.publish("t", new_version("a"), activate=True)
        await eventually(lambda: active(tasks, "t") == 1)
        await tasks.stop()
        assert told == [1], "who watches sees the task as it is then"
        assert not index.redis.connection_pool._in_use_connections, "the feed's connection is back in the pool"
        assert await index.count_tasks() == 1


async def test_its_pages_are_the_index_s(index: RedisIndex) -> None:
    for name in ("b", "a-1", "acme/b", "acme/a", "acme/a-1", "acm/z", "acme-2/y", "Z"):
        await index.publish(name, new_version(name), activate=True)
    mirrored = TaskDirectory(index)
    await mirrored.start()
    for tenant in ("", "acme", "acm", "nobody"):
        whole, _ = await index.list_states(100, tenant=tenant)
        for limit in (1, 2, 100):
            for after in (None, *(state.task.name for state in whole)):
                assert mirrored.list_states(limit, after, tenant=tenant) == await index.list_states(
                    limit, after, tenant=tenant
                )
    assert [state.task.name for state in mirrored.states(["acme/b", "nobody", "Z"])] == ["acme/b", "Z"]
    await mirrored.stop()

"""The index: what each change leaves behind, and what two changes at once do."""

from __future__ import annotations

import asyncio

import pytest
from redis import Redis

from adapters_store import Conflict, NotFound, PrivateRedis, RedisIndex, RedisMisconfigured, StoreUnavailable
from adapters_store.index.connection import shown
from adapters_store.records import TaskSettings
from tests.store.samples import new_version

pytestmark = pytest.mark.anyio


async def test_settings_are_created_and_replaced_and_the_active_version_stays(index: RedisIndex) -> None:
    settings = TaskSettings(description="d", template="{{ input }}", defaults={"top_p": 0.5}, labels={"a": "b"})
    created = await index.put_task("t", settings)
    assert (created.settings, created.active, created.previous) == (settings, None, None)
    await index.publish("t", new_version("a"), activate=True)
    changed = await index.put_task("t", TaskSettings(description="e"))
    assert (changed.settings, changed.active) == (TaskSettings(description="e"), 1)
    assert changed.created == created.created
    assert changed.updated > created.updated


async def test_a_published_version_is_read_back_as_it_was_given(index: RedisIndex) -> None:
    new = new_version("a")
    version, is_new = await index.publish("t", new, activate=True)
    assert (is_new, version.task, version.number, version.files, version.rank) == (True, "t", 1, new.files, 2)
    assert await index.get_version("t", 1) == version
    assert await index.list_versions("t") == [version]
    assert await index.read_tasks(["t", "none"]) == [
        (await index.get_task("t"), version, None),
        None,
    ]


async def test_the_same_content_again_is_the_existing_version_and_can_be_activated(index: RedisIndex) -> None:
    await index.publish("t", new_version("a"), activate=False)
    assert (await index.get_task("t")).active is None
    again, is_new = await index.publish("t", new_version("a"), activate=True)
    assert (again.number, is_new) == (1, False)
    assert (await index.get_task("t")).active == 1


async def test_the_same_content_for_another_base_is_another_version(index: RedisIndex) -> None:
    await index.publish("t", new_version("a"), activate=True)
    other, is_new = await index.publish("t", new_version("a", base="other"), activate=True)
    assert (other.number, is_new) == (2, True)


async def test_version_numbers_are_never_used_again_after_deletion_of_version_or_task(index: RedisIndex) -> None:
    for text in "ab":
        await index.publish("t", new_version(text), activate=text == "a")
    await index.delete_version("t", 2)
    version, is_new = await index.publish("t", new_version("b"), activate=True)
    assert (version.number, is_new) == (3, True)
    await index.delete_task("t")
    version, is_new = await index.publish("t", new_version("b"), activate=True)
    assert (version.number, is_new) == (4, True)
    assert (await index.get_task("t")).previous is None


async def test_previous_is_what_was_active_before_and_skips_deleted_versions(index: RedisIndex) -> None:
    for text in "abc":
        await index.publish("t", new_version(text), activate=True)
    assert (await index.get_task("t")).previous == 2
    await index.delete_version("t", 2)
    assert (await index.get_task("t")).previous == 1
    rolled_back = await index.activate("t", 1)
    assert (rolled_back.active, rolled_back.previous) == (1, 3)


async def test_activating_the_active_version_changes_nothing(index: RedisIndex) -> None:
    for text in "ab":
        await index.publish("t", new_version(text), activate=True)
    before = await index.get_task("t")
    assert await index.activate("t", 2) == before


async def test_the_active_version_cannot_be_deleted(index: RedisIndex) -> None:
    await index.publish("t", new_version("a"), activate=True)
    with pytest.raises(Conflict, match="active") as refused:
        await index.delete_version("t", 1)
    assert refused.value.code == "version_active"
    assert len(await index.list_versions("t")) == 1


async def test_a_deleted_task_leaves_only_its_last_number_revision_and_history(
    index: RedisIndex, redis_url: str, namespace: str
) -> None:
    await index.publish("t", new_version("a"), activate=True)
    await index.touch({"t": 5.0})
    await index.delete_task("t")
    await index.touch({"t": 6.0})
    with Redis.from_url(redis_url) as redis:
        left = {key.decode().split(":", 1)[1] for key in redis.keys(f"{namespace}:*")}
    assert left == {"index_id", "schema", "feed", "numbers", "revisions", "history:t"}


async def test_what_is_not_there_is_not_found(index: RedisIndex) -> None:
    await index.publish("t", new_version("a"), activate=True)
    for call in (
        index.get_task("x"),
        index.list_versions("x"),
        index.delete_task("x"),
        index.activate("x", 1),
        index.activate("t", 9),
        index.get_version("t", 9),
        index.delete_version("t", 9),
    ):
        with pytest.raises(NotFound):
            await call


async def test_tasks_are_listed_in_order_in_pages(index: RedisIndex) -> None:
    names = ["b", "a:versions", "a", "Z", "a.b"]
    for name in names:
        await index.put_task(name, TaskSettings())
    first, more = await index.list_tasks(3)
    second, end = await index.list_tasks(3, after=first[-1].name)
    assert [task.name for task in [*first, *second]] == sorted(names)
    assert (more, end) == (True, False)
    assert await index.count_tasks() == 5


async def test_ids_that_look_like_parts_of_keys_do_not_meet(index: RedisIndex) -> None:
    await index.publish("t", new_version("a"), activate=True)
    for name in ("versions:t", "t:versions", "task:t", "digests:t"):
        await index.publish(name, new_version("b"), activate=True)
    assert [version.digest for version in await index.list_versions("t")] == ["a"]


async def test_publishes_of_one_task_at_once_are_all_kept_numbered_and_one_is_active(
    index: RedisIndex, redis_url: str, namespace: str
) -> None:
    other = await RedisIndex.connect(redis_url, namespace=namespace)
    assert other.index_id == index.index_id
    calls = [
        server.publish("t", new_version(f"{server is other}{i}"), activate=True)
        for i in range(20)
        for server in (index, other)
    ]
    published = [version for version, is_new in await asyncio.gather(*calls) if is_new]
    assert sorted(version.number for version in published) == list(range(1, 41))
    assert await index.list_versions("t") == sorted(published, key=lambda version: version.number)
    assert (await index.get_task("t")).active in range(1, 41)
    await other.close()


async def test_the_same_content_published_at_once_is_one_version(index: RedisIndex) -> None:
    results = await asyncio.gather(*(index.publish("t", new_version("a"), activate=True) for _ in range(20)))
    assert sum(is_new for _, is_new in results) == 1
    assert {version.number for version, _ in results} == {1}


async def test_last_use_never_goes_back(index: RedisIndex) -> None:
    await index.put_task("t", TaskSettings())
    assert await index.last_used("t") is None
    await index.touch({"t": 20.5})
    await index.touch({"t": 10.0})
    assert await index.last_used("t") == 20.5
    assert await index.last_uses(["none", "t"]) == [None, 20.5]
    assert await index.last_uses([]) == []


async def test_a_redis_that_may_evict_is_refused(own_redis: PrivateRedis) -> None:
    with Redis.from_url(own_redis.url) as redis:
        redis.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(RedisMisconfigured, match="noeviction"):
        await RedisIndex.connect(own_redis.url)


async def test_an_index_of_another_layout_is_refused(index: RedisIndex, redis_url: str, namespace: str) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.set(f"{namespace}:schema", "999")
    with pytest.raises(RedisMisconfigured, match=r"layout 999.*export.*--data-dir") as refused:
        await RedisIndex.connect(redis_url, namespace=namespace)
    assert redis_url.removeprefix("unix://") in str(refused.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://me:secret@host:6379/1", "redis://host:6379/1"),
        ("redis://:secret@host", "redis://host"),
        ("unix:///run/redis.sock?db=1&password=secret", "unix:///run/redis.sock?db=1"),
    ],
)
def test_no_password_is_shown(url: str, expected: str) -> None:
    assert shown(url) == expected


async def test_a_stopped_redis_is_unavailable_and_the_same_connection_serves_again(own_redis: PrivateRedis) -> None:
    index = await RedisIndex.connect(own_redis.url)
    await index.publish("t", new_version("a"), activate=True)
    own_redis.stop()
    for call in (index.ping(), index.get_task("t"), index.list_versions("t"), index.put_task("t", TaskSettings())):
        with pytest.raises(StoreUnavailable):
            await call
    own_redis.start()
    assert (await index.get_task("t")).active == 1
    await index.close()

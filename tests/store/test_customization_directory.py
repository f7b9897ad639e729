"""A server's memory of customizations: what it asks Redis for, what makes it forget, and what it does without Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis import Redis

from adapters_store import (
    Conflict,
    CustomizationDirectory,
    PrivateRedis,
    RedisIndex,
    StoreUnavailable,
    TaskDirectory,
    TaskSettings,
)
from adapters_store.records import Customization
from tests.store.samples import eventually, new_customization

pytestmark = pytest.mark.anyio


class CountingIndex(RedisIndex):
    """Knows which pairs were read, and can make a reader wait after its read."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.reads: list[tuple[str, str]] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def find_in_task(self, user: str, task: str) -> tuple[Customization | None, float | None]:
        found = await super().find_in_task(user, task)
        self.reads.append((user, task))
        await self.go_on.wait()
        return found


@pytest.fixture
async def counting(own_redis: PrivateRedis) -> AsyncIterator[CountingIndex]:
    index = await CountingIndex.connect(own_redis.url)
    assert isinstance(index, CountingIndex)
    for task in ("t", "x"):
        await index.put_task(task, TaskSettings())
    yield index
    await index.close()


@pytest.fixture
async def tasks(counting: CountingIndex) -> AsyncIterator[TaskDirectory]:
    tasks = TaskDirectory(counting)
    await tasks.start()
    yield tasks
    await tasks.stop()


@pytest.fixture
def known(counting: CountingIndex, tasks: TaskDirectory) -> CustomizationDirectory:
    known = CustomizationDirectory(counting, tasks)
    tasks.subscribe(known)
    return known


@pytest.fixture
async def other(own_redis: PrivateRedis, counting: CountingIndex) -> AsyncIterator[RedisIndex]:
    """Another server's index."""
    other = await RedisIndex.connect(own_redis.url)
    yield other
    await other.close()


async def comes_to_be(known: CustomizationDirectory, user: str, task: str, expected: Customization | None) -> None:
    for _ in range(2000):
        if await known.get(user, task) == expected:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to hold")


async def test_what_was_read_once_is_known_also_that_there_is_none(
    counting: CountingIndex, known: CustomizationDirectory, tasks: TaskDirectory
) -> None:
    put = await counting.put_customization("u", "t", new_customization("a"))
    for _ in range(3):
        assert await known.get("u", "t") == put
        assert await known.get("v", "t") is None
    # The feed may have brought the first change after the first read: then there is one read more.
    assert counting.reads.count(("v", "t")) <= 2
    assert counting.reads.count(("u", "t")) <= 2


async def test_another_servers_changes_arrive_by_the_feed(known: CustomizationDirectory, other: RedisIndex) -> None:
    assert await known.get("u", "t") is None
    put = await other.put_customization("u", "t", new_customization("a"))
    await comes_to_be(known, "u", "t", put)
    put = await other.put_customization("u", "t", new_customization("b"))
    await comes_to_be(known, "u", "t", put)
    await other.delete_customization("u", "t")
    await comes_to_be(known, "u", "t", None)
    for delete in (other.delete_user("u"), other.delete_task("t")):
        both = [await other.put_customization("u", task, new_customization("c")) for task in ("t", "x")]
        for customization in both:
            await comes_to_be(known, "u", customization.task, customization)
        await delete
        await comes_to_be(known, "u", "t", None)
    assert await known.get("u", "x") == both[1], "only what is of that task was forgotten"


async def test_a_writer_forgets_its_own_change_at_once(
    counting: CountingIndex, known: CustomizationDirectory, tasks: TaskDirectory
) -> None:
    assert await known.get("u", "t") is None
    put = await counting.put_customization("u", "t", new_customization("a"))
    known.forget("u", "t")
    assert await known.get("u", "t") == put


async def test_a_read_that_a_change_overtook_is_not_kept(
    counting: CountingIndex, known: CustomizationDirectory, other: RedisIndex
) -> None:
    counting.go_on.clear()
    reading = asyncio.create_task(known.get("u", "t"))
    await eventually(lambda: counting.reads == [("u", "t")])
    put = await other.put_customization("u", "t", new_customization("a"))
    await eventually(lambda: known._changes > 0)
    counting.go_on.set()
    assert await reading is None, "it was asked before the change"
    assert await known.get("u", "t") == put


async def test_without_redis_what_is_known_is_answered_and_nothing_else_is_guessed(
    own_redis: PrivateRedis, counting: CountingIndex, known: CustomizationDirectory, tasks: TaskDirectory
) -> None:
    put = await counting.put_customization("u", "t", new_customization("a"))
    await counting.put_task("last", TaskSettings())
    await eventually(lambda: tasks.get("last") is not None)  # so that the feed has no more to bring
    assert [await known.get(user, "t") for user in ("u", "v")] == [put, None]
    own_redis.stop()
    await eventually(lambda: not tasks.available)
    assert [await known.get(user, "t") for user in ("u", "v")] == [put, None]
    with pytest.raises(StoreUnavailable, match="'w'"):
        await known.get("w", "t")
    own_redis.start()
    await eventually(lambda: tasks.available)
    assert await known.get("w", "t") is None


async def test_a_lost_feed_makes_it_forget_everything(
    own_redis: PrivateRedis, known: CustomizationDirectory, tasks: TaskDirectory, counting: CountingIndex
) -> None:
    put = await counting.put_customization("u", "t", new_customization("a"))
    assert await known.get("u", "t") == put
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
    await comes_to_be(known, "u", "t", None)


async def test_it_holds_a_bounded_number_and_forgets_what_was_asked_for_longest_ago(
    counting: CountingIndex, known: CustomizationDirectory, tasks: TaskDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.mirror.customizations.HELD", 2)
    for user in ("a", "b", "a", "c"):  # b is now the one that was asked for longest ago
        await known.get(user, "t")
    counting.reads.clear()
    for user in ("a", "c", "b"):
        await known.get(user, "t")
    assert counting.reads == [("b", "t")]
    assert set(known._tasks_of) == {"b", "c"}
    assert known._users_of == {"t": {"b", "c"}}


async def test_what_went_with_a_deleted_task_is_not_taken_for_none(
    counting: CountingIndex,
    known: CustomizationDirectory,
    tasks: TaskDirectory,
    other: RedisIndex,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between a task's deletion by another server and the feed's word of it."""
    is_deaf = asyncio.Event()

    async def hear_nothing() -> None:
        is_deaf.set()
        await asyncio.sleep(0.01)

    held = await counting.put_customization("held", "t", new_customization("a"))
    await counting.put_customization("cold", "t", new_customization("b"))
    task = tasks.get("t")
    assert task is not None
    monkeypatch.setattr(tasks, "_take_news", hear_nothing)
    await is_deaf.wait()
    assert await known.get("held", "t", created=task.created) == held
    await other.delete_task("t")
    assert await known.get("held", "t", created=task.created) == held, "as before the deletion"
    for is_made_anew in (False, True):
        if is_made_anew:
            await other.put_task("t", TaskSettings())
        with pytest.raises(Conflict) as changed:
            await known.get("cold", "t", created=task.created)
        assert changed.value.code == "changed_meanwhile"
    later = await counting.get_task("t")
    assert await known.get("held", "t", created=later.created) is None, "it is no layer of the later task"

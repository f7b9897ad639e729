"""What an API key stored counts for it until it is deleted, by whomever; each change in one step with its cause."""

from __future__ import annotations

import msgspec
import pytest

from adapters_store import Conflict, NewCustomization, RedisIndex
from adapters_store.records import Change, FileRecord
from tests.store.samples import new_version

pytestmark = pytest.mark.anyio

BY_A, BY_B = Change("key-a", "r"), Change("key-b", "r")


async def stored(index: RedisIndex) -> tuple[int, int]:
    return await index.usage.stored_bytes("key-a"), await index.usage.stored_bytes("key-b")


def customization(size: int) -> NewCustomization:
    return NewCustomization(
        digest=f"{size:064x}",
        method="lora",
        parameters=1,
        bytes=size,
        rank=2,
        files={"adapter_config.json": FileRecord(f"{size:064x}", size)},
        base_fingerprint="b" * 64,
        mode="compose",
    )


async def test_a_version_counts_for_its_publisher_until_it_is_deleted(index: RedisIndex) -> None:
    await index.publish("t", new_version("a"), activate=True, change=BY_A)
    assert await stored(index) == (10, 0)
    await index.publish("t", new_version("a"), activate=True, change=BY_B)  # there already
    await index.publish("t", new_version("b"), activate=True, change=BY_B)
    assert await stored(index) == (10, 10)
    with pytest.raises(Conflict):
        await index.delete_version("t", 2, change=BY_A)
    assert await stored(index) == (10, 10)
    await index.delete_version("t", 1, change=BY_B)
    assert await stored(index) == (0, 10)


async def test_a_task_gives_all_back_that_was_stored_in_it_and_no_more(index: RedisIndex) -> None:
    for task in ("t", "x/t"):
        await index.publish(task, new_version("a"), activate=True, change=BY_A)
        await index.publish(task, new_version("b"), activate=True, change=BY_B)
        await index.put_customization("u", task, customization(7), change=BY_B)
    assert await stored(index) == (20, 34)
    await index.delete_task("t", change=BY_A)
    assert await stored(index) == (10, 17)
    await index.publish("t", new_version("a"), activate=True, change=BY_A)
    await index.delete_task("t")
    assert await stored(index) == (10, 17)


async def test_a_customization_counts_for_who_put_it_last(index: RedisIndex) -> None:
    await index.publish("t", new_version("a"), activate=True)
    await index.put_customization("1", "t", customization(7), change=BY_A)  # a user named like a version's number
    await index.put_customization("1", "t", customization(9), change=BY_A)
    assert await stored(index) == (9, 0)
    await index.put_customization("1", "t", customization(5), change=BY_B)
    assert await stored(index) == (0, 5)
    await index.delete_customization("1", "t")
    assert await stored(index) == (0, 0)


async def test_a_deleted_user_gives_all_back(index: RedisIndex) -> None:
    for task in ("t", "s"):
        await index.publish(task, new_version(task), activate=True)
        await index.put_customization("u", task, customization(7), change=BY_A)
        await index.put_customization("v", task, customization(3), change=BY_A)
    await index.delete_user("u", change=BY_B)
    assert await stored(index) == (6, 0)


async def test_what_nobody_with_a_key_stores_is_counted_nowhere(index: RedisIndex, namespace: str) -> None:
    await index.publish("t", new_version("a"), activate=True)
    await index.put_customization("u", "t", customization(7))
    left = [key async for key in index.redis.scan_iter(match=f"{namespace}:*")]
    assert not [key for key in left if any(part in key for part in ("stored", "paid", "bills", "payers"))]


async def test_nothing_is_left_of_what_was_counted(index: RedisIndex, namespace: str) -> None:
    new = msgspec.structs.replace(new_version("a"), files={"adapter_config.json": FileRecord("c" * 64, 10)})
    await index.publish("t", new, activate=True, change=BY_A)
    await index.put_customization("u", "t", customization(7), change=BY_B)
    await index.delete_task("t")
    left = [key async for key in index.redis.scan_iter(match=f"{namespace}:*")]
    assert not [key for key in left if any(part in key for part in ("stored", "paid", "bills"))]

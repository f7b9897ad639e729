"""Customizations in the index: what each change leaves behind, lists, deletions, and what a million would cost."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from redis import Redis

from adapters_store import Conflict, NotFound, RedisIndex, TaskSettings
from adapters_store.identity import ADAPTER_FILES, adapter_digest
from adapters_store.index.keys import Keys
from adapters_store.index.packed import FILE_NAMES, blobs_of, pack, paid_by, unpack
from adapters_store.records import Customization, FileRecord, NewCustomization
from tests.store.samples import new_customization, new_version

pytestmark = pytest.mark.anyio

BUDGET = 400
"""Bytes of Redis memory per customization beyond the ids."""


async def all_of_task(index: RedisIndex, task: str, limit: int) -> list[Customization]:
    found, cursor = await index.scan_customizations(task, limit)
    while cursor:
        page, cursor = await index.scan_customizations(task, limit, cursor)
        found += page
    return found


async def test_a_customization_is_read_back_as_it_was_given(index: RedisIndex) -> None:
    await index.put_task("t", TaskSettings())
    new = new_customization("a")
    put = await index.put_customization("u", "t", new)
    assert (put.user, put.task, put.made_against, put.digest, put.files) == ("u", "t", None, new.digest, new.files)
    assert await index.find_customization("u", "t") == put
    assert await index.find_customization("other", "t") is None
    assert await index.find_customization("u", "other") is None


async def test_the_later_one_replaces_the_earlier_and_says_which_version_it_was_made_against(index: RedisIndex) -> None:
    for text in "ab":
        await index.publish("t", new_version(text), activate=True)
    await index.put_customization("u", "t", new_customization("a"))
    again = await index.put_customization("u", "t", new_customization("b", mode="replace"))
    assert (again.made_against, again.mode) == (2, "replace")
    await index.rollback("t")
    assert await index.find_customization("u", "t") == again, "it belongs to the task, not to a version"
    assert await index.list_user_customizations("u", 9) == ([again], False)


async def test_there_is_none_over_a_task_that_is_not_there(index: RedisIndex) -> None:
    with pytest.raises(NotFound, match="task"):
        await index.put_customization("u", "t", new_customization("a"))
    assert await index.list_user_customizations("u", 9) == ([], False)


async def test_a_users_are_listed_by_task_in_pages(index: RedisIndex) -> None:
    names = ["a", "b", "b/a", "c"]
    for name in names:
        await index.put_task(name, TaskSettings())
        await index.put_customization("u", name, new_customization(name))
    await index.put_customization("other", "a", new_customization("x"))
    first, more = await index.list_user_customizations("u", 3)
    rest, end = await index.list_user_customizations("u", 3, first[-1].task)
    assert [found.task for found in [*first, *rest]] == names
    assert (more, end) == (True, False)


async def test_a_redis_that_has_forgotten_its_scripts_is_told_them_again(index: RedisIndex) -> None:
    await index.put_task("t", TaskSettings())
    put = await index.put_customization("u", "t", new_customization("a"))
    await index.redis.script_flush()
    assert await index.find_customization("u", "t") == put


async def test_a_tasks_are_scanned_whole_in_pages(index: RedisIndex) -> None:
    await index.put_task("t", TaskSettings())
    users = [f"user-{i}" for i in range(300)]
    put = await asyncio.gather(*(index.put_customization(user, "t", new_customization(user)) for user in users))
    found = {customization.user: customization for customization in await all_of_task(index, "t", 20)}
    assert found == {customization.user: customization for customization in put}
    assert await index.count_customizations("t") == 300


async def test_a_deleted_one_is_gone_and_cannot_be_deleted_again(index: RedisIndex) -> None:
    await index.put_task("t", TaskSettings())
    await index.put_customization("u", "t", new_customization("a"))
    await index.delete_customization("u", "t")
    assert await index.find_customization("u", "t") is None
    assert await index.list_user_customizations("u", 9) == ([], False)
    with pytest.raises(NotFound, match="customization"):
        await index.delete_customization("u", "t")


async def test_deleting_a_user_takes_all_of_theirs_and_nobody_elses(
    index: RedisIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.index.customizations._DELETED_AT_ONCE", 2)
    for i in range(5):
        await index.put_task(f"t{i}", TaskSettings())
        for user in ("u", "v"):
            await index.put_customization(user, f"t{i}", new_customization(user))
    await index.delete_task("t4")
    assert await index.delete_user("u") == 4
    assert await index.delete_user("u") == 0
    assert [await index.find_customization("u", f"t{i}") for i in range(5)] == [None] * 5
    assert [found.task for found in (await index.list_user_customizations("v", 9))[0]] == ["t0", "t1", "t2", "t3"]


async def test_a_tasks_deletion_takes_its_customizations_also_if_the_name_is_used_again(
    index: RedisIndex, redis_url: str, namespace: str
) -> None:
    for _ in range(2):
        await index.put_task("t", TaskSettings())
        await index.put_customization("u", "t", new_customization("a"))
        await index.delete_task("t")
    await index.put_task("t", TaskSettings())
    assert await index.find_customization("u", "t") is None
    assert await index.list_user_customizations("u", 9) == ([], False)
    with Redis.from_url(redis_url) as redis:
        left = {key.decode() for key in redis.scan_iter(f"{namespace}:*")}
    assert not left & {f"{namespace}:customizations:t", f"{namespace}:user:u"}


async def test_a_page_of_deleted_tasks_does_not_end_the_list(index: RedisIndex) -> None:
    names = [f"t{i}" for i in range(5)]
    for name in names:
        await index.put_task(name, TaskSettings())
        await index.put_customization("u", name, new_customization(name))
    for name in names[:3]:
        await index.delete_task(name)
    page, has_more = await index.list_user_customizations("u", 2)
    assert ([found.task for found in page], has_more) in ((["t3"], True), (["t3", "t4"], False))


@pytest.mark.parametrize("named", ["publish", "put_customization"])
async def test_what_names_a_blob_saves_it_from_deletion_and_waits_where_that_has_begun(
    index: RedisIndex, redis_url: str, namespace: str, named: str
) -> None:
    await index.put_task("t", TaskSettings())
    new = new_customization("a")
    first, *others = [record.sha256 for record in new.files.values()]
    keys = Keys(namespace)

    async def name_it() -> None:
        if named == "publish":
            await index.publish("t", msgspec.structs.replace(new_version("a"), files=new.files), activate=True)
        else:
            await index.put_customization("u", "t", new)

    with Redis.from_url(redis_url) as redis:
        redis.zadd(keys.condemned, dict.fromkeys((*others, "unrelated"), 1.0))
        redis.zadd(keys.deleting, {first: -1.0})
        with pytest.raises(Conflict) as refused:
            await name_it()
        assert refused.value.code == "blobs_deleting"
        assert redis.zcard(keys.condemned) == len(others) + 1, "nothing was changed"
        assert await index.find_customization("u", "t") is None
        assert await index.list_versions("t") == []
        redis.zrem(keys.deleting, first)
        await name_it()
        assert redis.zrange(keys.condemned, 0, -1) == [b"unrelated"]


@pytest.mark.parametrize("names", [("adapter_config.json",), (*FILE_NAMES, "another.bin"), ()])
def test_packing_loses_nothing(names: tuple[str, ...]) -> None:
    files = {name: FileRecord(f"{i:02x}" * 32, i * 1000) for i, name in enumerate(names)}
    new = NewCustomization(
        mode="replace",
        digest=adapter_digest(files),
        method="lora",
        parameters=2**40,
        bytes=2**33,
        virtual_tokens=3,
        rank=None,
        files=files,
        base_fingerprint="base",
    )
    header = b"\x07\x00\x00\x00" + b"\x01\x00\x02\x00" + b"\x00\x00\x00\x00\x00\x00\xf8\x3f"  # 7, 1, 2 and 1.5
    header += b"\x09\x00\x00\x00" + b"\x03" + b"\x00" * 7  # paid for by 9: 3 bytes
    unpacked = unpack("u", "t", header + pack(new), {1: new.base_fingerprint, 2: new.method})
    assert (unpacked.user, unpacked.task, unpacked.made_against, unpacked.created) == ("u", "t", 7, 1.5)
    assert {name: getattr(unpacked, name) for name in new.__struct_fields__} == msgspec.structs.asdict(new)
    assert paid_by(header + pack(new)) == (9, 3)
    assert list(blobs_of(header + pack(new))) == [record.sha256 for record in files.values()]


def test_every_file_of_an_adapter_has_a_number() -> None:
    assert FILE_NAMES[: len(ADAPTER_FILES)] == ADAPTER_FILES


async def test_words_that_many_have_in_common_are_kept_once_each(
    index: RedisIndex, redis_url: str, namespace: str
) -> None:
    await index.put_task("t", TaskSettings())
    bases = [f"base-{i % 3}" for i in range(9)]
    for number, base in enumerate(bases):
        new = msgspec.structs.replace(new_customization("a"), base_fingerprint=base, method=f"method-{number % 2}")
        await index.put_customization(f"{number}", "t", new)
    found = await all_of_task(index, "t", 100)
    assert {int(one.user): (one.base_fingerprint, one.method) for one in found} == {
        number: (base, f"method-{number % 2}") for number, base in enumerate(bases)
    }
    with Redis.from_url(redis_url) as redis:
        assert redis.hlen(f"{namespace}:words") == 5


async def test_a_customization_takes_at_most_400_bytes_of_redis_beyond_its_ids(
    index: RedisIndex, redis_url: str
) -> None:
    await index.put_task("task", TaskSettings())
    users = [f"user-{i:05}" for i in range(500)]
    for start in range(0, len(users), 20):
        batch = users[start : start + 20]
        await asyncio.gather(*(index.put_customization(user, "task", new_customization(user)) for user in batch))
    with Redis.from_url(redis_url) as redis:
        grown = redis.memory_usage(index.keys.customizations("task"), samples=0)
        grown += sum(redis.memory_usage(index.keys.user(user), samples=0) for user in users)
        slots = 2 * 8 * len(users)  # of the table of all keys, at most
    ids = sum(2 * len(user) + len("task") for user in users)
    assert (grown + slots - ids) / len(users) <= BUDGET

"""API keys: what is stored of them, who may use them, how servers forget them, and what they may use."""

from __future__ import annotations

import asyncio

import pytest
from redis import Redis

from adapters_store import (
    LEASE_SECONDS,
    ApiKeyDirectory,
    LocalUsage,
    NotFound,
    PrivateRedis,
    Quotas,
    RedisIndex,
    StoreUnavailable,
    TaskDirectory,
    Usage,
)
from adapters_store.index.feed import FeedEvent
from adapters_store.mirror.directory import FEED_WAIT
from tests.store.samples import eventually

pytestmark = pytest.mark.anyio


@pytest.fixture
async def known(index: RedisIndex, directory: TaskDirectory) -> ApiKeyDirectory:
    known = ApiKeyDirectory(index.api_keys)
    directory.subscribe(known)
    return known


async def until_unknown(known: ApiKeyDirectory, text: str) -> None:
    """Return once the key is refused; the bound only ends a broken test."""
    async with asyncio.timeout(20):
        while await known.get(text) is not None:  # noqa: ASYNC110 - what changes is what is asked
            await asyncio.sleep(0.01)


async def test_a_key_is_found_by_its_text_and_listed_without_it(index: RedisIndex, known: ApiKeyDirectory) -> None:
    quotas = Quotas(requests_per_minute=5)
    made, text = await index.api_keys.create("ci", ["invoke", "publish"], tenant="acme", quotas=quotas)
    assert (made.name, made.tenant, made.scopes, made.quotas) == ("ci", "acme", ("invoke", "publish"), quotas)
    assert made.created > 0
    assert await known.get(text) == made
    later, other = await index.api_keys.create("later", ["admin"])
    assert await index.api_keys.list() == [made, later]
    assert text != other
    assert len(text) == len("mk_") + 43


async def test_redis_holds_no_keys_text(index: RedisIndex, redis_url: str, namespace: str) -> None:
    _, text = await index.api_keys.create("ci", ["invoke"])
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        names = [*redis.scan_iter(match=f"{namespace}:*")]
        held = [str(redis.hgetall(name) if redis.type(name) == "hash" else redis.dump(name)) for name in names]
    assert any("api_keys" in name for name in names)
    assert not any(text in content or text.removeprefix("mk_") in content for content in [*names, *held])


async def test_what_is_no_key_is_none(index: RedisIndex, known: ApiKeyDirectory) -> None:
    key, text = await index.api_keys.create("ci", ["invoke"])
    for wrong in ("", "mk_", key.id, text[:-1], text + "x", text.upper()):
        assert await known.get(wrong) is None


async def test_a_revoked_key_is_forgotten_within_a_second(
    index: RedisIndex, known: ApiKeyDirectory, redis_url: str, namespace: str
) -> None:
    key, text = await index.api_keys.create("ci", ["invoke"])
    _, kept = await index.api_keys.create("other", ["invoke"])
    assert await known.get(text) is not None
    elsewhere = await RedisIndex.connect(redis_url, namespace=namespace)
    await elsewhere.api_keys.revoke(key.id)
    await elsewhere.close()
    assert FEED_WAIT < 1
    await until_unknown(known, text)
    assert await known.get(kept) is not None
    assert [listed.name for listed in await index.api_keys.list()] == ["other"]
    with pytest.raises(NotFound):
        await index.api_keys.revoke(key.id)


async def test_a_key_revoked_while_it_was_read_is_not_kept(index: RedisIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    key, text = await index.api_keys.create("ci", ["invoke"])
    known = ApiKeyDirectory(index.api_keys)
    find = index.api_keys.find

    async def overtaken(sha256: str) -> object:
        found = await find(sha256)
        await index.api_keys.revoke(key.id)
        known.changed(FeedEvent("1-1", "key_changed", key=key.id))
        return found

    monkeypatch.setattr(index.api_keys, "find", overtaken)
    await known.get(text)
    monkeypatch.undo()
    assert await known.get(text) is None


async def test_the_most_used_keys_are_kept(index: RedisIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_store.mirror.api_keys.MOST_KEPT", 2)
    known = ApiKeyDirectory(index.api_keys)
    texts = [(await index.api_keys.create(str(number), ["invoke"]))[1] for number in range(3)]
    for text in (texts[0], texts[1], texts[0], texts[2]):
        await known.get(text)

    async def no_redis(sha256: str) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(index.api_keys, "find", no_redis)
    assert [(await known.get(texts[number])) is not None for number in (0, 2)] == [True, True]
    with pytest.raises(StoreUnavailable):
        await known.get(texts[1])


class _NotFollowing:
    available = False


async def test_while_the_feed_is_not_followed_guesses_do_not_ask_redis(
    index: RedisIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = await index.api_keys.create("ci", ["invoke"])
    known = ApiKeyDirectory(index.api_keys)
    assert await known.get(text) is not None
    known.subscribed(_NotFollowing())
    monkeypatch.setattr(index.api_keys, "find", None)
    assert await known.get(text) is not None
    with pytest.raises(StoreUnavailable):
        await known.get("mk_guess")


async def test_without_redis_known_keys_go_on_and_others_cannot_be_judged(own_redis: PrivateRedis) -> None:
    index = await RedisIndex.connect(own_redis.url)
    tasks = TaskDirectory(index)
    known = ApiKeyDirectory(index.api_keys)
    tasks.subscribe(known)
    await tasks.start()
    key, used = await index.api_keys.create("used", ["invoke"])
    _, unused = await index.api_keys.create("unused", ["invoke"])
    await known.get(used)
    await asyncio.sleep(0.5)  # so that the feed has no more to bring
    await known.get(used)
    own_redis.stop()
    await eventually(lambda: not tasks.available)
    assert await known.get(used) == key
    for text in (unused, "mk_nobody"):
        with pytest.raises(StoreUnavailable):
            await known.get(text)
    own_redis.start()
    await eventually(lambda: tasks.available)
    assert await known.get(unused) is not None
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
    await until_unknown(known, used)  # an emptied Redis knows nobody
    await tasks.stop()
    await index.close()


@pytest.fixture(params=["shared", "local"])
async def usage(request: pytest.FixtureRequest, index: RedisIndex) -> Usage:
    return index.usage if request.param == "shared" else LocalUsage()


async def test_a_minute_holds_its_requests_and_says_when_there_is_room(usage: Usage) -> None:
    assert [await usage.request("k", 3) for _ in range(3)] == [None] * 3
    wait = await usage.request("k", 3)
    assert wait is not None
    assert 1 <= wait <= 60
    assert await usage.request("other", 3) is None


async def test_a_day_takes_tokens_until_they_are_spent(usage: Usage) -> None:
    assert await usage.tokens("k", 100) is None
    await usage.charge_tokens("k", 100, 99)
    assert await usage.tokens("k", 100) is None
    await usage.charge_tokens("k", 100, 500)  # what had begun
    wait = await usage.tokens("k", 100)
    assert wait is not None
    assert 80_000 <= wait <= 86_400
    assert await usage.tokens("other", 100) is None


async def test_as_many_requests_run_as_have_leases(usage: Usage) -> None:
    assert [await usage.lease("k", name, 2) for name in "ab"] == [None, None]
    assert await usage.lease("k", "c", 2) == 1
    assert await usage.lease("other", "c", 2) is None
    await usage.release("k", "a")
    assert await usage.lease("k", "c", 2) is None
    await usage.release("k", "a")  # again: fine
    assert await usage.lease("k", "d", 2) == 1


async def test_leases_that_nobody_renews_end(index: RedisIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LEASE_SECONDS >= 3
    monkeypatch.setattr("adapters_store.index.usage.LEASE_SECONDS", 1)
    usage = index.usage
    for name in "ab":
        assert await usage.lease("k", name, 2) is None
    await usage.release("k", "b")
    for _ in range(4):
        await asyncio.sleep(0.4)
        await usage.renew("k", ["a", "b"])
    assert await usage.lease("k", "c", 2) is None  # `a` lives, `b` did not come back
    assert await usage.lease("k", "d", 2) == 1
    await asyncio.sleep(1.2)
    assert await usage.lease("k", "d", 2) is None


async def test_servers_share_what_was_used(index: RedisIndex, redis_url: str, namespace: str) -> None:
    other = await RedisIndex.connect(redis_url, namespace=namespace)
    assert await index.usage.request("k", 2) is None
    assert await other.usage.request("k", 2) is None
    assert await index.usage.request("k", 2) is not None
    await other.usage.charge_tokens("k", 10, 10)
    assert await index.usage.tokens("k", 10) is not None
    await index.usage.lease("k", "a", 1)
    assert await other.usage.lease("k", "b", 1) is not None
    await other.close()

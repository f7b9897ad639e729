"""The index: tasks, their versions, users' customizations and API keys in Redis. It knows no files and no server.

Every change is one Lua script (`lua/*.lua`), which also writes the history and tells the change
feed; so a change is seen whole or not at all, by everyone. No call's cost grows with the number of tasks. Every call
may raise `StoreUnavailable`; a change that raised it may have been carried out nevertheless, and may be repeated.
"""

from __future__ import annotations

import secrets

from redis.asyncio import Redis

from adapters_store.errors import RedisMisconfigured
from adapters_store.index.api_keys import ApiKeys
from adapters_store.index.connection import check_server, open_redis, redis_errors, shown
from adapters_store.index.customizations import CustomizationCalls
from adapters_store.index.feed import ChangeFeed
from adapters_store.index.garbage import GarbageIndex
from adapters_store.index.keys import Keys
from adapters_store.index.scripts import announced
from adapters_store.index.usage import SharedUsage
from adapters_store.index.versions import VersionCalls
from adapters_store.records import BY_NOBODY

SCHEMA = "2"


class RedisIndex(VersionCalls, CustomizationCalls):
    """One index, in the Redis and namespace that `connect` was given; safe to use from many coroutines of a loop.

    `index_id` tells this index from any other; `feed` is its change feed, `api_keys` has its API keys, `usage` what
    they use, `garbage` which blobs nobody names; `url` says where it is, without a password.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        super().__init__(redis, keys)
        self.feed = ChangeFeed(redis, keys)
        self.api_keys = ApiKeys(redis, keys)
        self.usage = SharedUsage(redis, keys)
        self.garbage = GarbageIndex(redis, keys)
        self.index_id = ""
        self.url = ""

    @classmethod
    async def connect(cls, url: str, *, namespace: str = "medley") -> RedisIndex:
        """Connect, check the server (`RedisMisconfigured`) and make the index if there is none."""
        redis = open_redis(url)
        index = cls(redis, Keys(namespace))
        index.url = shown(url)
        try:
            await check_server(redis)
            await index.identify()
        except BaseException:
            await index.close()
            raise
        return index

    async def close(self) -> None:
        """Close all connections."""
        await self.redis.aclose()

    async def ping(self) -> None:
        """Return if Redis answers."""
        with redis_errors():
            await self.redis.ping()

    async def identify(self) -> str:
        """The id of the index that stands in Redis now, which is a new and empty one if none does."""
        keys = [self.keys.index_id, self.keys.schema, self.keys.feed]
        arguments = [secrets.token_hex(16), SCHEMA, *announced(BY_NOBODY)]
        index_id, schema = await self.run_always("identify", keys, arguments)
        if schema != SCHEMA:
            raise RedisMisconfigured(
                f"the index at {self.url} was written by another release: it has layout {schema}, this release reads "
                f"{SCHEMA}; export its tasks with the release that wrote it, or start anew with another --data-dir (or "
                "--redis-url), and push them again"
            )
        self.index_id = index_id
        return self.index_id

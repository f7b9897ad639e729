"""What API keys have used lately, counted in Redis so that it holds over all servers, or in memory while Redis is away.

    requests per minute   a moving window: any 60 seconds hold no more (`limits`)
    tokens per day        a window of 24 hours that begins with its first charge (`limits`)
    concurrent requests   leases that expire, so that those of a killed server do not stay

Both counters answer the same calls, each with None for "go on" or the seconds to wait. `SharedUsage` may raise
`StoreUnavailable`; `LocalUsage` never does, and knows only its own server's requests.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import Protocol

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter
from redis.asyncio import Redis

from adapters_store.index.connection import redis_errors
from adapters_store.index.keys import Keys
from adapters_store.index.scripts import Scripted

LEASE_SECONDS = 30
"""Until a lease that nobody renews is free again: the longest time that a killed server's requests count."""
LEASE_RETRY_SECONDS = 1
"""When to ask again for a lease: nobody knows when a running request ends."""


class Usage(Protocol):
    """See the module."""

    async def request(self, key_id: str, limit: int) -> int | None:
        """Count one more request of this minute, unless there were `limit`; else the seconds until there is room."""

    async def tokens(self, key_id: str, limit: int) -> int | None:
        """None while fewer than `limit` tokens were charged today; else the seconds until the day is over."""

    async def charge_tokens(self, key_id: str, limit: int, count: int) -> None:
        """Charge tokens of a request that has ended; they may exceed the limit. `limit` is that of `tokens`."""

    async def lease(self, key_id: str, lease: str, limit: int) -> int | None:
        """Begin a request with a `lease` of its own, unless `limit` are running; else the seconds to wait."""

    async def release(self, key_id: str, lease: str) -> None:
        """The request has ended; a lease that is unknown or expired is fine."""


class _Windows:
    """The two windows, in a storage of `limits`."""

    def __init__(self, storage: MemoryStorage | RedisStorage) -> None:
        self._minute = MovingWindowRateLimiter(storage)
        self._day = FixedWindowRateLimiter(storage)

    async def request(self, key_id: str, limit: int) -> int | None:
        item = RateLimitItemPerMinute(limit, namespace="requests")
        with redis_errors():
            return None if await self._minute.hit(item, key_id) else await _until_reset(self._minute, item, key_id)

    async def tokens(self, key_id: str, limit: int) -> int | None:
        item = RateLimitItemPerDay(limit, namespace="tokens")
        with redis_errors():
            return None if await self._day.test(item, key_id) else await _until_reset(self._day, item, key_id)

    async def charge_tokens(self, key_id: str, limit: int, count: int) -> None:
        with redis_errors():
            await self._day.hit(RateLimitItemPerDay(limit, namespace="tokens"), key_id, cost=count)


class LocalUsage(_Windows):
    """What this server has seen, in memory."""

    def __init__(self) -> None:
        super().__init__(MemoryStorage())
        self._leases: defaultdict[str, set[str]] = defaultdict(set)

    async def lease(self, key_id: str, lease: str, limit: int) -> int | None:
        running = self._leases[key_id]
        if len(running) >= limit:
            return LEASE_RETRY_SECONDS
        running.add(lease)
        return None

    async def release(self, key_id: str, lease: str) -> None:
        running = self._leases[key_id]
        running.discard(lease)
        if not running:
            del self._leases[key_id]


class SharedUsage(Scripted, _Windows):
    """What all servers of an index have seen, in its Redis; the times of leases are by the clock of Redis."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        storage = RedisStorage(
            "async+redis://",  # not used: the connections are the index's own
            implementation="redispy",
            key_prefix=keys.quotas,
            connection_pool=redis.connection_pool,  # type: ignore[arg-type]  # an option: their type names scalars alone
        )
        _Windows.__init__(self, storage)
        Scripted.__init__(self, redis, keys)

    async def lease(self, key_id: str, lease: str, limit: int) -> int | None:
        is_given = await self.run("lease", [self.keys.leases(key_id)], [lease, limit, LEASE_SECONDS])
        return None if is_given else LEASE_RETRY_SECONDS

    async def release(self, key_id: str, lease: str) -> None:
        with redis_errors():
            await self.redis.zrem(self.keys.leases(key_id), lease)

    async def stored_bytes(self, key_id: str) -> int:
        """The bytes of the versions and customizations that the key uploaded and that still stand."""
        with redis_errors():
            return int(await self.redis.hget(self.keys.stored_bytes, key_id) or 0)

    async def renew(self, key_id: str, leases: list[str]) -> None:
        """Let those of the leases that have not ended live for another `LEASE_SECONDS`."""
        await self.run("renew_leases", [self.keys.leases(key_id)], [LEASE_SECONDS, *leases])


async def _until_reset(limiter: RateLimiter, item: RateLimitItem, key_id: str) -> int:
    """Whole seconds until the window has room, at least one."""
    window = await limiter.get_window_stats(item, key_id)
    return max(1, math.ceil(window.reset_time - time.time()))

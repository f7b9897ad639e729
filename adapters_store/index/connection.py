"""The connection to Redis: how it is made, what is demanded of the server, what its errors mean to the store.

Every call has a timeout. Nothing is sent twice by itself: a call whose answer was lost may have been carried out, and
only the caller knows whether it may be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from adapters_store.errors import RedisMisconfigured, StoreFull, StoreUnavailable

CALL_TIMEOUT = 3.0
"""Seconds until a call to Redis fails; blocking reads of the feed wait for less than this."""
CONNECT_TIMEOUT = 2.0
MAX_CONNECTIONS = 32
OLDEST_REDIS = (6, 2)

#: Error words with which a Redis declines for the moment: it cannot write its file, runs a long script, lost its
#: primary or its replicas, or just changed its role. A pipeline's error has the command before the word.
NOT_NOW = re.compile(r"\b(MISCONF|BUSY|MASTERDOWN|NOREPLICAS|UNBLOCKED) ")

#: What a script's error has somewhere in it at `maxmemory`, before Redis 7; the client then knows no better error.
OUT_OF_MEMORY = re.compile(r"OOM command not allowed")

#: What uvloop says, not in an `OSError`, when a connection is written to that was reset a moment before.
CLOSED_UNDERNEATH = "the handler is closed"

log = structlog.get_logger(__name__)


def open_redis(url: str) -> Redis:
    """A client of the Redis at `url` (redis://, rediss:// or unix://); it connects with its first call."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=CALL_TIMEOUT,
        socket_timeout=CALL_TIMEOUT,
        socket_connect_timeout=CONNECT_TIMEOUT,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
        protocol=2,
    )
    return Redis.from_pool(pool)


def shown(url: str) -> str:
    """`url` without user and password, for messages."""
    parts = urlsplit(url)
    query = urlencode([pair for pair in parse_qsl(parts.query) if pair[0] not in ("username", "password")])
    netloc = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{netloc}{parts.path}" + (f"?{query}" if query else "")


@contextmanager
def redis_errors() -> Iterator[None]:
    """Raise the store's errors in place of the client's. A `ResponseError` of a wrong command stays what it is."""
    try:
        yield
    except AuthenticationError as error:
        raise RedisMisconfigured(f"Redis refused the credentials of its URL: {error}") from error
    except (RedisConnectionError, RedisTimeoutError, ReadOnlyError) as error:
        raise StoreUnavailable(f"Redis is not available: {error}") from error
    except RuntimeError as error:
        if CLOSED_UNDERNEATH in str(error):
            raise StoreUnavailable(f"Redis is not available: {error}") from error
        raise
    except OutOfMemoryError as error:
        raise StoreFull(f"Redis has reached its maxmemory: {error}") from error
    except ResponseError as error:
        if OUT_OF_MEMORY.search(str(error)):
            raise StoreFull(f"Redis has reached its maxmemory: {error}") from error
        if NOT_NOW.search(str(error)):
            raise StoreUnavailable(f"Redis declines for the moment: {error}") from error
        raise


async def check_server(redis: Redis) -> None:
    """Demand what law "nothing acknowledged is lost" needs of Redis; warn about what only loss of power would show."""
    with redis_errors():
        info: dict[str, Any] = await redis.info()
    if info["redis_mode"] == "cluster":
        raise RedisMisconfigured("Redis runs in cluster mode; a change spans several keys and needs one primary")
    if info["role"] != "master":
        raise RedisMisconfigured(f"Redis is a {info['role']}; --redis-url must name the primary")
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_REDIS:
        raise RedisMisconfigured(f"Redis {version} is too old; 6.2 or newer is needed")
    if info["maxmemory_policy"] != "noeviction":
        raise RedisMisconfigured(
            f"Redis may evict keys (maxmemory-policy {info['maxmemory_policy']}); set maxmemory-policy noeviction"
        )
    if not info["aof_enabled"]:
        log.warning(
            "redis keeps no append-only file and may lose what it acknowledged when it stops; set appendonly yes"
        )

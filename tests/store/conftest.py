"""A real Redis for the store's tests: one private server for all of them, a namespace of its own for each."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from adapters_store import GarbageCollector, LocalBlobs, PrivateRedis, RedisIndex, TaskDirectory


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        server = PrivateRedis(Path(folder))
        server.start()
        yield server.url
        server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[PrivateRedis]:
    """A server that the test may stop, kill and empty."""
    server = PrivateRedis(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def namespace() -> str:
    return secrets.token_hex(8)


@pytest.fixture
async def index(redis_url: str, namespace: str) -> AsyncIterator[RedisIndex]:
    index = await RedisIndex.connect(redis_url, namespace=namespace)
    yield index
    await index.close()


@pytest.fixture
async def directory(index: RedisIndex) -> AsyncIterator[TaskDirectory]:
    directory = TaskDirectory(index)
    await directory.start()
    yield directory
    await directory.stop()


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "blobs")


@pytest.fixture
async def empty(redis_url: str, namespace: str) -> AsyncIterator[RedisIndex]:
    """Another index."""
    index = await RedisIndex.connect(redis_url, namespace=f"{namespace}-other")
    yield index
    await index.close()


@pytest.fixture
def other(tmp_path: Path) -> LocalBlobs:
    """Another store."""
    return LocalBlobs(tmp_path / "other")


@pytest.fixture
def collector(index: RedisIndex, blobs: LocalBlobs) -> GarbageCollector:
    """Without grace: what it condemns is due at once."""
    return GarbageCollector(index.garbage, blobs, 0)

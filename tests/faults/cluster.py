"""Three servers that ask for keys, on one Redis and one folder of blobs; the last reaches Redis through a `Proxy`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from adapters_store import ApiKey, KeyScope, PrivateRedis, Quotas, RedisIndex
from tests.faults.client import Client
from tests.faults.proxy import Proxy
from tests.server_process import PATIENCE_SECONDS, ServerProcess

NO_QUOTAS = Quotas()
SMALL_BANK = 5
"""LoRAs that the last server holds at once."""
LORA_BYTES = 6144  # of one

T = TypeVar("T")


class Cluster:
    """The servers, and the Redis that they share; `blobs` is the folder of their adapters."""

    def __init__(
        self, redis: PrivateRedis, redis_folder: Path, proxy: Proxy, servers: list[ServerProcess], blobs: Path
    ) -> None:
        self.redis = redis
        self.redis_folder = redis_folder
        self.proxy = proxy
        self.servers = servers
        self.blobs = blobs
        self._stack = ExitStack()

    def index(self, work: Callable[[RedisIndex], Awaitable[T]]) -> T:
        """Do something to the index, as another process would."""

        async def run() -> T:
            index = await RedisIndex.connect(self.redis.url)
            try:
                return await work(index)
            finally:
                await index.close()

        return asyncio.run(run())

    def key(self, *scopes: KeyScope, quotas: Quotas = NO_QUOTAS) -> tuple[ApiKey, str]:
        """A new key and its text."""
        return self.index(lambda index: index.api_keys.create("test", scopes, tenant="", quotas=quotas))

    def client(self, server: int, key: str) -> Client:
        """A client of one of the servers."""
        return self._stack.enter_context(Client(self.servers[server].url, key))

    def clients(self) -> list[Client]:
        """An operator's client of each server."""
        _, text = self.key("admin")
        return [self.client(server, text) for server in range(len(self.servers))]

    @contextmanager
    def closing_clients(self) -> Iterator[Cluster]:
        """The clients that are made inside end with the block."""
        with self._stack:
            yield self


@contextmanager
def running_cluster(base: Path, folder: Path) -> Iterator[Cluster]:
    """Three servers, started at the same time."""
    redis = PrivateRedis(folder / "redis")
    redis.start()
    with ExitStack() as stack:
        stack.callback(redis.stop)
        proxy = stack.enter_context(Proxy(Path(redis.url.removeprefix("unix://"))))
        servers = []
        for number in range(3):
            is_last = number == 2
            options = ["--auth", "--redis-url", proxy.url if is_last else redis.url, "--store", str(folder / "store")]
            if is_last:
                options += ["--adapter-memory", f"{SMALL_BANK * LORA_BYTES / 2**30:.12f}"]
            servers.append(ServerProcess(base, folder / f"server-{number}", *options))
            stack.callback(servers[-1].end)
        for server in servers:
            stack.enter_context(server)
        yield Cluster(redis, folder / "redis", proxy, servers, folder / "store" / "blobs")


def until(holds: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Return once `holds`; fail after so many seconds."""
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up, f"it did not come to hold within {seconds} s"
        time.sleep(0.01)


def everywhere(clients: Iterable[Client], holds: Callable[[Client], bool], seconds: float = PATIENCE_SECONDS) -> float:
    """Return once it holds at each of the servers, and the seconds that this took."""
    begun = time.monotonic()
    for client in clients:
        while not holds(client):
            assert time.monotonic() < begun + seconds, f"{client.http.base_url}: not within {seconds} s"
            time.sleep(0.01)
    return time.monotonic() - begun

"""A TCP door to a Redis on a unix socket, which a test makes slow or shuts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Proxy:
    """Passes bytes on, as a context manager, from a thread of its own. `delay` may change at any time."""

    def __init__(self, redis_socket: Path) -> None:
        self.delay = 0.0
        """Seconds for which each piece of an answer is held back."""
        self._redis_socket = str(redis_socket)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._connections: set[asyncio.Task[None]] = set()
        self._shut = False
        self._port = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self._port}/0"

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = self._wait_for(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error: object) -> None:
        self.shut()
        self._server.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def shut(self) -> None:
        """Cut what is connected, and whatever connects from now on."""
        self._shut = True
        self._wait_for(self._cut())

    def open(self) -> None:
        """Let connections through again."""
        self._shut = False

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _cut(self) -> None:
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        with suppress(OSError, asyncio.CancelledError):
            if not self._shut:
                from_redis, to_redis = await asyncio.open_unix_connection(self._redis_socket)
                try:
                    async with asyncio.TaskGroup() as directions:
                        directions.create_task(self._pass_on(reader, to_redis, slow=False))
                        directions.create_task(self._pass_on(from_redis, writer, slow=True))
                finally:
                    to_redis.close()
        writer.close()
        self._connections.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slow: bool) -> None:
        with suppress(OSError):
            while piece := await reader.read(65536):
                if slow and self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(piece)
                await writer.drain()
        writer.close()

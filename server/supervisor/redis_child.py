"""The private Redis as a child: started, started again when it dies, stopped.

While it is away the server goes on with what it knows; its clients reconnect by themselves.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import structlog

from adapters_store import PrivateRedis, RedisNotStarted

SHORTEST_DELAY = 0.25  # seconds before a start, doubled after each
LONGEST_DELAY = 15.0
STABLE_SECONDS = 60.0  # one that lived this long starts again without a growing delay

_log = structlog.get_logger(__name__)


class RedisChild:
    """A private Redis in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._redis = PrivateRedis(folder)
        self._stopping = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._redis.url

    async def start(self) -> None:
        """Return when it answers; `RedisNotStarted` if it does not. From then on it is kept running."""
        # A task of its own: a start that is given up goes on in its thread, and `stop` has to wait for it.
        self._starting = asyncio.create_task(asyncio.to_thread(self._redis.start), name="private redis start")
        await asyncio.shield(self._starting)
        self._keeper = asyncio.create_task(self._keep(), name="private redis keeper")

    async def stop(self) -> None:
        """Stop it cleanly, whatever state it is in."""
        self._stopping.set()
        under_way = [task for task in (self._starting, self._keeper) if task is not None]
        if under_way:
            await asyncio.wait(under_way)
        await asyncio.to_thread(self._redis.stop)

    async def _keep(self) -> None:
        """Start it whenever it has died, after a delay that grows while it keeps dying."""
        loop = asyncio.get_running_loop()
        started, delay = loop.time(), SHORTEST_DELAY
        while (status := await self._end()) is not None:
            delay = SHORTEST_DELAY if loop.time() - started > STABLE_SECONDS else min(delay * 2, LONGEST_DELAY)
            _log.error("the private redis died and is started again", status=status, seconds=delay)
            if await self._stopped_within(delay):
                return
            started = loop.time()
            try:
                await asyncio.to_thread(self._redis.start)
            except RedisNotStarted as error:
                _log.error("the private redis does not start", reason=str(error))

    async def _end(self) -> int | None:
        """Wait until it has died: its exit status; None once `stop` was called."""
        ended = asyncio.wrap_future(self._redis.ended)
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return None if self._stopping.is_set() else ended.result()

    async def _stopped_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

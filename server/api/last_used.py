"""When each task was last used: noted per request, written to the index now and then.

A request never waits for it, and a crash loses at most one interval: the figure is for people who tidy up.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from adapters_store import RedisIndex, StoreError

FLUSH_SECONDS = 5.0

_log = structlog.get_logger(__name__)


class LastUsed:
    """See the module. One per server."""

    def __init__(self, index: RedisIndex) -> None:
        self._index = index
        self._noted: dict[str, float] = {}

    def note(self, task: str) -> None:
        """The task is being used now."""
        self._noted[task] = time.time()

    async def run(self) -> None:
        """Write what was noted, for ever; cancel it and call `flush` at the end."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what was noted. While the index is away or full it stays noted."""
        noted, self._noted = self._noted, {}
        if not noted:
            return
        try:
            await self._index.touch(noted)
        except StoreError as error:
            self._noted = noted | self._noted
            _log.warning("last use of tasks not written yet", reason=str(error))

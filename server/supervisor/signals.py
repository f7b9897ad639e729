"""The two signals that end a server, as events of the loop."""

from __future__ import annotations

import asyncio
import signal
from types import TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Inside its `with` block, SIGTERM and Ctrl-C set events and do nothing else."""

    def __init__(self) -> None:
        self.first = asyncio.Event()  # drain
        self.second = asyncio.Event()  # do not wait any longer
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> StopSignals:
        for number in STOPPING:
            self._loop.add_signal_handler(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in STOPPING:
            self._loop.remove_signal_handler(number)

    def _note(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

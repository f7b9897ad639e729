"""The engine's loop: take what came, step, say what happened; sleep when there is nothing to do.

What can wait until nobody waits for anything (memory that is moved to better places) is done then, in short pieces: a
request that comes meanwhile waits for the piece under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from server.engine.engine import Engine
from server.engine.protocol import Abort, Generate, Healed, Pin, StepOutput

Work = Generate | Abort | Pin | Healed
"""What the engine is told between steps."""


class EngineLoop:
    """Runs an engine on the calling thread; `post`, `wake` and `stop` may be called from any other."""

    def __init__(self, emit: Callable[[StepOutput], None], at_rest: Iterator[None]) -> None:
        """`emit` takes each step's output and must not block. `at_rest` does what can wait, some milliseconds of it
        with each element."""
        self._emit = emit
        self._at_rest = at_rest
        self._inbox: SimpleQueue[Work | None] = SimpleQueue()
        self._stopped = False

    def post(self, message: Work) -> None:
        """Hand a message to the engine before its next step."""
        self._inbox.put(message)

    def wake(self) -> None:
        """Look again: a load has ended."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Return from `run` before the next step."""
        self._stopped = True
        self._inbox.put(None)

    def run(self, engine: Engine) -> None:
        """Step for as long as there is work, until stopped."""
        while not self._stopped:
            changed = self._receive(engine)
            if engine.has_work or changed:  # a step without rows tells the figures, and begins to load what is pinned
                self._emit(engine.step())

    def _receive(self, engine: Engine) -> bool:
        """Everything in the inbox; with nothing to step, wait for it (for deadlines, not for ever). Returns whether
        anything but new sequences came."""
        if not engine.has_work:
            self._rest()
        block = not engine.has_work or engine.must_wait
        timeout = 1.0 if engine.has_work else None
        changed = False
        while True:
            try:
                message = self._inbox.get(block=block, timeout=timeout)
            except Empty:
                return changed
            block = False
            match message:
                case Generate():
                    engine.add(message)
                case Abort():
                    engine.abort(message.id)
                    changed = True
                case Pin():
                    engine.pin(message.adapters)
                    changed = True
                case Healed():
                    engine.heal(message.blobs)
                    changed = True
                case None:
                    pass

    def _rest(self) -> None:
        """Do what can wait, until something comes or it is done."""
        while self._inbox.empty() and next(self._at_rest, "done") is None:
            pass

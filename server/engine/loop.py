"""The engine's loop: take what came, step, say what happened; sleep when there is nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue

from server.engine.engine import Engine
from server.engine.protocol import Abort, Generate, StepOutput


class EngineLoop:
    """Runs an engine on the calling thread; `post`, `wake` and `stop` may be called from any other."""

    def __init__(self, emit: Callable[[StepOutput], None]) -> None:
        """`emit` takes each step's output and must not block."""
        self._emit = emit
        self._inbox: SimpleQueue[Generate | Abort | None] = SimpleQueue()
        self._stopped = False

    def post(self, message: Generate | Abort) -> None:
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
            aborted = self._receive(engine)
            if engine.has_work or aborted:  # a step without rows tells the figures after an abort
                self._emit(engine.step())

    def _receive(self, engine: Engine) -> bool:
        """Everything in the inbox; with nothing to step, wait for it (for deadlines, not for ever). Returns whether
        a sequence was aborted."""
        block = not engine.has_work or engine.must_wait
        timeout = 1.0 if engine.has_work else None
        aborted = False
        while True:
            try:
                message = self._inbox.get(block=block, timeout=timeout)
            except Empty:
                return aborted
            block = False
            match message:
                case Generate():
                    engine.add(message)
                case Abort():
                    engine.abort(message.id)
                    aborted = True
                case None:
                    pass

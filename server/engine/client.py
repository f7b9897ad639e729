"""The HTTP process's side of the engine: opens sequences, hands out their tokens, learns of the engine's end.

One task reads what the engine says and puts it into the queue of the request that it belongs to; nothing else
touches the stream. A queue holds at most what its sequences may still generate (`max_tokens` each), so a slow
reader delays nobody and needs no further bound. Every open request gets exactly one end: its sequences finish, or
`RequestError` is raised: the engine's own, `deadline_exceeded` when the engine stays silent past the deadline, or
`engine_dead` (`shutting_down` after `close`) when the stream from the engine ends.
It knows neither text nor HTTP, and no torch.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from server.engine.channel import AsyncChannel
from server.engine.protocol import (
    Abort,
    AdapterFacts,
    AdapterRef,
    BaseFacts,
    Configure,
    Failed,
    Fatal,
    FromEngine,
    Generate,
    Healed,
    Inspect,
    Inspected,
    Neighbours,
    NeighboursFound,
    Pin,
    Ready,
    StepOutput,
    StepStats,
    Tokens,
)
from server.errors import AdapterError, RequestError, StartupError

# The engine ends overdue sequences itself, between steps; this much later the client no longer waits for it.
DEADLINE_GRACE_SECONDS = 5.0

StepHook = Callable[[StepStats], None]


class TokenStream:
    """The tokens of one request's sequences, as they come; iterate it inside its `with` block.

    Iteration ends when every sequence has finished or was stopped, and raises `RequestError` when one failed.
    Leaving the block aborts what is still open, whatever the reason for leaving.
    """

    def __init__(self, client: EngineClient, requests: Sequence[Generate]) -> None:
        """Use `EngineClient.open`."""
        self._client = client
        self._requests = requests
        self._open: set[str] = set()
        # Not `asyncio.Queue`, whose bookkeeping for several readers is a part of what each token costs.
        self._queue: deque[Tokens | RequestError] = deque()
        self._waiter: asyncio.Future[None] | None = None  # the reader's, while the queue is empty
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        """Send the requests."""
        for request in self._requests:
            self._open.add(request.id)
            self._client._submit(request, self)
        last = max((request.deadline for request in self._requests), default=0.0)
        delay = max(0.0, last - time.time()) + DEADLINE_GRACE_SECONDS
        self._timer = asyncio.get_running_loop().call_later(delay, self.push, _overdue())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._timer is not None
        self._timer.cancel()
        for request_id in list(self._open):
            self.stop(request_id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Tokens:
        """The next news of any of the sequences."""
        while self._open:
            if not self._queue:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            item = self._queue.popleft()
            if isinstance(item, RequestError):
                raise item
            if item.id not in self._open:  # stopped meanwhile
                continue
            if item.finish_reason is not None:
                self._open.discard(item.id)
            return item
        raise StopAsyncIteration

    def stop(self, request_id: str) -> None:
        """Abort one sequence: no more of its tokens will be seen."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._client._abort(request_id)

    def push(self, news: Tokens | RequestError) -> None:
        """For the client: what a step gave a sequence, or the error by which one ends."""
        self._queue.append(news)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """See the module. Belongs to the event loop that connected it."""

    def __init__(self, channel: AsyncChannel[FromEngine], on_step: StepHook | None) -> None:
        """Use `connect`."""
        self._channel = channel
        self._on_step = on_step
        self._streams: dict[str, TokenStream] = {}  # by sequence
        self._inspections: dict[str, asyncio.Future[Inspected]] = {}
        self._searches: dict[str, asyncio.Future[NeighboursFound]] = {}
        self._ready: asyncio.Future[BaseFacts] = asyncio.get_running_loop().create_future()
        self._fatal: str | None = None
        self._is_closing = False
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, connection: socket.socket, on_step: StepHook | None = None) -> EngineClient:
        """Wrap the engine's socket; the client owns it from here. `on_step` gets every step's figures."""
        return cls(await AsyncChannel.connect(connection, FromEngine), on_step)

    async def start(self, configure: Configure) -> BaseFacts:
        """Configure the engine and wait until it steps. Raises `StartupError` with the engine's own words."""
        assert self._reader is None, "an engine is started once"
        self._reader = asyncio.create_task(self._read(), name="engine-reader")
        self._channel.send(configure)
        return await asyncio.shield(self._ready)

    @property
    def alive(self) -> bool:
        """Whether the engine can still answer."""
        return self._reader is not None and not self._reader.done()

    @property
    def open_sequences(self) -> int:
        """Sequences that the engine has been given and that have no end yet."""
        return len(self._streams)

    async def closed(self) -> str | None:
        """Wait for the engine's end; its last words, if it had any."""
        assert self._reader is not None, "start comes first"
        await asyncio.shield(self._reader)
        return self._fatal

    async def close(self) -> None:
        """Give the socket back; whatever is open ends with `shutting_down`."""
        self._is_closing = True
        await self._channel.close()
        if self._reader is not None:
            await self._reader

    def open(self, requests: Sequence[Generate]) -> TokenStream:
        """Run sequences that belong together: entering the returned stream's block sends them."""
        return TokenStream(self, requests)

    def pin(self, adapters: list[AdapterRef]) -> None:
        """Have these adapters, and no others, loaded ahead and kept. An engine that is gone does not hear it: say it
        to the next one."""
        if self.alive:
            self._channel.send(Pin(adapters=adapters))

    def healed(self, blobs: list[str]) -> None:
        """Tell that blobs are whole again: adapters that failed for them need not rest any longer."""
        if self.alive:
            self._channel.send(Healed(blobs=blobs))

    async def inspect(self, request_id: str, folder: str, under: AdapterRef | None = None) -> AdapterFacts:
        """Have the files of a local folder checked against the base, beside the steps, and whether they can be laid
        over the task's adapter `under`.

        Raises `AdapterError` with one of the bad-upload codes, or `RequestError` when the engine dies meanwhile.
        """
        if not self.alive:
            raise self._dead()
        future: asyncio.Future[Inspected] = asyncio.get_running_loop().create_future()
        self._inspections[request_id] = future
        try:
            self._channel.send(Inspect(id=request_id, folder=folder, under=under))
            answer = await future
        finally:
            self._inspections.pop(request_id, None)
        if answer.error is not None:
            raise AdapterError(answer.error.code, answer.error.message, answer.error.param)
        assert answer.facts is not None, "an inspection answers with facts or an error"
        return answer.facts

    async def neighbours(self, request_id: str, adapter: AdapterRef, k: int) -> NeighboursFound:
        """What an adapter's virtual tokens are near to, found beside the steps. Raises `RequestError`."""
        if not self.alive:
            raise self._dead()
        future: asyncio.Future[NeighboursFound] = asyncio.get_running_loop().create_future()
        self._searches[request_id] = future
        try:
            self._channel.send(Neighbours(id=request_id, adapter=adapter, k=k))
            answer = await future
        finally:
            self._searches.pop(request_id, None)
        if answer.error is not None:
            raise _error(answer.error)
        return answer

    def _submit(self, request: Generate, stream: TokenStream) -> None:
        assert request.id not in self._streams, "ids of open sequences are unique"
        if self.alive:
            self._streams[request.id] = stream
            self._channel.send(request)
        else:
            stream.push(self._dead())

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None and self.alive:
            self._channel.send(Abort(id=request_id))

    async def _read(self) -> None:
        """The one reader, until the engine's end."""
        try:
            while (message := await self._channel.receive()) is not None:
                self._dispatch(message)
        finally:
            self._end()

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case StepOutput():
                self._deliver(message)
            case Inspected():
                future = self._inspections.get(message.id)
                if future is not None and not future.done():
                    future.set_result(message)
            case NeighboursFound():
                search = self._searches.get(message.id)
                if search is not None and not search.done():
                    search.set_result(message)
            case Ready():
                self._ready.set_result(message.base)
            case Fatal():
                self._fatal = message.message

    def _deliver(self, output: StepOutput) -> None:
        for tokens in output.tokens:
            stream = self._streams.get(tokens.id)
            if stream is None:  # aborted while the step ran
                continue
            if tokens.finish_reason is not None:
                del self._streams[tokens.id]
            stream.push(tokens)
        for failed in output.failed:
            stream = self._streams.pop(failed.id, None)
            if stream is not None:
                stream.push(_error(failed))
        if self._on_step is not None:
            self._on_step(output.stats)

    def _end(self) -> None:
        """The engine is gone: everyone who waits for it hears so."""
        for stream in set(self._streams.values()):
            stream.push(self._dead())
        self._streams.clear()
        waiting: list[asyncio.Future[Any]] = [*self._inspections.values(), *self._searches.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(self._dead())
        if not self._ready.done():
            self._ready.set_exception(StartupError(self._fatal or "the engine process ended before it was ready"))

    def _dead(self) -> RequestError:
        if self._is_closing:
            return RequestError("shutting_down", "the server is shutting down; ask again soon")
        words = f": {self._fatal}" if self._fatal else ""
        return RequestError("engine_dead", f"the engine process is gone{words}; the server is about to restart")


def _error(failed: Failed) -> RequestError:
    return RequestError(failed.code, failed.message, failed.param)


def _overdue() -> RequestError:
    return RequestError("deadline_exceeded", "the request's time ran out and the engine stayed silent")

"""An engine that says what a test tells it to: the real protocol on a real socket pair, no model behind it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from queue import Queue

from server.engine.channel import Channel
from server.engine.protocol import (
    Abort,
    AdapterFacts,
    BaseFacts,
    Configure,
    Failed,
    Fatal,
    Generate,
    Healed,
    Inspect,
    Inspected,
    Neighbours,
    Pin,
    Ready,
    StepOutput,
    StepStats,
    ToEngine,
    Tokens,
)

STATS = StepStats(
    seconds=0.01,
    rows=1,
    adapters=1,
    prefill_tokens=3,
    decode_tokens=1,
    virtual_tokens=0,
    running=1,
    waiting=0,
    preemptions=0,
    prompt_tokens=4,
    cached_tokens=1,
    kv_pages_used=1,
    kv_pages_idle=2,
    kv_pages=100,
    bank_bytes=0,
    bank_capacity=1000,
    bank_adapters=0,
    load_seconds=[0.5],
)
FACTS = AdapterFacts(method="lora", parameters=10, bytes=40, virtual_tokens=0, rank=2, warnings=[])


class FakeEngine:
    """`connection` is for the HTTP side. Sequences and aborts are queued for the test to see."""

    def __init__(self, base: BaseFacts | None) -> None:
        """Without a base it ends as soon as it is configured."""
        self.connection, ours = socket.socketpair()
        self.requests: Queue[Generate] = Queue()
        self.aborted: Queue[str] = Queue()
        self.inspected: Queue[Inspect] = Queue()
        self.searched: Queue[Neighbours] = Queue()
        self.pinned: Queue[Pin] = Queue()
        self.healed: Queue[Healed] = Queue()
        self.facts = FACTS  # of every upload
        self.on_request: Callable[[Generate], None] | None = None  # answers at once, on the engine's thread
        self.on_inspect: Callable[[Inspect], None] | None = None  # before an upload's check ends, on the same thread
        self._base = base
        self._ours = ours
        self._channel: Channel[ToEngine] = Channel(ours, ToEngine)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, name="fake-engine")

    def __enter__(self) -> FakeEngine:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.die()
        self._thread.join()
        self._channel.close()

    def say(self, *tokens: Tokens) -> None:
        """One step's tokens."""
        self._send(StepOutput(tokens=list(tokens), failed=[], stats=STATS))

    def fail(self, request_id: str, code: str, message: str = "because") -> None:
        """A sequence's end by an error."""
        self._send(StepOutput(tokens=[], failed=[Failed(id=request_id, code=code, message=message)], stats=STATS))

    def finish(self, request: Generate, token_ids: list[int], finish_reason: str = "stop") -> None:
        """A whole answer, a token a step."""
        for token_id in token_ids:
            self.say(Tokens(id=request.id, token_ids=[token_id]))
        self.say(Tokens(id=request.id, token_ids=[], finish_reason=finish_reason))

    def die(self, last_words: str | None = None) -> None:
        """The process is gone."""
        try:
            if last_words is not None:
                self._send(Fatal(message=last_words))
            self._ours.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side went first

    def _send(self, message: StepOutput | Inspected | Ready | Fatal) -> None:
        with self._lock:
            self._channel.send(message)

    def _read(self) -> None:
        while (message := self._channel.receive()) is not None:
            match message:
                case Configure():
                    if self._base is None:
                        self.die("no base to run")
                    else:
                        self._send(Ready(base=self._base))
                case Generate():
                    self.requests.put(message)
                    if self.on_request is not None:
                        self.on_request(message)
                case Abort():
                    self.aborted.put(message.id)
                case Neighbours():
                    self.searched.put(message)
                case Pin():
                    self.pinned.put(message)
                case Healed():
                    self.healed.put(message)
                case Inspect():
                    self.inspected.put(message)
                    if self.on_inspect is not None:
                        self.on_inspect(message)
                    self._send(Inspected(id=message.id, facts=self.facts))

"""The channel between the processes: messages come whole and in order, and who sends one without waiting never does."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from server.engine.channel import Channel
from server.engine.protocol import Fatal, FromEngine, ToEngine

SIZE = 100_000  # characters of a message: more than a few do not fit into a socket
COUNT = 50
WRITERS = 4
PATIENCE_SECONDS = 20  # only ends a broken test


@pytest.fixture
def ends() -> Iterator[tuple[Channel[ToEngine], Channel[FromEngine]]]:
    ours, theirs = socket.socketpair()
    engine: Channel[ToEngine] = Channel(theirs, ToEngine)
    http: Channel[FromEngine] = Channel(ours, FromEngine)
    yield engine, http
    engine.close()
    http.close()


def texts(writer: int) -> list[str]:
    return [f"{writer} {index} ".ljust(SIZE if index % 3 else 10, "x") for index in range(COUNT)]


def test_what_a_slow_reader_has_not_taken_comes_whole_and_in_each_writer_s_order(
    ends: tuple[Channel[ToEngine], Channel[FromEngine]],
) -> None:
    engine, http = ends

    def send(writer: int) -> None:
        for text in texts(writer):
            engine.send_nowait(Fatal(message=text))

    sending = [threading.Thread(target=send, args=(writer,)) for writer in range(WRITERS)]
    for thread in sending:
        thread.start()
    for thread in sending:
        thread.join()  # nobody reads, and nobody waits for it

    threading.Thread(target=engine.flush_pending, daemon=True).start()
    came: dict[str, list[str]] = {}
    for _ in range(WRITERS * COUNT):
        message = http.receive()
        assert isinstance(message, Fatal)
        came.setdefault(message.message.partition(" ")[0], []).append(message.message)
    assert came == {str(writer): texts(writer) for writer in range(WRITERS)}


class SlowSocket:
    """A connection that takes what it is told to, and the rest when it is released."""

    def __init__(self) -> None:
        self.takes = 0  # bytes, at once
        self.is_writing, self.released = threading.Event(), threading.Event()
        self.taken = b""

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO()

    def send(self, data: bytes, _: int) -> int:
        self.taken += data[: self.takes]
        return min(self.takes, len(data))

    def sendall(self, data: bytes) -> None:
        self.is_writing.set()
        assert self.released.wait(PATIENCE_SECONDS)
        self.taken += data


def test_a_message_does_not_overtake_the_rest_of_another_that_is_being_written() -> None:
    slow, straight = SlowSocket(), SlowSocket()
    straight.released.set()
    engine: Channel[ToEngine] = Channel(cast(Any, slow), ToEngine)
    expected: Channel[ToEngine] = Channel(cast(Any, straight), ToEngine)
    for text in ("first", "second", "third"):
        expected.send(Fatal(message=text))

    threading.Thread(target=engine.flush_pending, daemon=True).start()
    slow.takes = 3
    engine.send_nowait(Fatal(message="first"))
    assert slow.is_writing.wait(PATIENCE_SECONDS)
    slow.takes = 1000
    engine.send_nowait(Fatal(message="second"))
    assert len(slow.taken) == 3
    slow.released.set()
    until(lambda: len(slow.taken) == len(straight.taken) - len(engine._framed(Fatal(message="third"))))
    until(lambda: not engine._pending)
    engine.send_nowait(Fatal(message="third"))
    assert slow.taken == straight.taken


def until(holds: Callable[[], bool]) -> None:
    """Return once `holds`; the bound only ends a broken test."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < give_up, "it never came to hold"
        time.sleep(0.001)


def test_who_sends_to_nobody_goes_on_and_the_writing_thread_learns_of_it(
    ends: tuple[Channel[ToEngine], Channel[FromEngine]],
) -> None:
    engine, http = ends
    http.close()
    engine.send_nowait(Fatal(message="x"))
    with pytest.raises(OSError, match="Broken pipe"):
        engine.flush_pending()

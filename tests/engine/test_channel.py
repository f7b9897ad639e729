"""The channel between the processes: messages come whole and in order, and whoever posts one never waits."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from server.engine.channel import Channel
from server.engine.protocol import Fatal, FromEngine, ToEngine

SIZE = 100_000  # characters of a message: more than a few do not fit into a socket
COUNT = 50
WRITERS = 4


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

    def post(writer: int) -> None:
        for text in texts(writer):
            engine.post(Fatal(message=text))

    posting = [threading.Thread(target=post, args=(writer,)) for writer in range(WRITERS)]
    for thread in posting:
        thread.start()
    for thread in posting:
        thread.join()  # nobody reads, and nobody waits for it

    threading.Thread(target=engine.write_what_is_left, daemon=True).start()
    came: dict[str, list[str]] = {}
    for _ in range(WRITERS * COUNT):
        message = http.receive()
        assert isinstance(message, Fatal)
        came.setdefault(message.message.partition(" ")[0], []).append(message.message)
    assert came == {str(writer): texts(writer) for writer in range(WRITERS)}


def test_who_posts_to_nobody_goes_on_and_the_writing_thread_learns_of_it(
    ends: tuple[Channel[ToEngine], Channel[FromEngine]],
) -> None:
    engine, http = ends
    http.close()
    engine.post(Fatal(message="x"))
    with pytest.raises(OSError, match="Broken pipe"):
        engine.write_what_is_left()

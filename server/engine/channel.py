"""Messages over a connected stream socket: four bytes of length, then one MessagePack frame.

A socket pair rather than a broker: the end of either process is the end of the stream for the other, at
once, which is how both learn of it. `Channel` is the engine process's side, for threads;
`AsyncChannel` is the HTTP process's side of the same bytes. Neither knows what the messages mean.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec

Incoming = TypeVar("Incoming")

_LENGTH_BYTES = 4


class Channel(Generic[Incoming]):
    """The threads' side: one calls `receive`, any may call `send_nowait`, before which one may call `send`."""

    def __init__(self, connection: socket.socket, incoming: Any) -> None:
        """`incoming` is `Incoming`, the union of the messages that may arrive: a union has no type of its own."""
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._pending: deque[bytes] = deque()  # the first of them is being written
        self._has_pending = threading.Condition()  # its lock is also that of what is sent

    def send(self, message: msgspec.Struct) -> None:
        """Write one message. Raises `OSError` when the other side is gone."""
        self._connection.sendall(self._framed(message))

    def send_nowait(self, message: msgspec.Struct) -> None:
        """Say a message without ever waiting for the other side.

        It is written here as far as the socket takes it, for a thread in between takes a twentieth of a lone stream's
        rate; what is left, or finds nobody, is `flush_pending`'s.
        """
        with self._has_pending:
            frame, written = self._framed(message), 0
            if not self._pending:
                with suppress(OSError):
                    written = self._connection.send(frame, socket.MSG_DONTWAIT)
            if written < len(frame):
                self._pending.append(frame[written:])
                self._has_pending.notify()

    def flush_pending(self) -> None:
        """Write what `send_nowait` leaves, on a thread of its own. Raises `OSError` when the other side is gone."""
        while True:
            with self._has_pending:
                while not self._pending:
                    self._has_pending.wait()
                frame = self._pending[0]
            self._connection.sendall(frame)
            with self._has_pending:
                self._pending.popleft()

    def receive(self) -> Incoming | None:
        """The next message; None when the other side is gone."""
        header = self._reader.read(_LENGTH_BYTES)
        if len(header) < _LENGTH_BYTES:
            return None
        size = int.from_bytes(header, "big")
        frame = self._reader.read(size)
        return self._decoder.decode(frame) if len(frame) == size else None

    def _framed(self, message: msgspec.Struct) -> bytes:
        frame = self._encoder.encode(message)
        return len(frame).to_bytes(_LENGTH_BYTES, "big") + frame

    def close(self) -> None:
        """Give the socket back."""
        self._reader.close()
        self._connection.close()


class AsyncChannel(Generic[Incoming]):
    """The asyncio side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: Any) -> None:
        """Use `connect`."""
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)

    @classmethod
    async def connect(cls, connection: socket.socket, incoming: Any) -> AsyncChannel[Incoming]:
        """Wrap a connected socket; the channel owns it from here."""
        reader, writer = await asyncio.open_connection(sock=connection)
        return cls(reader, writer, incoming)

    def send(self, message: msgspec.Struct) -> None:
        """Queue one message for writing; it never blocks. The other side's end shows in `receive`."""
        frame = self._encoder.encode(message)
        self._writer.write(len(frame).to_bytes(_LENGTH_BYTES, "big") + frame)

    async def receive(self) -> Incoming | None:
        """The next message; None when the other side is gone."""
        try:
            header = await self._reader.readexactly(_LENGTH_BYTES)
            return self._decoder.decode(await self._reader.readexactly(int.from_bytes(header, "big")))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def close(self) -> None:
        """Give the socket back."""
        self._writer.close()
        with suppress(ConnectionError):  # the other side went first
            await self._writer.wait_closed()

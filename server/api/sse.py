"""Server-sent events: the wire form, and a response that notices at once when its client goes away.

See https://html.spec.whatwg.org/multipage/server-sent-events.html. Payloads are JSON, so no event spans lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.disconnect import while_connected
from server.api.errors import ClientGoneError

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second keeps nginx from collecting events


def event(payload: dict[str, Any]) -> bytes:
    """One event of data."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


def error_event(payload: dict[str, Any]) -> bytes:
    """An error after the stream has begun."""
    return b"event: error\ndata: " + msgspec.json.encode(payload) + b"\n\n"


class EventStream(Response):
    """Sends what a generator of events yields, and closes it at the end, as soon as the client has gone, or when a
    client that does not read has held the stream up for too long."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes], max_seconds: float) -> None:
        """`first` is what `events` has yielded already, so that the status and the headers are certain."""
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        with suppress(ClientGoneError, TimeoutError):  # nobody is left to be told
            async with aclosing(self._events) as events, asyncio.timeout(self._max_seconds):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await while_connected(receive, self._send(events, send))

    async def _send(self, events: AsyncGenerator[bytes], send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for chunk in events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

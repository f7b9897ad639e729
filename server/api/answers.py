"""How a generation becomes an HTTP answer: one JSON document, or a stream of events.

What the documents look like is the writer's, one per route. A stream's status and headers are sent with its first
event, so that what fails before gets its own status; what fails later is an `error` event. `medley` stands in the first
and the last event.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.api.choice import Delta
from server.api.disconnect import while_connected
from server.api.errors import body_of
from server.api.generation import Generation
from server.api.sse import DONE, EventStream, error_event, event
from server.errors import RequestError

READ_GRACE_SECONDS = 30.0  # after its deadline, for a client that reads slowly


class Writer(Protocol):
    """What a route says of a generation."""

    @property
    def medley(self) -> dict[str, Any]:
        """What was really applied."""

    def whole(self, choices: list[Delta]) -> dict[str, Any]:
        """The document, without `medley`."""

    def chunk(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any] | None:
        """The event for what a step added, `first` for the choice's first event; None: nothing to tell yet."""

    def closing(self) -> dict[str, Any] | None:
        """The event after the last choice's end, if there is one."""


def json_response(document: Any, status: int = 200) -> Response:
    """A JSON document."""
    return Response(msgspec.json.encode(document), status, media_type="application/json")


async def answer(request: Request, generation: Generation, writer: Writer, *, stream: bool | None) -> Response:
    """Run the generation and answer; a client that goes away ends it at once."""
    if not stream:
        choices = await while_connected(request.receive, generation.collect())
        return json_response({**writer.whole(choices), "medley": writer.medley})
    events = _events(generation, writer)
    first = await while_connected(request.receive, anext(events))
    return EventStream(first, events, generation.seconds_left + READ_GRACE_SECONDS)


async def _events(generation: Generation, writer: Writer) -> AsyncGenerator[bytes]:
    begun: set[int] = set()  # choices
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for index, delta in deltas:
                chunk = writer.chunk(index, delta, first=index not in begun)
                if chunk is None:
                    continue
                is_last = generation.finished and writer.closing() is None
                if not begun or is_last:
                    chunk["medley"] = writer.medley
                begun.add(index)
                yield event(chunk)
        closing = writer.closing()
        if closing is not None:
            yield event({**closing, "medley": writer.medley})
        yield DONE
    except RequestError as error:
        if not begun:
            raise
        yield error_event(body_of(error))

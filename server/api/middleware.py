"""What every request passes through, as plain ASGI: its id, its line in the log, admission, and the body's bound.

    RequestContext → Admission → BodyLimit → the application

Plain ASGI, so that streams and disconnects pass through untouched.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextlib import suppress
from email.utils import formatdate

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_GONE_STATUS, REQUEST_ID_HEADER, error_response
from server.api.services import Services

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_UPLOAD = re.compile(r"POST /v1/tasks/[^/]+/versions|PUT /v1/users/[^/]+/tasks/[^/]+")
_MULTIPART_OVERHEAD = 65_536  # bytes of boundaries and headers around an upload's files
_DISCARDED_BYTES = 16 * 2**20  # of a refused body: a client that is cut off while it sends never reads the answer
_DISCARD_SECONDS = 5.0
_PROBES = {"/healthz", "/readyz", "/metrics"}  # asked every few seconds, and answered while the server drains

_log = structlog.get_logger(__name__)


class RequestContext:
    """Takes or makes the request's id, returns it, binds it for every log line, dates the answer, and writes the access
    line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()  # each request runs in a task, so a context, of its own
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started, status = time.perf_counter(), CLIENT_GONE_STATUS

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                headers["Date"] = formatdate(usegmt=True)  # RFC 9110, 6.6.1
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except Exception:
            status = 500  # answered further out
            raise
        finally:
            log = _log.debug if scope["path"] in _PROBES else _log.info
            log(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(time.perf_counter() - started, 6),
            )


class Admission:
    """Counts the requests under way and refuses new ones while the server drains."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        if self._services.draining:
            refusal = error_response("shutting_down", "the server is shutting down; ask again soon", status=503)
            await refusal(scope, receive, send)
            return
        self._services.open_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._services.open_requests -= 1


class BodyLimit:
    """Refuses a body that is too large, by its declared length or as soon as that much has come, or that takes too
    long to come."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int, seconds: float) -> None:
        """`seconds`: from the request's first line to its body's last byte."""
        self._app = app
        self._seconds = seconds
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_body_bytes
        if _UPLOAD.fullmatch(f"{scope['method']} {scope['path']}"):
            limit = self._max_upload_bytes + _MULTIPART_OVERHEAD
        message = f"the body has more than {limit} bytes, which is the server's limit"
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > limit:
            if "expect" not in headers:  # else the client has sent nothing yet and waits for our word
                await _discard(receive)
            refusal = error_response("too_large", message, status=413, headers={"Connection": "close"})
            await refusal(scope, receive, send)
            return
        received, is_complete = 0, False
        until = asyncio.get_running_loop().time() + self._seconds

        async def bounded() -> Message:
            """An `HTTPException` is what FastAPI lets through while it reads a body."""
            nonlocal received, is_complete
            if is_complete:  # what is still to come is the disconnect, whenever that is
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    part = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not come in time", {"Connection": "close"}) from None
            received += len(part.get("body", b""))
            is_complete = not part.get("more_body", False)
            if received > limit:
                if not is_complete:
                    await _discard(receive)
                raise HTTPException(413, message, {"Connection": "close"})
            return part

        await self._app(scope, bounded, send)


async def _discard(receive: Receive) -> None:
    """Take a refused body off the wire without keeping it, for a while."""
    discarded = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while discarded < _DISCARDED_BYTES:
                part = await receive()
                discarded += len(part.get("body", b""))
                if not part.get("more_body", False):
                    return

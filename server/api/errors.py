"""The one table from error codes to HTTP statuses, and the one shape of an error body.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

That is OpenAI's shape, used by every route. `type` follows from the status, `param` names the field at fault, if
there is one. A code that is not in the table is a fault of the server and answers 500.
"""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from adapters_store import Conflict, NotFound, StoreError, StoreFull, StoreUnavailable, VersionCorrupt
from server.api.metrics import Metrics
from server.errors import AdapterError, QuotaError, RequestError

RETRY_AFTER_SECONDS = 1
REQUEST_ID_HEADER = "X-Request-ID"

STATUS_BY_CODE: dict[str, int] = {
    "invalid_request": 400,
    "invalid_json": 400,
    "unknown_field": 400,
    "unsupported": 400,
    "invalid_template": 400,
    "no_chat_template": 400,
    "no_tokenizer": 400,
    "context_length_exceeded": 400,
    "empty_prompt": 400,
    "missing_file": 400,
    "unknown_file": 400,
    "not_safetensors": 400,
    "bad_config": 400,
    "unsupported_method": 400,
    "not_finite": 400,
    "customization_limit": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "model_not_found": 404,
    "task_not_found": 404,
    "version_not_found": 404,
    "canary_not_found": 404,
    "user_not_found": 404,
    "customization_not_found": 404,
    "file_not_found": 404,
    "method_not_allowed": 405,
    "base_mismatch": 409,
    "cannot_compose": 409,
    "reserved": 409,
    "no_active_version": 409,
    "version_active": 409,
    "version_canary": 409,
    "no_previous": 409,
    "public_name_taken": 409,
    "pins_too_large": 409,
    "body_timeout": 408,
    "changed_meanwhile": 412,
    "too_large": 413,
    "unsupported_media_type": 415,
    "queue_full": 429,
    "quota_exceeded": 429,
    "too_many_uploads": 429,
    "internal_error": 500,
    "not_finite_logits": 500,
    "adapter_unavailable": 503,
    "version_corrupt": 503,
    "engine_dead": 503,
    "not_ready": 503,
    "shutting_down": 503,
    "store_unavailable": 503,
    "deadline_exceeded": 504,
    "adapter_too_large": 507,
    "store_full": 507,
}

_CODE_BY_STATUS = {404: "not_found", 405: "method_not_allowed", 408: "body_timeout", 413: "too_large"}
_TYPE_BY_STATUS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CLIENT_GONE_STATUS = 499  # nobody reads it; the access log and the metrics do

_log = structlog.get_logger(__name__)


class ClientGoneError(Exception):
    """The client went away before its answer was complete; nobody is there to be told."""


def status_of(error: RequestError) -> int:
    """The HTTP status of an error. A refused upload is the upload's own fault (400), whatever its code means
    elsewhere, but for its size, and for what fails on the server's side: a task's damaged adapter beneath it, say."""
    if isinstance(error, AdapterError) and error.code != "too_large":
        status = STATUS_BY_CODE.get(error.code, 400)
        return status if status >= HTTPStatus.INTERNAL_SERVER_ERROR else 400
    return STATUS_BY_CODE.get(error.code, 500)


def error_body(code: str, message: str, param: str | None, status: int) -> dict[str, Any]:
    """The body of an error, for a response or an `error` event."""
    return {"error": {"message": message, "type": _type_of(status), "param": param, "code": code}}


def body_of(error: RequestError) -> dict[str, Any]:
    """The body of a `RequestError`."""
    return error_body(error.code, error.message, error.param, status_of(error))


def error_response(
    code: str, message: str, param: str | None = None, *, status: int, headers: dict[str, str] | None = None
) -> Response:
    """An error as a response; 401 says how to come, 429 and 503 when to come back."""
    sent = dict(headers or {})
    if status == HTTPStatus.UNAUTHORIZED:
        sent["WWW-Authenticate"] = "Bearer"
    if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
        sent.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    content = msgspec.json.encode(error_body(code, message, param, status))
    return Response(content, status, sent, media_type="application/json")


def request_error_of(error: StoreError) -> RequestError:
    """What the store says, in the words of the contract."""
    match error:
        case StoreUnavailable():
            return RequestError("store_unavailable", str(error))
        case StoreFull():
            return RequestError("store_full", str(error))
        case NotFound():
            return RequestError(f"{error.what}_not_found", str(error), "task")
        case Conflict():
            return RequestError(error.code, str(error))
        case VersionCorrupt():
            return RequestError("version_corrupt", str(error))
        case _:
            return RequestError("internal_error", str(error))


def install(app: FastAPI, metrics: Metrics) -> None:
    """Give the application its handlers: every way in which a request can fail ends here."""

    async def on_store_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, StoreError)
        if isinstance(error, StoreUnavailable):
            metrics.store_error()
        return await _on_request_error(request, request_error_of(error))

    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(StoreError, on_store_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGoneError, _on_client_gone)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.add_exception_handler(Exception, _on_unforeseen)


def validation_fault(error: Mapping[str, Any]) -> RequestError:
    """One entry of pydantic's list as an error that names the field."""
    place = [str(part) for part in error["loc"]]
    if place and place[0] in {"body", "query", "path", "header"}:
        place = place[1:]
    if error["type"] == "json_invalid":
        return RequestError("invalid_json", f"the body is not JSON: {error['ctx']['error']} at byte {place[0]}")
    param = ".".join(place) or None
    if error["type"] == "extra_forbidden":
        return RequestError("unknown_field", f"unknown field: {param}", param)
    if error["type"] == "model_attributes_type" and not param:
        return RequestError("invalid_request", "the body is a JSON object, sent as Content-Type: application/json")
    code = "unsupported" if error["type"] == "unsupported" else "invalid_request"
    message = str(error["msg"]).removeprefix("Value error, ")
    return RequestError(code, f"{param}: {message}" if param else f"the body: {message}", param)


def _type_of(status: int) -> str:
    if status in _TYPE_BY_STATUS:
        return _TYPE_BY_STATUS[status]
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QuotaError) else None
    return error_response(error.code, error.message, error.param, status=status_of(error), headers=headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _on_request_error(request, validation_fault(error.errors()[0]))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODE_BY_STATUS.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal_error")
    message = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"there is nothing at {request.method} {request.url.path}; see /docs"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.url.path} does not take {request.method}"
    headers = dict(error.headers) if error.headers else None
    return error_response(code, message, status=error.status_code, headers=headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    _log.error("request failed by a fault of the server", exc_info=error)
    headers = {
        REQUEST_ID_HEADER: request.state.request_id,  # the middleware that adds these two has been left already
        "Date": formatdate(usegmt=True),
        "Connection": "close",  # the HTTP server closes it after a fault, and a client is to know
    }
    return error_response("internal_error", "the server made a mistake; its log says more", status=500, headers=headers)

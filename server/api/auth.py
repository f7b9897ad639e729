"""Who calls, and what they may do: API keys as bearer tokens, and the scope that each route asks for.

A route states its scope beside its path, and is refused at import if it states none:

    router = APIRouter(route_class=GuardedRoute)

    @router.post("/v1/completions")
    @needs("invoke")
    async def complete(body: CompletionBody, caller: TheCaller, …)

The guard stands before the body is read. A key is checked (401 `unauthorized`), its scope (403 `forbidden`) and its
quotas (429 `quota_exceeded`), in this order; whether what was asked for exists is looked at after that, and for what
is another tenant's the answer is that of what nobody has (`server.api.tenancy`). Without `--auth` every caller is the
default tenant with all scopes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import Depends, Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from adapters_store import KeyScope
from server.api.caller import Caller
from server.api.services import Services
from server.errors import RequestError

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_scope_of: dict[Callable[..., Any], KeyScope | None] = {}
# For the OpenAPI document alone: the guard has looked at the header before.
_documented = Depends(HTTPBearer(auto_error=False, description="an API key; only servers with `--auth` ask for one"))


def needs(key_scope: KeyScope) -> Callable[[Endpoint], Endpoint]:
    """Declare the scope that a route's caller has to have."""

    def declare(endpoint: Endpoint) -> Endpoint:
        _scope_of[endpoint] = key_scope
        return endpoint

    return declare


def open_to_all(endpoint: Endpoint) -> Endpoint:
    """Declare that a route asks for no key, and counts for none."""
    _scope_of[endpoint] = None
    return endpoint


class GuardedRoute(APIRoute):
    """A route behind the guard. See the module."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if endpoint not in _scope_of:
            raise TypeError(f"{path}: declare @needs(scope) or @open_to_all between the path and the function")
        self.key_scope = _scope_of[endpoint]
        if self.key_scope is not None:
            options["dependencies"] = [*(options.get("dependencies") or ()), _documented]
        super().__init__(path, endpoint, **options)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call. What the request has used is charged before its last byte is sent, so that whoever has the
        answer also has the place that it took."""
        if self.key_scope is None or (self.methods and scope["method"] not in self.methods):
            await super().handle(scope, receive, send)
            return
        services: Services = scope["app"].state.services
        try:
            caller = await identify(services, Headers(scope=scope), scope["state"]["request_id"])
            caller.require(self.key_scope)
            admitted = await services.quotas.admit(caller)
        except RequestError as error:
            services.metrics.refused(error.code)
            raise
        scope["state"]["caller"] = caller

        async def settled(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await services.quotas.settle(admitted)
            await send(message)

        try:
            await super().handle(scope, receive, settled)
        finally:
            await services.quotas.settle(admitted)


async def identify(services: Services, headers: Headers, request_id: str = "") -> Caller:
    """The caller. Raises `RequestError` `unauthorized`; `StoreUnavailable` for a key that cannot be looked up now."""
    if not services.settings.auth:
        return Caller(request_id=request_id)
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        message = "an API key is needed, in the header Authorization: Bearer mk_…; client commands take MEDLEY_API_KEY"
        raise RequestError("unauthorized", message)
    key = await services.api_keys.get(text.strip())
    if key is None:
        raise RequestError("unauthorized", "this API key is not known, or was revoked")
    structlog.contextvars.bind_contextvars(key=key.id)
    return Caller(tenant=key.tenant, key_id=key.id, scopes=key.scopes, quotas=key.quotas, request_id=request_id)


async def _caller(request: Request) -> Caller:
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


TheCaller = Annotated[Caller, Depends(_caller)]

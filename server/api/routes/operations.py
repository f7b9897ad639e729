"""Whether the server lives, whether it serves, and its figures."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import RedirectResponse, Response

from server.api.answers import json_response
from server.api.auth import GuardedRoute, TheCaller, needs, open_to_all
from server.api.errors import error_response
from server.api.metrics import CONTENT_TYPE
from server.api.routes import examples
from server.api.routes.dependencies import TheServices

router = APIRouter(tags=["operations"], route_class=GuardedRoute)


@router.get("/", include_in_schema=False)
@open_to_all
async def root() -> Response:
    """A person with a browser finds the documentation."""
    return RedirectResponse("/docs")


@router.get("/healthz", summary="The process answers", responses=examples.answers({"status": "ok"}))
@open_to_all
async def healthz() -> Response:
    """200 as long as the HTTP process runs, whatever the engine does."""
    return json_response({"status": "ok"})


@router.get("/readyz", summary="The server can serve", responses=examples.answers({"status": "ready", "redis": "ok"}))
@open_to_all
async def readyz(services: TheServices) -> Response:
    """200 when the base is loaded, the engine steps and start-up's tasks are published; else 503.

    `redis` is `away` while Redis cannot be reached. That makes no server unready: all servers of an index would be so
    together, while each of them serves the tasks that it knows.
    """
    reason = services.why_not_ready()
    if reason is not None:
        return error_response("not_ready", reason, status=503)
    return json_response({"status": "ready", "redis": "ok" if services.directory.available else "away"})


@router.get(
    "/metrics",
    summary="Figures for Prometheus",
    responses={200: {"description": "Prometheus' text format", "content": {"text/plain": {"example": "…"}}}},
)
@needs("admin")
async def metrics(services: TheServices, caller: TheCaller) -> Response:
    """Every figure; the names are in `server.api.metrics`. For admins of the default tenant: labels name all tasks."""
    caller.require_operator()
    content = services.metrics.render(
        services.open_requests,
        redis_available=services.directory.available,
        pins_left_out=services.pins.left_out,
    )
    return Response(content, headers={"Content-Type": CONTENT_TYPE})

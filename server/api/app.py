"""The application: routes, error handlers and middleware around the services that it is given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata

import structlog
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.api import errors
from server.api.middleware import Admission, BodyLimit, RequestContext
from server.api.routes import (
    chat,
    classify,
    completions,
    generate,
    history,
    methods,
    models,
    operations,
    score,
    tasks,
    users,
    versions,
)
from server.api.services import Services

_log = structlog.get_logger(__name__)


def create_app(services: Services) -> FastAPI:
    """The ASGI application. It answers before the engine is ready: see `Services`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        keepers = [
            asyncio.create_task(services.last_used.run(), name="last use of tasks"),
            asyncio.create_task(services.quotas.run(), name="leases of requests"),
            asyncio.create_task(services.pins.run(services.pinning_engine), name="pins"),
        ]
        yield
        for keeper in keepers:
            keeper.cancel()
        for keeper, outcome in zip(keepers, await asyncio.gather(*keepers, return_exceptions=True), strict=True):
            if isinstance(outcome, Exception):
                _log.error("a keeper died", keeper=keeper.get_name(), exc_info=outcome)
        await services.last_used.flush()

    app: FastAPI = FastAPIOffline(
        title="Medley",
        summary="Many tasks from one frozen language model",
        version=metadata.version("medley"),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.services = services
    answering = (operations, models, methods, completions, chat, generate, score, classify)
    for room in (*answering, tasks, versions, history, users):
        app.include_router(room.router)
    errors.install(app, services.metrics)
    settings = services.settings
    app.add_middleware(
        BodyLimit,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        seconds=settings.request_timeout,
    )
    app.add_middleware(Admission, services=services)
    app.add_middleware(RequestContext)  # added last: outermost
    return app

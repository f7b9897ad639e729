"""The application: routes, error handlers and middleware around the services that it is given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import metadata

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.api import errors
from server.api.middleware import Admission, BodyLimit, RequestContext
from server.api.routes import chat, classify, completions, generate, methods, models, operations, score, tasks, versions
from server.api.services import Services


def create_app(services: Services) -> FastAPI:
    """The ASGI application. It answers before the engine is ready: see `Services`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        writer = asyncio.create_task(services.last_used.run(), name="last use of tasks")
        yield
        writer.cancel()
        with suppress(asyncio.CancelledError):
            await writer
        await services.last_used.flush()

    app: FastAPI = FastAPIOffline(
        title="Medley",
        summary="Many tasks from one frozen language model",
        version=metadata.version("medley"),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.services = services
    for room in (operations, models, methods, completions, chat, generate, score, classify, tasks, versions):
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

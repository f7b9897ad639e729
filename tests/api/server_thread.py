"""A started HTTP server for the tests: real sockets, a real Redis, and an engine at the other end of a socket pair."""

from __future__ import annotations

import asyncio
import socket
import threading
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from adapters_store import LocalBlobs, RedisIndex, TaskDirectory
from server.api import LastUsed, Metrics, Services, create_app
from server.engine.client import EngineClient
from server.engine.protocol import BaseFacts, Configure
from server.settings import Settings

Result = TypeVar("Result")


class ServerThread:
    """The HTTP side in a thread with an event loop of its own; each has an index of its own in the shared Redis."""

    def __init__(
        self,
        redis_url: str,
        connection: socket.socket,
        configure: Configure,
        *,
        namespace: str | None = None,
        **settings: Any,
    ) -> None:
        """`connection` leads to the engine; servers of one `namespace` share an index."""
        self.namespace = uuid.uuid4().hex if namespace is None else namespace
        self._redis_url = redis_url
        self._connection = connection
        self._configure = configure
        self._settings = Settings(**settings)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="http-server", daemon=True)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.services: Services
        self.facts: BaseFacts
        self.loop: asyncio.AbstractEventLoop

    def __enter__(self) -> ServerThread:
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def wait_for(self, call: Coroutine[Any, Any, Result]) -> Result:
        """Run something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(call, self.loop).result()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        index = await RedisIndex.connect(self._redis_url, namespace=self.namespace)
        directory = TaskDirectory(index)
        await directory.start()
        metrics = Metrics()
        self.services = Services(
            settings=self._settings,
            index=index,
            directory=directory,
            blobs=LocalBlobs(Path(self._configure.blobs)),
            metrics=metrics,
            last_used=LastUsed(index),
        )
        engine = await EngineClient.connect(self._connection, on_step=metrics.step)
        try:
            self.facts = await engine.start(self._configure)
            self.services.serve(engine, self.facts)
            self.services.ready = True
            await self._listen()
        finally:
            await engine.close()
            await directory.stop()
            await index.close()

    async def _listen(self) -> None:
        self.app = create_app(self.services)
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, date_header=False, timeout_graceful_shutdown=5
        )
        self._server = _Server(config, self._started)
        await self._server.serve(sockets=[self._listener])


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, listening: threading.Event) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening.set()

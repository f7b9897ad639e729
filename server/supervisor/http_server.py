"""The HTTP server (uvicorn) inside this process's event loop, with signals and start order left to the supervisor."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from server.errors import StartupError

# Longer than common clients keep an idle connection, so that theirs is the side that closes it.
KEEP_ALIVE_SECONDS = 75
CLOSE_SECONDS = 5  # for answers that are under way when it stops; draining is over by then
BACKLOG = 2048


def listen(host: str, port: int, *, beyond_loopback: bool) -> socket.socket:
    """A listening socket. Raises `StartupError` when the address cannot be had, or, unless `beyond_loopback`, when
    others than this machine's own users could reach it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not beyond_loopback and not _is_loopback(str(address[0])):
            raise StartupError(
                f"--host {host} lets other machines in, and without keys each of them may do everything: ask for keys "
                "with --auth (`medley keys create` makes them), or, where the network is trusted, give --insecure"
            )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        message = f"cannot listen on {host} port {port}: {error.strerror}; choose another with --host and --port"
        raise StartupError(message) from error
    return listener


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback  # what follows "%" is an interface


def url_of(listener: socket.socket) -> str:
    """The URL of a listening socket, with its real port."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer:
    """Serves an application on a listening socket."""

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,  # the loggers are configured already
            access_log=False,  # the application writes its own
            lifespan="on",
            ws="none",
            server_header=False,
            date_header=False,  # the application writes its own
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        self._server = _Server(config)
        self._listener = listener
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when it answers."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="http server")
        answering = asyncio.create_task(self._server.answering.wait())
        await asyncio.wait([self._serving, answering], return_when=asyncio.FIRST_COMPLETED)
        answering.cancel()
        if self._serving.done():
            await self._serving
            raise StartupError("the HTTP server did not start; its log lines above say why")

    async def stop(self) -> None:
        """Close the listening socket, let answers under way end within `CLOSE_SECONDS`, close all connections."""
        self._server.request_exit()
        if self._serving is not None:
            await self._serving


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers and its clock, and with an event for the end of its start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()
        self._exit_requested = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.answering.set()

    def request_exit(self) -> None:
        """End it."""
        self.should_exit = True  # for uvicorn, which looks at it until the loop begins
        self._exit_requested.set()

    async def main_loop(self) -> None:
        """Wait for the end. uvicorn's own looks for it ten times a second, and keeps the answers' `Date`."""
        await self._exit_requested.wait()

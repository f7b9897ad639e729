"""The life of a server: start, serve, drain, stop. The order is the package's docstring; the parts know no order."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from uvicorn.loops.auto import auto_loop_factory

from adapters_store import (
    BlobStore,
    BucketRefused,
    DataFolder,
    GarbageCollector,
    RedisIndex,
    StoreError,
    StoreUnavailable,
    TaskDirectory,
)
from server.api import LastUsed, Metrics, Services, create_app
from server.errors import MedleyError, RequestError, StartupError
from server.logs import configure_logging
from server.settings import Settings
from server.supervisor.configuration import blob_store, engine_configuration
from server.supervisor.demo_tasks import commands_to_try, publish_demo
from server.supervisor.engine_child import EngineChild
from server.supervisor.http_server import HttpServer, listen, url_of
from server.supervisor.redis_child import RedisChild
from server.supervisor.signals import StopSignals

_DRAIN_POLL_SECONDS = 0.05
_ERRORS_OUT_SECONDS = 5.0  # for the errors of requests whose engine died

_log = structlog.get_logger(__name__)


@dataclass
class _Running:
    """What the rest of the life needs of a server that has started."""

    services: Services
    engine: EngineChild


def run(settings: Settings) -> int:
    """Run a server until a signal ends it; the exit status.

    Raises `StartupError` when it cannot start as configured, `MedleyError` when its engine died.
    """
    configure_logging(settings.log_level, settings.log_format)
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(_live(settings))


async def _live(settings: Settings) -> int:
    async with AsyncExitStack() as parts:
        signals = parts.enter_context(StopSignals())
        starting = asyncio.create_task(_start(settings, parts), name="start")
        await _first_of(signals.first.wait(), asyncio.wait([starting]))
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
            return 0
        running = starting.result()
        ended = asyncio.create_task(running.engine.ended(), name="engine's end")
        await _first_of(signals.first.wait(), asyncio.wait([ended]))
        if ended.done():
            return await _give_up(running.services, ended.result())
        ended.cancel()
        return await _drain(running, signals.second)


async def _start(settings: Settings, parts: AsyncExitStack) -> _Running:
    """Start everything; what has started is in `parts`, last in first out. Raises `StartupError`."""
    try:
        with _usable_data_folder(settings):
            data = parts.enter_context(DataFolder(settings.data_dir))
        listener = parts.enter_context(
            listen(settings.host, settings.port, beyond_loopback=settings.auth or settings.insecure)
        )
        metrics = Metrics()
        engine = await EngineChild.spawn(engine_configuration(settings, data), metrics.step)
        parts.push_async_callback(engine.stop)
        with _usable_data_folder(settings):
            services = await _open_store(settings, data, metrics, parts)
        http = HttpServer(create_app(services), listener)
        parts.push_async_callback(http.stop)
        await http.start()
        services.serve(engine.client, await engine.ready())
        url = url_of(listener)
        if settings.model is None:
            await publish_demo(services, data.path / "demo-incomplete")
    except (StoreError, RequestError) as error:
        raise StartupError(str(error)) from error
    services.ready = True
    _announce(url, demo=settings.model is None)
    return _Running(services, engine)


@contextmanager
def _usable_data_folder(settings: Settings) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StartupError(f"the data folder {settings.data_dir} cannot be used: {error}; see --data-dir") from error


async def _open_store(settings: Settings, data: DataFolder, metrics: Metrics, parts: AsyncExitStack) -> Services:
    """Redis, the index in it, its mirror, and the files."""
    redis_url = settings.redis_url
    if redis_url is None:
        redis = RedisChild(data.redis)
        parts.push_async_callback(redis.stop)
        await redis.start()
        redis_url = redis.url
    try:
        index = await RedisIndex.connect(redis_url)
    except (StoreUnavailable, ValueError) as error:  # the latter: what is no URL of a Redis
        raise StartupError(f"{error}; see --redis-url") from error
    parts.push_async_callback(index.close)
    directory = TaskDirectory(index)
    await directory.start()
    parts.push_async_callback(directory.stop)
    if settings.auth and not await index.api_keys.list():
        own = settings.redis_url is None
        where = ["--data-dir", str(settings.data_dir.resolve())] if own else ["--redis-url", index.url]
        command = f"medley keys create NAME {shlex.join(where)}"
        _log.warning(f"there is no API key yet, so nobody is let in; make one with `{command}`")
    blobs = blob_store(settings, data)
    await asyncio.to_thread(_check_blobs, blobs)
    await asyncio.to_thread(blobs.sweep)
    collector = GarbageCollector(index.garbage, blobs, settings.garbage_grace)
    parts.push_async_callback(_end, asyncio.create_task(collector.run_forever(), name="garbage collector"))
    return Services(settings, index, directory, blobs, metrics, LastUsed(index))


def _check_blobs(blobs: BlobStore) -> None:
    """A bucket that refuses is a mistake in the configuration; one that is away may come back, as it may later on."""
    try:
        blobs.check()
    except BucketRefused:
        raise
    except StoreUnavailable as error:
        _log.warning(
            "the blob store is away; only adapters that were used here before can be served", reason=str(error)
        )


async def _end(task: asyncio.Task[None]) -> None:
    while not task.done():  # a call to Redis may take a cancellation for its own timeout: then it is told again
        task.cancel()
        await asyncio.wait([task], timeout=1.0)


def _announce(url: str, *, demo: bool) -> None:
    """The one thing that goes to stdout."""
    lines = [f"Medley is ready at {url}"]
    if demo:
        lines += ["Try:", *(f"  {command}" for command in commands_to_try(url))]
    print("\n".join(lines), flush=True)


async def _drain(running: _Running, hurry: asyncio.Event) -> int:
    """Refuse what is new, let what runs finish; what does not in time ends with an error."""
    services = running.services
    services.draining = True
    _log.info("stopping: requests under way may finish", open_requests=services.open_requests)
    await _quiet(services, services.settings.drain_timeout, hurry)
    if services.open_requests:
        _log.warning("stopping: requests are cut off", open_requests=services.open_requests)
        await running.engine.client.close()  # each of them gets its error while HTTP still answers
    return 0


async def _give_up(services: Services, reason: str) -> int:
    """The engine is gone: its requests have got their errors; see them out, then end the server with the reason."""
    services.draining = True
    await _quiet(services, _ERRORS_OUT_SECONDS, asyncio.Event())
    raise MedleyError(f"{reason}; the server stops, start it again")


async def _quiet(services: Services, seconds: float, hurry: asyncio.Event) -> None:
    """Wait until no request is open, for at most so long and not once `hurry` is set."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + seconds
    # Looked at now and then, so that requests need not signal their end on a server that is not stopping.
    while services.open_requests and not hurry.is_set() and loop.time() < give_up:  # noqa: ASYNC110
        await asyncio.sleep(_DRAIN_POLL_SECONDS)


async def _first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    """Return when the first of them does; the others are given up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()

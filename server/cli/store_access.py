"""Index and blobs, opened by a command itself: for what is done without a server, or before there is one.

With `--redis-url` it is that Redis. Without, it is the private Redis in the data folder: the running server's, by its
socket, or, when no server runs, one that is started for the command. The options are those of `medley serve`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated

import typer
from pydantic import ValidationError

from adapters_store import (
    BlobStore,
    DataFolder,
    DataFolderLocked,
    PrivateRedis,
    RedisIndex,
    StoreError,
    blobs_url,
    open_blobs,
)
from server.cli.errors import CommandError
from server.settings import GIB, Settings

RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url", help="The index, as for `medley serve` (default: MEDLEY_REDIS_URL).", show_default=False
    ),
]
Store = Annotated[
    str | None,
    typer.Option("--store", help="The files, as for `medley serve` (default: MEDLEY_STORE).", show_default=False),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        "--data-dir",
        help="The server's folder, as for `medley serve` (default: MEDLEY_DATA_DIR, else medley-data).",
        show_default=False,
    ),
]


def settings_of(**given: str | None) -> Settings:
    """The server's settings, as `medley serve` with these options would have them. Raises `typer.BadParameter`."""
    try:
        return Settings.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0])
        source = f"--{name.replace('_', '-')}" if name in given else f"MEDLEY_{name.upper()}"
        raise typer.BadParameter(f"{wrong['msg']}, got {wrong['input']!r}", param_hint=source) from None


@asynccontextmanager
async def open_index(settings: Settings) -> AsyncIterator[RedisIndex]:
    """The index that a server with these settings uses or would use. Raises `CommandError`, also for what the block
    raises as a `StoreError`."""
    try:
        async with AsyncExitStack() as parts:
            url = settings.redis_url or _private_url(settings, parts)
            index = await RedisIndex.connect(url)
            parts.push_async_callback(index.close)
            yield index
    except StoreError as error:
        raise CommandError(str(error)) from error
    except ValueError as error:  # what is no URL of a Redis
        raise CommandError(f"{error}; see --redis-url") from error


@asynccontextmanager
async def open_store(settings: Settings) -> AsyncIterator[tuple[RedisIndex, BlobStore]]:
    """As `open_index`, with the blobs that belong to it."""
    async with open_index(settings) as index:
        data = settings.data_dir.resolve()
        try:
            url = str(data / "blobs") if settings.store is None else blobs_url(settings.store)
        except ValueError as error:
            raise CommandError(f"--store: {error}") from error
        try:
            blobs = open_blobs(url, data / "blob-cache", int(settings.store_cache * GIB))
        except OSError as error:
            raise CommandError(f"the store {url} cannot be used: {error}; see --store") from error
        yield index, blobs


def _private_url(settings: Settings, parts: AsyncExitStack) -> str:
    """Where the private Redis listens, which is started where no server runs."""
    try:
        data = parts.enter_context(DataFolder(settings.data_dir))
    except DataFolderLocked:
        return PrivateRedis(settings.data_dir / "redis").url
    except OSError as error:
        message = f"the data folder {settings.data_dir} cannot be used: {error}; see --data-dir"
        raise CommandError(message) from error
    redis = PrivateRedis(data.redis)
    redis.start()
    parts.callback(redis.stop)
    return redis.url

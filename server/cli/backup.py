"""`medley backup` and `medley restore`: index and files as one file. They open both themselves, as `gc` does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.filesize import decimal

from adapters_store import BackupTotals, restore_backup, write_backup
from server.cli.errors import CommandError
from server.cli.store_access import DataDir, RedisUrl, Store, open_store, settings_of
from server.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; it must not exist.")],
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    store: Store = None,
    data_dir: DataDir = None,
) -> None:
    """Write all tasks, versions, customizations, keys and their files to one file. Servers may run meanwhile.

    The file holds the hashes of API keys and every adapter: only its owner can read it.
    """
    totals = asyncio.run(_backup(settings_of(redis_url=redis_url, store=store, data_dir=data_dir), file))
    _say("saved", totals, as_json)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `medley backup` wrote.")],
    adopt: Annotated[
        bool,
        typer.Option("--adopt", help="Take over a store of another index, whose own files are garbage from then on."),
    ] = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    store: Store = None,
    data_dir: DataDir = None,
) -> None:
    """Make an empty index what a backup holds; nothing is to be seen of it before all of it is there.

    Stopped before its end, it has changed nothing that servers see; run it again.
    """
    settings = settings_of(redis_url=redis_url, store=store, data_dir=data_dir)
    totals = asyncio.run(_restore(settings, file, adopt=adopt))
    _say("restored", totals, as_json)


async def _backup(settings: Settings, file: Path) -> BackupTotals:
    async with open_store(settings) as (index, blobs):
        try:
            return await write_backup(index, blobs, file)
        except FileExistsError as error:
            raise CommandError(f"{error}; choose another name") from error
        except OSError as error:
            raise CommandError(f"the backup cannot be written: {error}") from error


async def _restore(settings: Settings, file: Path, *, adopt: bool) -> BackupTotals:
    async with open_store(settings) as (index, blobs):
        try:
            return await restore_backup(index, blobs, file, adopt=adopt)
        except OSError as error:
            raise CommandError(f"the backup cannot be restored: {error}") from error


def _say(done: str, totals: BackupTotals, as_json: bool) -> None:
    if as_json:
        print(json.dumps(msgspec.to_builtins(totals), indent=2))
        return
    print(
        f"{done}: {totals.tasks} tasks with {totals.versions} versions, {totals.customizations} customizations, "
        f"{totals.api_keys} API keys, {totals.blobs} files ({decimal(totals.bytes)})"
    )

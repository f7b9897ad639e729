"""`medley gc`: what servers do once an hour, now. It opens index and blobs itself, with or without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer
from rich.filesize import decimal

from adapters_store import GarbageCollector, GarbageReport
from server.cli.store_access import DataDir, RedisUrl, Store, open_store, settings_of
from server.settings import Settings


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="How long a file must have been of no use (default: MEDLEY_GARBAGE_GRACE, else a day).",
            show_default=False,
        ),
    ] = None,
    adopt: Annotated[
        bool,
        typer.Option("--adopt", help="Take over a store of another index; what this one does not need goes."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    redis_url: RedisUrl = None,
    store: Store = None,
    data_dir: DataDir = None,
) -> None:
    """Delete the stored files that no version and no customization needs. Uploads may go on beside it."""
    given = None if grace is None else str(grace)
    settings = settings_of(redis_url=redis_url, store=store, data_dir=data_dir, garbage_grace=given)
    report = asyncio.run(_collect(settings, dry_run=dry_run, adopt=adopt))
    if as_json:
        print(json.dumps(report._asdict(), indent=2))
        return
    print(f"{report.stored} files are stored; {report.unnamed} of them ({decimal(report.unnamed_bytes)}) nobody needs")
    waiting = report.unnamed - report.due
    what = "would be deleted" if dry_run else "deleted"
    print(f"{what}: {report.due} ({decimal(report.due_bytes)}); within their grace: {waiting}")


async def _collect(settings: Settings, *, dry_run: bool, adopt: bool) -> GarbageReport:
    async with open_store(settings) as (index, blobs):
        collector = GarbageCollector(index.garbage, blobs, settings.garbage_grace)
        return await (collector.survey(adopt=adopt) if dry_run else collector.collect(adopt=adopt))

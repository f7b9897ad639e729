"""The commands on API keys: `keys create`, `keys list`, `keys revoke`. They open the index: the first key needs none.

Running servers learn of a change by the change feed, within a second.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Annotated, Any

import msgspec
import typer

from adapters_store import ID_PATTERN, MAX_QUOTA, ApiKey, KeyScope, Quotas
from server.cli.store_access import DataDir, RedisUrl, open_index, settings_of
from server.cli.table import ago, print_table
from server.settings import Settings

app = typer.Typer(help="Make, list and revoke API keys, for servers with --auth.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def _quota(option: str, text: str) -> Any:
    return typer.Option(
        option, min=1, max=MAX_QUOTA, metavar="N", help=f"{text} (default: any number).", show_default=False
    )


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, for the list of keys.")],
    scope: Annotated[
        KeyScope, typer.Option(help="What it allows: to use tasks, also to change tasks and users, or everything.")
    ] = "invoke",
    tenant: Annotated[str, typer.Option(help="Whose tasks and users it sees (default: the default tenant's).")] = "",
    requests_per_minute: Annotated[int | None, _quota("--requests-per-minute", "HTTP requests in 60 seconds")] = None,
    concurrent_requests: Annotated[int | None, _quota("--concurrent-requests", "HTTP requests at once")] = None,
    tokens_per_day: Annotated[int | None, _quota("--tokens-per-day", "Tokens of prompts and answers in a day")] = None,
    stored_bytes: Annotated[int | None, _quota("--stored-bytes", "Bytes of adapters that it uploaded")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it. It is shown this once: the index keeps its hash alone."""
    if tenant and not re.fullmatch(ID_PATTERN, tenant):
        raise typer.BadParameter(
            f"{tenant!r} is no tenant: letters, digits and ._:- (at most 128)", param_hint="--tenant"
        )
    if not name.strip():
        raise typer.BadParameter("it is empty; say whose key it is, for the list of keys", param_hint="NAME")
    quotas = Quotas(
        requests_per_minute=requests_per_minute,
        concurrent_requests=concurrent_requests,
        tokens_per_day=tokens_per_day,
        stored_bytes=stored_bytes,
    )
    settings = settings_of(redis_url=redis_url, data_dir=data_dir)
    key, text = asyncio.run(_create(settings, name, scope, tenant, quotas))
    print(json.dumps({**_key_json(key), "key": text}, indent=2) if as_json else text)


@app.command("list")
def list_keys(as_json: AsJson = False, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """List the keys that are not revoked."""
    keys = asyncio.run(_list(settings_of(redis_url=redis_url, data_dir=data_dir)))
    if as_json:
        print(json.dumps([_key_json(key) for key in keys], indent=2))
        return
    rows = [[key.id, key.name, key.tenant, ", ".join(key.scopes), _said(key.quotas), ago(key.created)] for key in keys]
    print_table(["key", "name", "tenant", "scopes", "quotas", "created"], rows)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key's id, as `medley keys list` shows it.")],
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key invalid, on all servers within a second. What it uploaded stays."""
    asyncio.run(_revoke(settings_of(redis_url=redis_url, data_dir=data_dir), key))
    print(f"revoked {key}")


async def _create(settings: Settings, name: str, scope: KeyScope, tenant: str, quotas: Quotas) -> tuple[ApiKey, str]:
    async with open_index(settings) as index:
        where = f"of {settings.data_dir.resolve()}" if settings.redis_url is None else f"at {index.url}"
        print(f"the key is made in the index {where}", file=sys.stderr)
        return await index.api_keys.create(name, [scope], tenant=tenant, quotas=quotas)


async def _list(settings: Settings) -> list[ApiKey]:
    async with open_index(settings) as index:
        return await index.api_keys.list()


async def _revoke(settings: Settings, key_id: str) -> None:
    async with open_index(settings) as index:
        await index.api_keys.revoke(key_id)


def _key_json(key: ApiKey) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(key)
    return document


def _said(quotas: Quotas) -> str:
    """The quotas that there are."""
    given = msgspec.to_builtins(quotas)
    return ", ".join(f"{name.replace('_', ' ')}: {amount}" for name, amount in given.items())

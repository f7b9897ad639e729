"""API keys: who may call, for which tenant, and how much. Only a key's hash is stored; its text is shown once.

A key's text is `mk_` and 43 url-safe characters (256 random bits), so that a plain sha256 of it can neither be reversed
nor guessed. `ApiKeys` writes and reads them in Redis; servers look callers up in an `ApiKeyDirectory`.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec

from adapters_store.errors import NotFound
from adapters_store.index.connection import redis_errors
from adapters_store.index.scripts import Scripted
from adapters_store.records import BY_NOBODY

KeyScope = Literal["invoke", "publish", "admin"]
"""What a key allows: to have tasks answer and to read them; also to change tasks, versions and users; everything.
Each contains the ones before it."""
KEY_SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
MAX_QUOTA = 2**53
"""Redis' scripts count with doubles, and these are exact up to here."""


class Quotas(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How much a key may use, 1 to `MAX_QUOTA` of each; None: any amount."""

    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None  # of prompts and answers
    stored_bytes: int | None = None  # of versions and customizations that it uploaded


class NewApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as its maker describes it. `tenant` "" is the default tenant."""

    id: str
    name: str
    tenant: str = ""
    scopes: tuple[KeyScope, ...]
    quotas: Quotas = Quotas()


class ApiKey(NewApiKey, frozen=True, kw_only=True):
    """A key as it is stored. `id` is no secret: it stands in logs and histories, and revokes the key."""

    created: float


class ApiKeys(Scripted):
    """The keys of one index. Every call may raise `StoreUnavailable`."""

    async def create(
        self, name: str, scopes: Sequence[KeyScope], *, tenant: str = "", quotas: Quotas | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key; returns its record and its text, which cannot be had again."""
        text = f"mk_{secrets.token_urlsafe(32)}"
        new = NewApiKey(
            id=f"key-{secrets.token_hex(6)}",
            name=name,
            tenant=tenant,
            scopes=tuple(scopes),
            quotas=Quotas() if quotas is None else quotas,
        )
        keys = [self.keys.api_keys, self.keys.api_key_ids, self.keys.feed]
        arguments = [new.id, hash_of(text), msgspec.json.encode(new)]
        stored = await self.run_change("create_key", keys, arguments, BY_NOBODY)
        return _decode(stored), text

    async def revoke(self, key_id: str) -> None:
        """Make a key invalid on all servers, within the feed's delay; `NotFound`."""
        keys = [self.keys.api_keys, self.keys.api_key_ids, self.keys.feed]
        if await self.run_change("revoke_key", keys, [key_id], BY_NOBODY) == "no_key":
            raise NotFound("key", key_id)

    async def find(self, sha256: str) -> ApiKey | None:
        """The key whose text has this hash."""
        with redis_errors():
            stored = await self.redis.hget(self.keys.api_keys, sha256)
        return None if stored is None else _decode(str(stored))

    async def list(self) -> list[ApiKey]:
        """All keys that are not revoked, oldest first."""
        with redis_errors():
            stored: list[Any] = await self.redis.hvals(self.keys.api_keys)
        return sorted((_decode(row) for row in stored), key=lambda key: (key.created, key.id))


def hash_of(text: str) -> str:
    """What is stored of a key's text: 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _decode(stored: str) -> ApiKey:
    created, _, record = stored.partition(" ")
    new = msgspec.json.decode(record, type=NewApiKey)
    return ApiKey(**{name: getattr(new, name) for name in NewApiKey.__struct_fields__}, created=float(created))

"""What an API key may use: checked when a request begins, charged when it ends.

    requests_per_minute    HTTP requests, however many prompts each has
    concurrent_requests    HTTP requests under way, a stream until its end
    tokens_per_day         prompts' and answers', as `usage` says: what has begun may go beyond it, the next is refused
    stored_bytes           files of the versions and customizations that the key uploaded and that still stand

A refusal is 429 `quota_exceeded`; it names the quota in `param` and says when to come back. Counters are shared by all
servers of an index; while Redis is away or full each server counts for itself, from nothing.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from adapters_store import LEASE_SECONDS, LocalUsage, SharedUsage, StoreFull, StoreUnavailable, Usage
from server.api.caller import Caller
from server.errors import QuotaError

RENEW_SECONDS = LEASE_SECONDS / 3
_STORED_RETRY_SECONDS = 60  # nobody knows when something will be deleted

Result = TypeVar("Result")


@dataclass
class Admitted:
    """A request that was let in: what has to be settled at its end."""

    caller: Caller
    lease: str | None = None
    settling: asyncio.Task[None] | None = None
    """The work of its end, once that has begun."""


class QuotaKeeper:
    """Counts the requests of one server. Keys without quotas cost nothing."""

    def __init__(self, shared: SharedUsage, available: Callable[[], bool]) -> None:
        """`available`: whether Redis is worth asking now."""
        self._shared = shared
        self._available = available
        self._local = LocalUsage()
        self._held: dict[str, str] = {}  # lease → key, of requests under way
        self._settling: set[asyncio.Task[None]] = set()  # the loop itself would not keep them

    async def admit(self, caller: Caller) -> Admitted:
        """Let the request in, or raise `QuotaError`. What was admitted is settled, whatever comes of it."""
        quotas, key_id = caller.quotas, caller.key_id
        admitted = Admitted(caller)
        if (tokens := quotas.tokens_per_day) is not None:
            wait = await self._ask(lambda usage: usage.tokens(key_id, tokens))
            _refuse("tokens_per_day", f"{tokens} tokens a day", wait)
        if (at_once := quotas.concurrent_requests) is not None:
            lease = secrets.token_hex(8)
            wait = await self._ask(lambda usage: usage.lease(key_id, lease, at_once))
            _refuse("concurrent_requests", f"{at_once} requests at once", wait)
            admitted.lease = lease
            self._held[lease] = key_id
        if (per_minute := quotas.requests_per_minute) is not None:
            try:
                wait = await self._ask(lambda usage: usage.request(key_id, per_minute))
                _refuse("requests_per_minute", f"{per_minute} requests a minute", wait)
            except BaseException:
                await self.settle(admitted)
                raise
        return admitted

    async def settle(self, admitted: Admitted) -> None:
        """The request has ended: charge what it used, then give its place back, so that who gets it finds the charge.
        Only the first call does anything, and a caller that is cancelled, as a client that goes away makes it be, does
        not end it half-way: it is a task of its own."""
        if admitted.settling is None:
            admitted.settling = asyncio.create_task(self._settle(admitted))
            self._settling.add(admitted.settling)
            admitted.settling.add_done_callback(self._settling.discard)
        await asyncio.shield(admitted.settling)

    async def _settle(self, admitted: Admitted) -> None:
        caller, lease = admitted.caller, admitted.lease
        if lease is not None:
            self._held.pop(lease, None)  # whatever comes now, it is not renewed for ever
        limit, tokens = caller.quotas.tokens_per_day, caller.bill.tokens
        if limit is not None and tokens:
            await self._ask(lambda usage: usage.charge_tokens(caller.key_id, limit, tokens))
        if lease is not None:
            await self._local.release(caller.key_id, lease)
            await self._ask(lambda usage: usage.release(caller.key_id, lease))

    async def check_room(self, caller: Caller, size: int, replaced: Callable[[], Awaitable[int]]) -> None:
        """Refuse an upload of `size` bytes that the key has no room for. `replaced` is asked for the bytes that the key
        would get back for what the upload takes the place of. Uploads that are checked at the same time may go beyond
        the quota together. `StoreUnavailable`: nothing can be uploaded then."""
        limit = caller.quotas.stored_bytes
        if limit is None:
            return
        if not self._available():
            raise StoreUnavailable("Redis is away, and what the API key has stored is known there; ask again soon")
        stored, freed = await self._shared.stored_bytes(caller.key_id), await replaced()
        if size > freed and stored - freed + size > limit:
            instead = f" in place of {freed}" if freed else ""
            message = (
                f"quota exceeded: the API key {caller.key_id} may store {limit} bytes, has {stored}, and this upload "
                f"has {size}{instead}; delete versions or customizations that it uploaded, then ask again"
            )
            raise QuotaError("stored_bytes", message, _STORED_RETRY_SECONDS)

    async def run(self) -> None:
        """Renew the leases of requests under way, for ever; cancel it at the end."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            held: dict[str, list[str]] = {}
            for lease, key_id in self._held.items():
                held.setdefault(key_id, []).append(lease)
            try:
                for key_id, leases in held.items():
                    await self._shared.renew(key_id, leases)
            except (StoreUnavailable, StoreFull):
                continue  # those that run on are counted again once they begin anew

    async def _ask(self, question: Callable[[Usage], Awaitable[Result]]) -> Result:
        """Of Redis, else of this server's memory."""
        if self._available():
            with suppress(StoreUnavailable, StoreFull):
                return await question(self._shared)
        return await question(self._local)


def _refuse(quota: str, allowed: str, wait: int | None) -> None:
    if wait is not None:
        raise QuotaError(quota, f"quota exceeded: this API key may use {allowed}; ask again in {wait} s", wait)

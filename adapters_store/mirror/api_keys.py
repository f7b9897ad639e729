"""A server's memory of the API keys that it has seen, so that a request does not wait for Redis to know its caller.

A key is read when it is first used and kept until the change feed names it, so that a revoked key is refused everywhere
as soon as its entry comes. While Redis is away the keys that are kept go on; others cannot be judged. Keys that do not
exist are not kept: a new one works at once, and guesses push nothing out.
"""

from __future__ import annotations

from collections import OrderedDict

from adapters_store.errors import StoreUnavailable
from adapters_store.index.api_keys import ApiKey, ApiKeys, hash_of
from adapters_store.index.feed import FeedEvent, Follower

MOST_KEPT = 100_000


class ApiKeyDirectory:
    """See the module. A `FeedListener`, for `TaskDirectory.subscribe`."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys
        self._follower: Follower | None = None
        self._kept: OrderedDict[str, ApiKey] = OrderedDict()  # by hash, the last used last
        self._hash_of_id: dict[str, str] = {}
        self._changes = 0

    async def get(self, text: str) -> ApiKey | None:
        """The key with this text; None for one that never was or was revoked. `StoreUnavailable` where Redis would have
        to be asked and is away or not followed: guesses must not wait for it then, one connection each."""
        sha256 = hash_of(text)
        kept = self._kept.get(sha256)
        if kept is not None:
            self._kept.move_to_end(sha256)
            return kept
        if self._follower is not None and not self._follower.available:
            raise StoreUnavailable("this API key is not known here, and Redis cannot be asked")
        changes = self._changes
        found = await self._keys.find(sha256)
        if found is not None and changes == self._changes:  # else what was read may have been revoked meanwhile
            self._keep(sha256, found)
        return found

    def subscribed(self, follower: Follower) -> None:
        """Ask Redis only while this one is available."""
        self._follower = follower

    def changed(self, event: FeedEvent) -> None:
        """A key that has changed is read anew when it is used next."""
        if event.kind != "key_changed":
            return
        self._changes += 1
        sha256 = self._hash_of_id.pop(event.key, None)
        if sha256 is not None:
            del self._kept[sha256]

    def clear(self) -> None:
        """Changes may have been missed: everything is read anew."""
        self._changes += 1
        self._kept.clear()
        self._hash_of_id.clear()

    def _keep(self, sha256: str, key: ApiKey) -> None:
        self._kept[sha256] = key
        self._hash_of_id[key.id] = sha256
        if len(self._kept) > MOST_KEPT:
            _, oldest = self._kept.popitem(last=False)
            del self._hash_of_id[oldest.id]

"""An index to back up, and what an index holds."""

from __future__ import annotations

from typing import Any

from adapters_store import Canary, LocalBlobs, Quotas, RedisIndex, TaskSettings
from adapters_store.records import Change
from tests.store.samples import customize_text, publish_text

BY = Change("key-a", "r-1")
NOT_KEPT = ("index_id", "feed", "condemned", "deleting", "garbage_lock", "garbage_pause")


async def fill(index: RedisIndex, blobs: LocalBlobs) -> str:
    """Some of everything; returns the text of an API key."""
    for text in ("one", "two", "three"):
        await publish_text(index, blobs, "a", text)
    await index.set_canary("a", Canary(1, 12.5))
    await index.put_task("x/b", TaskSettings(description="Größe", public=True, labels={"k": "v"}), change=BY)
    await publish_text(index, blobs, "x/b", "one")
    await publish_text(index, blobs, "gone", "gone")
    await index.delete_task("gone")
    for user, task in (("u", "a"), ("u", "x/b"), ("x/v", "x/b")):
        await customize_text(index, blobs, user, task, f"{user} over {task}", BY)
    await index.touch({"a": 12.5})
    _, text = await index.api_keys.create("ci", ["publish"], tenant="x", quotas=Quotas(stored_bytes=10**6))
    revoked, _ = await index.api_keys.create("old", ["admin"])
    await index.api_keys.revoke(revoked.id)
    return text


async def dump(index: RedisIndex) -> dict[str, Any]:
    """Every key that is to be kept, as Redis has it."""
    namespace = index.keys.namespace
    found: dict[str, Any] = {}
    reads = {"hash": ["HGETALL"], "zset": ["ZRANGE", "0", "-1", "WITHSCORES"], "list": ["LRANGE", "0", "-1"]}
    reads["set"] = ["SMEMBERS"]
    async for key in index.redis.scan_iter(match=f"{namespace}:*"):
        name = key.removeprefix(f"{namespace}:")
        if name in NOT_KEPT:
            continue
        kind = str(await index.redis.type(key))
        command, *arguments = reads.get(kind, ["GET"])
        value = await index.run_raw(command, key, *arguments)
        found[name] = sorted(value, key=str) if kind == "zset" else value
    return found

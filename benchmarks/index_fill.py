"""Fills an index with synthetic tasks and customizations, fast: by pipelines of plain commands in place of its scripts.

The records are made by the index's own code. That keys and values are those that the real calls write is checked on a
sample, which is put by the real calls.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
from redis import Redis

from adapters_store import FileRecord, NewCustomization, NewVersion, RedisIndex, adapter_digest
from adapters_store.index.packed import pack
from adapters_store.index.stored import content_of
from adapters_store.records import Change

LISTED = 100
"""Tasks that each of some users customized, and the length of a page."""
_BATCH = 5000
_SAMPLE = 8
_PAYER = "key-0123456789ab"
_NAMES = ("adapter_config.json", "adapter_model.safetensors", "medley.json")
_FILE = 81_920
_SIZE = len(_NAMES) * _FILE
_FINGERPRINT = hashlib.sha256(b"base").hexdigest()
_HEADER = struct.Struct("<IHHdIQ")  # see adapters_store.index.packed


@dataclass(frozen=True)
class Sizes:
    """How much there is, and how many calls of each kind are timed."""

    tasks: int
    customizations: int
    calls: int

    @property
    def many(self) -> int:
        """Users with `LISTED` customizations."""
        return min(100, self.customizations // (2 * LISTED))

    def pairs(self) -> Iterator[tuple[str, str]]:
        """User and task of each customization, the users with many first."""
        for user in range(self.many):
            for number in range(LISTED):
                yield many_user(user), task_name((user * LISTED + number) % self.tasks)
        for number in range(self.customizations - self.many * LISTED):
            yield f"user-{number:08}", task_name(number % self.tasks)


def task_name(number: int) -> str:
    """A task's id."""
    return f"task-{number:07}"


def many_user(number: int) -> str:
    """The id of a user with many customizations."""
    return f"many-{number:08}"


async def fill_tasks(index: RedisIndex, redis: Redis, sizes: Sizes) -> None:
    """Tasks of one version each."""
    sample = [task_name(number) for number in range(_SAMPLE)]
    for name in sample:
        await index.publish(name, _version(name), activate=True)
    for name in sample:
        created = redis.hget(index.keys.task(name), "created")
        assert isinstance(created, bytes)
        now = created.decode()
        found = [redis.hgetall(key) for key, _ in _hashes_of_task(index, name, now)]
        hashes = [fields for _, fields in _hashes_of_task(index, name, now)]
        assert found == [{key.encode(): value.encode() for key, value in fields.items()} for fields in hashes], name
        assert redis.lrange(index.keys.history(name), 0, -1) == [row.encode() for row in _history(name, now)], name
    now = f"{time.time():.6f}"
    for numbers in _batches(range(_SAMPLE, sizes.tasks)):
        names = [task_name(number) for number in numbers]
        with redis.pipeline(transaction=False) as pipeline:
            for name in names:
                for key, fields in _hashes_of_task(index, name, now):
                    pipeline.hset(key, mapping=fields)  # type: ignore[arg-type]  # keys are invariant: str | bytes
                pipeline.rpush(index.keys.history(name), *_history(name, now))
            pipeline.zadd(index.keys.tasks, {f"/{name}": 0 for name in names})
            for key in (index.keys.numbers, index.keys.revisions):
                pipeline.hset(key, mapping=dict.fromkeys(names, "1"))
            pipeline.execute()
    assert await index.count_tasks() == sizes.tasks


async def fill_customizations(index: RedisIndex, redis: Redis, sizes: Sizes) -> None:
    """All `sizes.pairs()`, paid for by one API key."""
    for user, task in islice(sizes.pairs(), _SAMPLE):
        await index.put_customization(user, task, _customization(user, task), change=Change(_PAYER, "request"))
    found: Any = redis.hgetall(index.keys.words)  # its type leaves open whether the client waits and decodes
    words = {word.decode(): int(number) for word, number in found.items()}
    numbers = words[_FINGERPRINT], words["lora"]
    for user, task in islice(sizes.pairs(), _SAMPLE):
        stored = redis.hget(index.keys.customizations(task), user)
        assert isinstance(stored, bytes)
        assert stored == _record(user, task, numbers, _HEADER.unpack_from(stored)[3]), user
        assert (task.encode(), 0.0) in redis.zrange(index.keys.user(user), 0, -1, withscores=True)
    now = time.time()
    for pairs in _batches(islice(sizes.pairs(), _SAMPLE, None)):
        rows: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
        with redis.pipeline(transaction=False) as pipeline:
            for user, task in pairs:
                rows[task][user] = _record(user, task, numbers, now)
                pipeline.zadd(index.keys.user(user), {task: 0})
            for task, fields in rows.items():
                pipeline.hset(index.keys.customizations(task), mapping=fields)  # type: ignore[arg-type]  # as above
                pipeline.hincrby(index.keys.paid(task), _PAYER, _SIZE * len(fields))
            pipeline.hincrby(index.keys.stored_bytes, _PAYER, _SIZE * len(pairs))
            pipeline.execute()
    assert await index.usage.stored_bytes(_PAYER) == _SIZE * sizes.customizations


def _hashes_of_task(index: RedisIndex, name: str, now: str) -> list[tuple[str, dict[str, str]]]:
    version = _version(name)
    record = {"created": now, "settings": "{}", "revision": "1", "updated": now, "active": "1"}
    return [
        (index.keys.task(name), record),
        (index.keys.versions(name), {"1": f"{now} {msgspec.json.encode(version).decode()}"}),
        (index.keys.digests(name), {content_of(version): "1"}),
    ]


def _history(name: str, now: str) -> list[str]:
    digest = _version(name).digest
    return [
        f'[2,{now},"version_published","","",{{"version":1,"digest":"{digest}","activated":true}}]',
        f'[1,{now},"task_put","","",{{"revision":1,"settings":{{}}}}]',
    ]


def _record(user: str, task: str, numbers: tuple[int, int], now: float) -> bytes:
    return _HEADER.pack(1, *numbers, now, 1, _SIZE) + pack(_customization(user, task))


def _version(task: str) -> NewVersion:
    return NewVersion(**_adapter(task))


def _customization(user: str, task: str) -> NewCustomization:
    return NewCustomization(**_adapter(f"{user}/{task}"), mode="compose")


def _adapter(text: str) -> dict[str, Any]:
    """Three files of its own, as uploads have them."""
    files = {name: FileRecord(hashlib.sha256(f"{name} {text}".encode()).hexdigest(), _FILE) for name in _NAMES}
    return {
        "digest": adapter_digest(files),
        "method": "lora",
        "parameters": 20_480,
        "bytes": _FILE,
        "rank": 8,
        "files": files,
        "base_fingerprint": _FINGERPRINT,
    }


def _batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    left = iter(values)
    while batch := list(islice(left, _BATCH)):
        yield batch

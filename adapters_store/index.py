"""The index: tasks and their versions in Redis. It knows no files and no server.

Every change is one Lua script (the `*.lua` files beside this one), which also tells the change feed; so a change is
seen whole or not at all, by everyone. No call's cost grows with the number of tasks. Every call may raise
`StoreUnavailable`; a change that raised it may have been carried out nevertheless, and may be repeated.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from adapters_store.connection import check_server, open_redis, redis_errors
from adapters_store.errors import Conflict, NotFound, RedisMisconfigured
from adapters_store.feed import FEED_LENGTH, ChangeFeed
from adapters_store.keys import Keys
from adapters_store.records import Canary, NewVersion, Task, TaskSettings, Version

SCHEMA = "1"

_CHANGES = ("identify", "put_task", "publish", "activate", "delete_version", "delete_task")


class RedisIndex:
    """One index, in the Redis and namespace that `connect` was given; safe to use from many coroutines of a loop.

    `index_id` tells this index from any other; `feed` is its change feed.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = _load_scripts(redis)
        self.feed = ChangeFeed(redis, keys)
        self.index_id = ""

    @classmethod
    async def connect(cls, url: str, *, namespace: str = "medley") -> RedisIndex:
        """Connect, check the server (`RedisMisconfigured`) and make the index if there is none."""
        redis = open_redis(url)
        index = cls(redis, Keys(namespace))
        try:
            await check_server(redis)
            await index.identify()
        except BaseException:
            await index.close()
            raise
        return index

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def ping(self) -> None:
        """Return if Redis answers."""
        with redis_errors():
            await self._redis.ping()

    async def identify(self) -> str:
        """The id of the index that stands in Redis now, which is a new and empty one if none does."""
        keys = [self._keys.index_id, self._keys.schema, self._keys.feed]
        index_id, schema = await self._run("identify", keys, [secrets.token_hex(16), SCHEMA, FEED_LENGTH])
        if schema != SCHEMA:
            raise RedisMisconfigured(f"the index has layout {schema}, this server reads {SCHEMA}; use its own release")
        self.index_id = index_id
        return self.index_id

    # Tasks

    async def put_task(self, name: str, settings: TaskSettings) -> Task:
        """Create the task, or replace its settings."""
        keys = [self._keys.task(name), self._keys.tasks, self._keys.feed]
        await self._run("put_task", keys, [name, msgspec.json.encode(settings), FEED_LENGTH])
        return await self.get_task(name)

    async def get_task(self, name: str) -> Task:
        """The task's present record, or `NotFound`."""
        [found] = await self.read_tasks([name])
        if found is None:
            raise NotFound("task", name)
        return found[0]

    async def read_tasks(self, names: Sequence[str]) -> list[tuple[Task, Version | None] | None]:
        """For each name its record and its active version, both of one moment; None where there is no task."""
        keys = [key(name) for name in names for key in (self._keys.task, self._keys.activations, self._keys.versions)]
        rows = await self._run("read_tasks", keys, [])
        return [_decode_task(name, row) for name, row in zip(names, rows, strict=True)]

    async def list_tasks(self, limit: int, after: str | None = None) -> tuple[list[Task], bool]:
        """Up to `limit` tasks in the order of their names, from the first beyond `after`; and whether more follow."""
        page, has_more = await self.list_active(limit, after)
        return [task for task, _ in page], has_more

    async def list_active(self, limit: int, after: str | None = None) -> tuple[list[tuple[Task, Version | None]], bool]:
        """As `list_tasks`, each task with its active version."""
        low = "-" if after is None else f"({after}"
        with redis_errors():
            names: list[Any] = await self._redis.zrangebylex(self._keys.tasks, low, "+", start=0, num=limit + 1)
        rows = await self.read_tasks(names[:limit]) if names else []
        return [row for row in rows if row is not None], len(names) > limit

    async def count_tasks(self) -> int:
        """How many tasks there are."""
        with redis_errors():
            return int(await self._redis.zcard(self._keys.tasks))

    async def delete_task(self, task: str) -> None:
        """Remove the task and all its versions, or raise `NotFound`. Its version numbers stay used."""
        of_task = [self._keys.versions(task), self._keys.digests(task), self._keys.activations(task)]
        keys = [self._keys.task(task), self._keys.tasks, *of_task, self._keys.last_used, self._keys.feed]
        if await self._run("delete_task", keys, [task, FEED_LENGTH]) == "no_task":
            raise NotFound("task", task)

    # Versions

    async def publish(self, task: str, new: NewVersion, *, activate: bool) -> tuple[Version, bool]:
        """Add a version whose blobs are durable already; returns it and whether it is new.

        The same digest for the same base again gives the version that stands. The task is created if there is none.
        """
        of_task = [self._keys.versions(task), self._keys.digests(task), self._keys.activations(task)]
        keys = [self._keys.task(task), self._keys.tasks, *of_task, self._keys.numbers, self._keys.feed]
        settings = msgspec.json.encode(TaskSettings())
        record = msgspec.json.encode(new)
        arguments = [task, _content(new), record, int(activate), settings, FEED_LENGTH]
        number, stored, is_new = await self._run("publish", keys, arguments)
        return _decode_version(task, int(number), stored), bool(is_new)

    async def get_version(self, task: str, number: int) -> Version:
        """A version's record, or `NotFound`."""
        found = await self.read_versions(task, [number])
        if number not in found:
            raise NotFound("version", f"{task}@{number}")
        return found[number]

    async def read_versions(self, task: str, numbers: Sequence[int]) -> dict[int, Version]:
        """Those of the numbered versions (at least one number) that exist."""
        with redis_errors():
            rows: list[Any] = await self._redis.hmget(self._keys.versions(task), [str(number) for number in numbers])
        found = zip(numbers, rows, strict=True)
        return {number: _decode_version(task, number, row) for number, row in found if row is not None}

    async def list_versions(self, task: str) -> list[Version]:
        """The task's versions by number, or `NotFound`."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.exists(self._keys.task(task))
            pipeline.hgetall(self._keys.versions(task))
            with redis_errors():
                answer: list[Any] = await pipeline.execute()
        exists, rows = answer
        if not exists:
            raise NotFound("task", task)
        return [_decode_version(task, number, rows[str(number)]) for number in sorted(map(int, rows))]

    async def activate(self, task: str, number: int) -> Task:
        """Make a version the active one and return the task; `NotFound` where either is unknown."""
        keys = [self._keys.task(task), self._keys.versions(task), self._keys.activations(task), self._keys.feed]
        outcome = await self._run("activate", keys, [task, number, FEED_LENGTH])
        if outcome == "no_task":
            raise NotFound("task", task)
        if outcome == "no_version":
            raise NotFound("version", f"{task}@{number}")
        return await self.get_task(task)

    async def delete_version(self, task: str, number: int) -> None:
        """Remove a version; `NotFound`, or `Conflict` "version_active". Its number stays used."""
        version = await self.get_version(task, number)
        of_task = [self._keys.versions(task), self._keys.digests(task), self._keys.activations(task)]
        keys = [self._keys.task(task), *of_task, self._keys.feed]
        outcome = await self._run("delete_version", keys, [task, number, _content(version), FEED_LENGTH])
        if outcome == "no_version":
            raise NotFound("version", f"{task}@{number}")
        if outcome == "active":
            raise Conflict(
                "version_active", f"version {number} is the active one of task '{task}'; activate another one first"
            )

    # Use

    async def touch(self, names: Mapping[str, float]) -> None:
        """Record when tasks were last used (Unix seconds); never moves a time back, ignores unknown tasks."""
        arguments = [value for pair in names.items() for value in pair]
        await self._run("touch", [self._keys.tasks, self._keys.last_used], arguments)

    async def last_used(self, task: str) -> float | None:
        """When the task was last used, if ever."""
        with redis_errors():
            score = await self._redis.zscore(self._keys.last_used, task)
        return None if score is None else float(score)

    async def _run(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        with redis_errors():
            return await self._scripts[script](keys=keys, args=arguments)


def _load_scripts(redis: Redis) -> dict[str, AsyncScript]:
    folder = resources.files("adapters_store")
    common = folder.joinpath("change_common.lua").read_text()
    changes = {name: common + folder.joinpath(f"{name}.lua").read_text() for name in _CHANGES}
    others = {name: folder.joinpath(f"{name}.lua").read_text() for name in ("read_tasks", "touch")}
    return {name: redis.register_script(text) for name, text in {**changes, **others}.items()}


def _content(version: NewVersion) -> str:
    """What makes an upload "the same again". Checked against another base, the same files are another version."""
    return f"{version.digest} {version.base_fingerprint}"


def _decode_task(name: str, row: list[str | None]) -> tuple[Task, Version | None] | None:
    settings, active, canary, created, updated, previous, record = row
    if settings is None or created is None or updated is None:
        return None
    task = Task(
        name=name,
        settings=msgspec.json.decode(settings, type=TaskSettings),
        active=None if active is None else int(active),
        previous=None if previous is None else int(previous),
        canary=None if canary is None else msgspec.json.decode(canary, type=Canary),
        created=float(created),
        updated=float(updated),
    )
    if active is None or record is None:
        return task, None
    return task, _decode_version(name, int(active), record)


def _decode_version(task: str, number: int, stored: str) -> Version:
    created, _, record = stored.partition(" ")
    content = msgspec.json.decode(record, type=NewVersion)
    return Version(task=task, number=number, created=float(created), **msgspec.structs.asdict(content))

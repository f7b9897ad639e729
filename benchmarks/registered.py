"""What the number of registered tasks costs where they are kept: a lookup in the mirror, a publication in the index.

Two indexes in one private Redis, of few and of many tasks, each with a server's mirror of it. Work that grew with the
number registered would take a hundred times as long in the larger one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store import ADAPTER_FILES, FileRecord, NewVersion, PrivateRedis, RedisIndex, TaskDirectory
from benchmarks.frame import Figure, Table, Target, ratio

FEW = 100
TARGET = Target(2.0, at_most=True)  # a hundred if it grew with them; the processor's cache alone makes it more than 1
_AT_ONCE = 200
_LOOKUPS = 2000
_PUBLICATIONS = 50


@dataclass(frozen=True)
class Lookups:
    """What `lookups` found."""

    figures: list[Figure]
    table: Table


def lookups(folder: Path, many: int, rounds: int) -> Lookups:
    """Time both against `FEW` tasks, alternately; Redis keeps its files in `folder`."""
    redis = PrivateRedis(folder / "redis")
    redis.start()
    try:
        seconds = asyncio.run(_measure(redis.url, (FEW, many), rounds))
    finally:
        redis.stop()
    figures = [
        Figure(f"{what}, {many} ÷ {FEW} tasks registered", ratio(times[many], times[FEW]), target=TARGET)
        for what, times in seconds.items()
    ]
    columns = ("work", *(f"{count} tasks, µs" for count in (FEW, many)))
    rows = [
        (what, *(f"{1e6 * sorted(times[count])[rounds // 2]:.1f}" for count in (FEW, many)))
        for what, times in seconds.items()
    ]
    return Lookups(figures, Table("With more tasks registered", columns, rows))


async def _measure(url: str, counts: tuple[int, int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of one lookup and of one publication, by the number of tasks, per round."""
    sides = {count: await _Side.open(url, count) for count in counts}
    works: dict[str, Callable[[_Side], Awaitable[float]]] = {"lookup": _Side.look_up, "publication": _Side.publish}
    seconds: dict[str, dict[int, list[float]]] = {what: {count: [] for count in counts} for what in works}
    for number in range(rounds + 1):
        for what, work in works.items():
            for count, side in sides.items():
                taken = await work(side)
                if number > 0:
                    seconds[what][count].append(taken)
    for side in sides.values():
        await side.close()
    return seconds


class _Side:
    """An index of `count` tasks and a mirror of it."""

    def __init__(self, index: RedisIndex, names: list[str]) -> None:
        self._index = index
        self._names = names
        self._directory = TaskDirectory(index)
        self._random = random.Random(0)
        self._published = 0

    @classmethod
    async def open(cls, url: str, count: int) -> _Side:
        """Register the tasks and load the mirror."""
        side = cls(await RedisIndex.connect(url, namespace=f"benchmark-{count}"), [f"task-{n}" for n in range(count)])
        for start in range(0, count, _AT_ONCE):
            names = side._names[start : start + _AT_ONCE]
            await asyncio.gather(*(side._index.publish(name, _version(name), activate=True) for name in names))
        await side._directory.start()
        return side

    async def close(self) -> None:
        """Stop the mirror, then its connection."""
        await self._directory.stop()
        await self._index.close()

    async def look_up(self) -> float:
        """Seconds of resolving one name."""
        names = self._random.choices(self._names, k=FEW) * (_LOOKUPS // FEW)
        started = time.perf_counter()
        for name in names:
            await self._directory.resolve(name)
        return (time.perf_counter() - started) / len(names)

    async def publish(self) -> float:
        """Seconds of adding a version to a task, up to the mirror's knowing it."""
        started = time.perf_counter()
        for name in self._random.choices(self._names, k=_PUBLICATIONS):
            self._published += 1
            await self._index.publish(name, _version(f"{name} {self._published}"), activate=True)
            await self._directory.refresh([name])
        return (time.perf_counter() - started) / _PUBLICATIONS


def _version(digest: str) -> NewVersion:
    files = {name: FileRecord("c" * 64, 10) for name in ADAPTER_FILES}
    return NewVersion(digest=digest, method="lora", parameters=1, bytes=10, rank=8, files=files, base_fingerprint="any")

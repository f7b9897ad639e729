"""`python -m benchmarks.index`: what an index of 100,000 tasks and 1,000,000 customizations costs.

A private Redis holds tasks of one version each; a hundred users customized a hundred tasks, all others one, and an API
key pays for all of it. `index_fill` writes them and proves on a sample that they are what the index's own calls write.
Memory is what Redis says of itself, less the ids of user and task. Calls are one client's, one after the other. Beside
it: a mirror's load, a collection of garbage that finds a thousand files, with the longest time for which it kept the
event loop from others.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import typer
from redis import Redis

from adapters_store import (
    CustomizationDirectory,
    GarbageCollector,
    LocalBlobs,
    PrivateRedis,
    RedisIndex,
    TaskDirectory,
)
from benchmarks.frame import Figure, Quick, Report, Save, Table, Target, await_idle, machine
from benchmarks.index_fill import LISTED, Sizes, fill_customizations, fill_tasks, many_user, task_name

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BYTES = Target(400, at_most=True)
MILLISECONDS = Target(2, at_most=True)
_STORED = 1000
_TICK = 0.001

Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Collection:
    """A collection of garbage; seconds."""

    seconds: float
    longest_gap: float  # for which nothing else of the loop ran


async def used_bytes(index: RedisIndex) -> int:
    """Redis' memory without its clients' buffers."""
    memory = await index.redis.info("memory")
    return int(memory["used_memory"] - memory["mem_clients_normal"] - memory["mem_aof_buffer"])


async def time_calls(sizes: Sizes, index: RedisIndex, directory: TaskDirectory) -> dict[str, list[float]]:
    """Seconds of each call, by what it does."""
    chance = random.Random(0)
    pairs = list(itertools.islice(sizes.pairs(), sizes.many * LISTED, None))
    customizations = CustomizationDirectory(index, directory)
    warm = chance.choice(pairs)
    await customizations.get(*warm)
    cold = iter(chance.sample(pairs, sizes.calls + 1))

    def some_task() -> str:
        return task_name(chance.randrange(sizes.tasks))

    calls: dict[str, Call] = {
        f"list a user's {LISTED} customizations": lambda: index.list_user_customizations(
            many_user(chance.randrange(sizes.many)), LISTED
        ),
        "find a customization": lambda: index.find_customization(*chance.choice(pairs)),
        "the directory's answer, not held": lambda: customizations.get(*next(cold)),
        "the directory's answer, held": lambda: customizations.get(*warm),
        f"list {LISTED} tasks": lambda: index.list_states(LISTED, some_task()),
        "resolve a task": lambda: directory.resolve(some_task(), pick="user"),
    }
    return {name: [await _seconds(call) for _ in range(sizes.calls + 1)][1:] for name, call in calls.items()}


async def collect(index: RedisIndex, folder: Path) -> Collection:
    """Garbage among `_STORED` files that nobody names, beside a task of the loop that wants to run all the time."""
    blobs = LocalBlobs(folder)
    for number in range(_STORED):
        path = blobs.path(hashlib.sha256(f"garbage {number}".encode()).hexdigest())
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"garbage")
    gap = 0.0

    async def tick() -> None:
        nonlocal gap
        last = time.perf_counter()
        while True:
            await asyncio.sleep(_TICK)
            now = time.perf_counter()
            gap, last = max(gap, now - last - _TICK), now

    ticking = asyncio.create_task(tick())
    begun = time.perf_counter()
    report = await GarbageCollector(index.garbage, blobs, 0).collect()
    seconds = time.perf_counter() - begun
    ticking.cancel()
    with suppress(asyncio.CancelledError):
        await ticking
    assert report.due > _STORED // 2, report  # all but those that it mistook for names
    return Collection(seconds, gap)


async def measure(url: str, socket: str, sizes: Sizes, folder: Path) -> tuple[list[Figure], list[Table]]:
    """All of it, in an empty Redis."""
    index = await RedisIndex.connect(url)
    with Redis(unix_socket_path=socket, socket_timeout=60) as redis:
        await fill_tasks(index, redis, sizes)
        memory = [await used_bytes(index)]
        ids = sum(len(user) + len(task) for user, task in sizes.pairs())
        await fill_customizations(index, redis, sizes)
        memory.append(await used_bytes(index))
    beyond_ids = (memory[1] - memory[0] - ids) / sizes.customizations
    directory = TaskDirectory(index)
    begun = time.perf_counter()
    await directory.start()
    loaded = time.perf_counter() - begun
    try:
        seconds = await time_calls(sizes, index, directory)
    finally:
        await directory.stop()
    garbage = await collect(index, folder / "blobs")
    await index.close()
    figures = [
        Figure("memory of a customization beyond its ids", beyond_ids, "B", BYTES),
        *(Figure(what, 1e3 * median(taken), "ms", MILLISECONDS) for what, taken in seconds.items()),
        Figure(f"load of a mirror, {sizes.tasks:,} tasks", loaded, "s"),
        Figure("a collection of garbage", garbage.seconds, "s"),
        Figure("its longest hold on the event loop", 1e3 * garbage.longest_gap, "ms"),
    ]
    rows = [(what, *(f"{1e3 * cut:.3f}" for cut in _cuts(taken))) for what, taken in seconds.items()]
    sums = [
        ("the tasks and Redis itself", f"{memory[0] / 2**20:.0f}"),
        ("all, with customizations", f"{memory[1] / 2**20:.0f}"),
    ]
    calls = Table(f"{sizes.calls} calls of each kind", ("call", "median, ms", "90 %, ms", "99 %, ms"), rows)
    return figures, [calls, Table("Redis' memory", ("what", "MiB"), sums)]


def _cuts(values: list[float]) -> tuple[float, float, float]:
    percentiles = quantiles(values, n=100, method="inclusive")
    return percentiles[49], percentiles[89], percentiles[98]


async def _seconds(call: Call) -> float:
    begun = time.perf_counter()
    await call()
    return time.perf_counter() - begun


@app.command()
def main(
    tasks: Annotated[int, typer.Option(min=200, help="tasks in the index")] = 100_000,
    customizations: Annotated[int, typer.Option(min=1000, help="customizations in the index")] = 1_000_000,
    calls: Annotated[int, typer.Option(min=2, help="timed calls of each kind")] = 2000,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """Memory and calls of an index of the planned size."""
    sizes = Sizes(200, 1000, 20) if quick else Sizes(tasks, customizations, calls)
    if save:
        await_idle()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="medley-benchmark-") as parent:
        folder = Path(parent)
        redis = PrivateRedis(folder / "redis")
        redis.start()
        try:
            socket = redis.url.removeprefix("unix://")
            figures, tables = asyncio.run(measure(redis.url, socket, sizes, folder))
        finally:
            redis.stop()
    title = f"{sizes.tasks:,} tasks, {sizes.customizations:,} customizations"
    Report("index", title, figures, facts, tables).finish(save)


if __name__ == "__main__":
    app()

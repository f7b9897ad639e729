"""The index's Lua scripts, and how they are run. It knows nothing of what they mean.

Each `lua/NAME.lua` is one atomic step. `change_common.lua` stands before each of them; a script that
changes something gets three more arguments than its caller names: the feed's length, the actor, the request id.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.client import NEVER_DECODE
from redis.commands.core import AsyncScript

from adapters_store.errors import StoreUnavailable
from adapters_store.index.connection import redis_errors
from adapters_store.index.feed import FEED_LENGTH
from adapters_store.index.keys import Keys
from adapters_store.records import Change


class Scripted:
    """A part of the store that runs scripts on the Redis and keys that it is given."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis = redis
        self.keys = keys
        self.is_away: Callable[[], bool] = lambda: False
        """Whether Redis is known not to answer; set by who follows the feed."""
        self._scripts: dict[str, AsyncScript] = {}

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around what is asked of Redis: as `redis_errors`, and `StoreUnavailable` while `is_away`. Else everybody who
        asks would wait for as long as a call may take, and longer for one of the connections."""
        if self.is_away():
            raise StoreUnavailable("Redis is away; ask again soon")
        with redis_errors():
            yield

    async def run(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        """What `script`.lua answers. Raises as `asking` does."""
        with self.asking():
            return await self._script(script)(keys=keys, args=arguments)

    async def run_always(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        """As `run`, also while `is_away`: for who has to notice that Redis is back."""
        with redis_errors():
            return await self._script(script)(keys=keys, args=arguments)

    async def run_change(self, script: str, keys: list[str], arguments: list[Any], change: Change) -> Any:
        """As `run`, for a script that announces or records what it changes; `StoreUnavailable` while `is_away`.

        It is not even sent then: a Redis that stands still would make the change once it goes on, long after its
        caller was told that it failed.
        """
        if self.is_away():
            raise StoreUnavailable("Redis is away, and changes wait for it; ask again soon")
        return await self.run(script, keys, [*arguments, *announced(change)])

    async def run_raw(self, *command: str | int) -> Any:
        """What a single Redis command answers, with bytes in place of texts: packed records are none."""
        execute: Callable[..., Awaitable[Any]] = self.redis.execute_command
        with self.asking():
            return await execute(*command, **{NEVER_DECODE: True})

    async def read(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        """As `run`, for a script that only reads.

        It is sent whole, not loaded: some versions of Redis write what is loaded to their file, and on a full disk a
        Redis that must write ends.
        """
        with self.asking():
            answer: Any = self.redis.eval(_text_of(script), len(keys), *keys, *arguments)
            return await answer

    async def read_raw(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        """As `read`, with bytes in place of texts."""
        return await self.run_raw("EVAL", _text_of(script), len(keys), *keys, *arguments)

    def _script(self, name: str) -> AsyncScript:
        if name not in self._scripts:
            self._scripts[name] = self.redis.register_script(_text_of(name))
        return self._scripts[name]

    def _of_bills(self, task: str) -> list[str]:
        """The last keys of a script that changes what versions count for an API key."""
        return [self.keys.stored_bytes, self.keys.paid(task), self.keys.bills(task)]


def announced(change: Change) -> list[Any]:
    """The last arguments of a script that changes something."""
    return [FEED_LENGTH, change.actor, change.request_id]


@cache
def _text_of(script: str) -> str:
    folder = resources.files("adapters_store.index").joinpath("lua")
    return folder.joinpath("change_common.lua").read_text() + folder.joinpath(f"{script}.lua").read_text()

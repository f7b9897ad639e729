"""Pinned tasks: the adapters of their active versions stay loaded in the engine.

The mirror says which tasks are pinned, whoever changed that; when it has changed, or there is an engine, it is compared
with what the engine was told. Pins have half of the adapter memory, so that other tasks always have room. A call that
would pin more is refused, be it a pin, an upload to a pinned task or a switch of it. Where they are more nevertheless
(after a rollback, which nothing may stand in the way of, or by another server that has more memory), those that do not
fit are left out, last names first; the log and the metrics say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from adapters_store import StoreError, TaskDirectory, Version, id_of
from server.api.adapter_refs import adapter_of
from server.engine.client import EngineClient
from server.engine.protocol import AdapterRef, BaseFacts
from server.errors import RequestError

_SHARE = 0.5  # of the adapter memory
_NUMBER_BYTES = {"float32": 4}  # of one parameter on the device; 2 in every other type

_log = structlog.get_logger(__name__)

Engine = tuple[EngineClient, BaseFacts]


class Pins:
    """What one server's engine keeps loaded. `adapter_bytes` is the whole adapter memory."""

    def __init__(self, directory: TaskDirectory, adapter_bytes: int) -> None:
        self._directory = directory
        self._room = int(adapter_bytes * _SHARE)
        self._told: list[AdapterRef] = []
        self._left_out: list[str] = []
        self._is_due = asyncio.Event()
        directory.watch(self.look_soon)

    @property
    def left_out(self) -> int:
        """How many pinned tasks are not kept, since they do not fit."""
        return len(self._left_out)

    async def check(self, facts: BaseFacts, task: str, parameters: int) -> None:
        """Refuse to pin the task `task` (scoped) with a version of so many parameters beside what is pinned:
        `RequestError` `pins_too_large`."""
        others = [pinned for pinned in await self._pinned(facts) if pinned.task != task]
        taken, needed = _bytes(others, facts), parameters * _number_bytes(facts)
        if taken + needed > self._room:
            message = (
                f"pinned: the active version of task '{id_of(task)}' would need about {needed} bytes, other pinned "
                f"tasks have {taken}, and pins may have {self._room} together, half of the adapter memory; unpin it or "
                "another task, or start the server with more --adapter-memory"
            )
            raise RequestError("pins_too_large", message, "pinned")

    async def check_active(self, facts: BaseFacts, task: str, parameters: int) -> None:
        """As `check`, for a version that is to be the active one of a task that may be pinned."""
        known = self._directory.get(task)
        if known is not None and known.settings.pinned:
            await self.check(facts, task, parameters)

    async def look(self, engine: EngineClient, facts: BaseFacts) -> None:
        """Tell the engine the complete set, if it is another than it knows of."""
        adapters: dict[str, AdapterRef] = {}
        kept: list[Version] = []
        left_out: list[str] = []
        for version in await self._pinned(facts):
            if version.digest in adapters:
                continue
            if _bytes([*kept, version], facts) > self._room:
                left_out.append(version.task)
                continue
            kept.append(version)
            adapters[version.digest] = adapter_of(version)
        if left_out != self._left_out and left_out:
            _log.error("pinned tasks do not fit into half of the adapter memory", tasks=left_out, bytes=self._room)
        self._left_out = left_out
        if list(adapters.values()) != self._told:
            self._told = list(adapters.values())
            engine.pin(self._told)

    def look_soon(self) -> None:
        """Have `run` look: there is an engine now, or the mirror has changed."""
        self._is_due.set()

    async def run(self, engine: Callable[[], Engine | None]) -> None:
        """Look whenever that is due, for ever; cancel it at the end. `engine` gives None while there is none."""
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            if (found := engine()) is not None:
                await self.look(*found)

    async def _pinned(self, facts: BaseFacts) -> list[Version]:
        """The active versions of pinned tasks, by name, that are for this base."""
        versions = []
        for task in self._directory.pinned():
            try:
                _, version = await self._directory.resolve(task.name)
            except StoreError:  # it has no active version, or is being deleted
                continue
            if version.base_fingerprint == facts.fingerprint:
                versions.append(version)
        return versions


def _bytes(versions: list[Version], facts: BaseFacts) -> int:
    """About what they take on the device; equal content counts once."""
    parameters = {version.digest: version.parameters for version in versions}
    return sum(parameters.values()) * _number_bytes(facts)


def _number_bytes(facts: BaseFacts) -> int:
    return _NUMBER_BYTES.get(facts.dtype, 2)

"""The index's calls for customizations: what users lay over tasks. Each change is one script.

A task's customizations are one hash, user → packed record; a user's tasks are one sorted set. Deleting a task drops its
hash alone: sets may name tasks that are gone, and who lists them forgets those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from redis.client import NEVER_DECODE

from adapters_store.errors import NotFound
from adapters_store.index.packed import pack, paid_by, unpack
from adapters_store.index.scripts import Scripted
from adapters_store.index.stored import blobs_deleting, size_of
from adapters_store.records import BY_NOBODY, Change, Customization, NewCustomization
from adapters_store.scope import id_of

_DELETED_AT_ONCE = 1000  # what one script deletes while everybody waits


class CustomizationCalls(Scripted):
    """The part of `RedisIndex` that is about customizations. `user` and `task` are scoped names."""

    async def put_customization(
        self, user: str, task: str, new: NewCustomization, *, change: Change = BY_NOBODY, begun: float | None = None
    ) -> Customization:
        """Lay an adapter whose blobs are durable over the task, in place of the user's earlier one.

        `NotFound` for the task; `begun`, and `Conflict` "blobs_deleting", as for `publish`.
        """
        keys = [self.keys.task(task), self.keys.customizations(task), self.keys.user(user), self.keys.condemned]
        keys += [self.keys.deleting, self.keys.customization_history, self.keys.feed, *self._of_payers(task)]
        keys += [self.keys.words]
        detail = msgspec.json.encode({"user": user, "task": task, "mode": new.mode, "digest": new.digest})
        blobs = [record.sha256 for record in new.files.values()]
        arguments = [user, task, pack(new), detail, size_of(new), new.base_fingerprint, new.method]
        arguments += ["" if begun is None else begun, *blobs]
        answer = await self.run_change("put_customization", keys, arguments, change)
        if answer == "no_task":
            raise NotFound("task", task)
        if answer == "retry":
            raise blobs_deleting()
        active, created = answer
        fields = msgspec.structs.asdict(new)
        return Customization(user=user, task=task, made_against=int(active) or None, created=float(created), **fields)

    async def find_customization(self, user: str, task: str) -> Customization | None:
        """The user's customization of the task, if there is one."""
        found, _ = await self.find_in_task(user, task)
        return found

    async def find_in_task(self, user: str, task: str) -> tuple[Customization | None, float | None]:
        """As `find_customization`, with the time at which the task was made: None where there is none, and another one
        than before where it was deleted and made anew."""
        [found], created = await self._read(user, [task], made=task)
        return found, None if created is None else float(created)

    async def charged_for(self, user: str, task: str, key_id: str) -> int:
        """The bytes that the user's customization of the task counts for this API key: 0 where another one pays."""
        with self.asking():
            async with self.redis.pipeline(transaction=False) as pipeline:
                pipeline.execute_command("HGET", self.keys.customizations(task), user, **{NEVER_DECODE: True})
                pipeline.hget(self.keys.payers, key_id)
                stored, number = await pipeline.execute()
        payer, size = (0, 0) if stored is None else paid_by(stored)
        return size if payer and payer == int(number or 0) else 0

    async def list_user_customizations(
        self, user: str, limit: int, after: str | None = None
    ) -> tuple[list[Customization], bool]:
        """Up to `limit` of the user's customizations by the names of their tasks, from the first beyond `after`; and
        whether more follow. A page is shorter where tasks were deleted."""
        found: list[Customization] = []
        has_more = True
        while has_more and not found:  # a page of deleted tasks alone would give nothing to go on from
            names, has_more = await self._list_tasks_of(user, limit, after)
            customizations, _ = await self._read(user, names)
            read = dict(zip(names, customizations, strict=True))
            if stale := [task for task, customization in read.items() if customization is None]:
                keys = [self.keys.user(user), *(self.keys.customizations(task) for task in stale)]
                await self.run("forget_stale", keys, [user, *stale])
            found = [customization for customization in read.values() if customization is not None]
            after = names[-1] if names else after
        return found, has_more

    async def customized_as(self, user: str, task_id: str) -> list[str]:
        """The tasks of this id, whosever they are, that the user customized, by name; deleted ones may be among them.
        It looks at all tasks of the user."""
        with self.asking():
            names: list[Any] = await self.redis.zrange(self.keys.user(user), 0, -1)
        return [name for name in names if id_of(name) == task_id]

    async def scan_customizations(self, task: str, limit: int, cursor: int = 0) -> tuple[list[Customization], int]:
        """A page of the task's customizations, of about `limit`, in no order; and the next page's cursor, 0 at the end.

        Each that exists all the time is in at least one page; it may be in two. A page may be empty before the end.
        """
        following, rows = await self.run_raw("HSCAN", self.keys.customizations(task), cursor, "COUNT", limit)
        with self.asking():  # after the rows: it has all that they name
            words = _by_number(await self.redis.hgetall(self.keys.words))
        return [unpack(user.decode(), task, stored, words) for user, stored in rows.items()], following

    async def count_customizations(self, task: str) -> int:
        """How many users customized the task."""
        with self.asking():
            return int(await self.redis.hlen(self.keys.customizations(task)))

    async def delete_customization(self, user: str, task: str, *, change: Change = BY_NOBODY) -> None:
        """Remove it, or raise `NotFound`."""
        keys = [self.keys.customizations(task), self.keys.user(user), self.keys.customization_history, self.keys.feed]
        keys += self._of_payers(task)
        detail = msgspec.json.encode({"user": user, "task": task})
        if await self.run_change("delete_customization", keys, [user, task, detail], change) == "none":
            raise NotFound("customization", task)

    async def delete_user(self, user: str, *, change: Change = BY_NOBODY) -> int:
        """Remove all customizations of the user; how many there were. Many of them go in several steps."""
        keys = [self.keys.user(user), self.keys.customization_history, self.keys.feed, self.keys.stored_bytes]
        keys.append(self.keys.payers)
        prefixes = [self.keys.customizations_of, self.keys.paid_of]
        arguments = [user, *prefixes, _DELETED_AT_ONCE]
        deleted, is_done = 0, False
        while not is_done:
            found, is_done = await self.run_change("delete_user", keys, arguments, change)
            deleted += found
        return deleted

    def _of_payers(self, task: str) -> list[str]:
        return [self.keys.stored_bytes, self.keys.paid(task), self.keys.payers]

    async def _list_tasks_of(self, user: str, limit: int, after: str | None) -> tuple[list[str], bool]:
        low = "-" if after is None else f"({after}"
        with self.asking():
            names: list[Any] = await self.redis.zrangebylex(self.keys.user(user), low, "+", start=0, num=limit + 1)
        return names[:limit], len(names) > limit

    async def _read(
        self, user: str, tasks: Sequence[str], *, made: str = ""
    ) -> tuple[list[Customization | None], str | None]:
        """Of each task the user's customization; and when the task `made` was made, all of one moment."""
        keys, arguments = [self.keys.words, self.keys.task(made)], [user, self.keys.customizations_of, *tasks]
        flat, created, *rows = await self.read_raw("read_customizations", keys, arguments)
        words = {int(number): word.decode() for word, number in zip(flat[::2], flat[1::2], strict=True)}
        found = [None if row is None else unpack(user, task, row, words) for task, row in zip(tasks, rows, strict=True)]
        return found, None if created is None else created.decode()


def _by_number(numbers: Mapping[Any, Any]) -> dict[int, str]:
    return {int(number): str(word) for word, number in numbers.items()}

"""A server's memory of customizations: which user has which, and who has none, for requests that ask at once.

A pair of user and task is read from the index when a request first asks for it, and held until the change feed says
that it changed; the ones asked for longest ago leave first. It never takes a task alone for the answer: what cannot be
known while Redis is away is an error.
"""

from __future__ import annotations

from collections import OrderedDict

from adapters_store.errors import Conflict, StoreUnavailable
from adapters_store.index.customizations import CustomizationCalls
from adapters_store.index.feed import FeedEvent, Follower
from adapters_store.records import Customization
from adapters_store.scope import id_of

HELD = 100_000
"""Answers held at most, "has none" counting as well."""


class CustomizationDirectory:
    """The memory of `index`'s customizations; `follower` must be subscribed to by this object's owner.

    A `FeedListener`: whoever changes a customization calls `forget` itself, which the feed would do a little later.
    """

    def __init__(self, index: CustomizationCalls, follower: Follower) -> None:
        self._index = index
        self._follower = follower
        self._held: OrderedDict[tuple[str, str], tuple[Customization | None, float | None]] = OrderedDict()
        self._tasks_of: dict[str, set[str]] = {}  # of each user that is held
        self._users_of: dict[str, set[str]] = {}  # of each task that is held
        self._changes = 0  # an answer that was under way while this grew may be of before the change

    async def get(self, user: str, task: str, *, created: float | None = None) -> Customization | None:
        """The user's customization of the task, None without one. `user` and `task` are scoped names.

        `StoreUnavailable` where that is not known here while Redis is away or the feed is not followed. `Conflict`
        "changed_meanwhile" where the index no longer has the task that was `created` then, of which the feed has not
        told yet: its customizations went with it, so that "none" would be said of somebody who had one.
        """
        if (held := self._held.get((user, task))) is not None and created in (None, held[1]):
            self._held.move_to_end((user, task))
            return held[0]
        if not self._follower.available:
            pair = f"of user '{id_of(user)}' and task '{id_of(task)}'"
            raise StoreUnavailable(f"the customization {pair} is not known here, and Redis cannot be asked")
        changes = self._changes
        found, made = await self._index.find_in_task(user, task)
        if created is not None and made != created:
            raise Conflict("changed_meanwhile", f"task '{id_of(task)}' was deleted or made anew; ask again")
        if self._changes == changes:
            self._hold(user, task, (found, made))
        return found

    def forget(self, user: str, task: str) -> None:
        """Read this pair anew when it is asked for."""
        self._changes += 1
        self._drop(user, task)

    def subscribed(self, follower: Follower) -> None:
        """Follow this one."""
        self._follower = follower

    def changed(self, event: FeedEvent) -> None:
        """Forget what this change makes wrong."""
        if event.kind in ("customized", "uncustomized"):
            self.forget(event.user, event.task)
        elif event.kind == "user_deleted":
            self._changes += 1
            for task in list(self._tasks_of.get(event.user, ())):
                self._drop(event.user, task)
        elif event.kind == "task_deleted":
            self._changes += 1
            for user in list(self._users_of.get(event.task, ())):
                self._drop(user, event.task)

    def clear(self) -> None:
        """Forget everything."""
        self._changes += 1
        self._held.clear()
        self._tasks_of.clear()
        self._users_of.clear()

    def _hold(self, user: str, task: str, found: tuple[Customization | None, float | None]) -> None:
        """What was found, and when the task was made."""
        self._held[user, task] = found
        self._tasks_of.setdefault(user, set()).add(task)
        self._users_of.setdefault(task, set()).add(user)
        if len(self._held) > HELD:
            self._drop(*next(iter(self._held)))

    def _drop(self, user: str, task: str) -> None:
        if (user, task) not in self._held:
            return
        del self._held[user, task]
        for known, name, other in ((self._tasks_of, user, task), (self._users_of, task, user)):
            known[name].discard(other)
            if not known[name]:
                del known[name]

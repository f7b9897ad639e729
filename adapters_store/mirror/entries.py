"""What a server holds of the index's tasks in memory, with the questions that are asked of all tasks at once.

It reads nothing: `TaskDirectory` fills it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import nsmallest

from adapters_store.records import Task, TaskState, Version
from adapters_store.scope import id_of, tenant_of


@dataclass(slots=True)
class Mirrored:
    """A task, and the further versions of it that somebody asked for, oldest first."""

    state: TaskState
    others: dict[int, Version] = field(default_factory=dict)


class Mirror:
    """Tasks by scoped name."""

    def __init__(self) -> None:
        self.entries: dict[str, Mirrored] = {}
        self._public: dict[str, str] = {}  # id → scoped name
        self._pinned: set[str] = set()

    def hold(self, state: TaskState, others: dict[int, Version]) -> None:
        """Put a task in place of what was held of it."""
        name, settings = state.task.name, state.task.settings
        self.drop(name)
        self.entries[name] = Mirrored(state, others)
        if settings.pinned:
            self._pinned.add(name)
        if settings.public:
            self._public[id_of(name)] = name

    def drop(self, name: str) -> None:
        """Forget a task; one that is not held is fine."""
        self.entries.pop(name, None)
        self._pinned.discard(name)
        if self._public.get(id_of(name)) == name:
            del self._public[id_of(name)]

    def page(self, tenant: str, limit: int, after: str | None) -> tuple[list[TaskState], bool]:
        """Up to `limit` of a tenant's tasks by name, from the first beyond `after`; and whether more follow."""
        low = after or ""
        names = (name for name in self.entries if name > low and tenant_of(name) == tenant)
        found = nsmallest(limit + 1, names)
        return [self.entries[name].state for name in found[:limit]], len(found) > limit

    def public_name(self, task_id: str) -> str | None:
        """The scoped name of the public task of this id."""
        return self._public.get(task_id)

    def public(self) -> list[Task]:
        """All public tasks, by id."""
        return [self.entries[self._public[task_id]].state.task for task_id in sorted(self._public)]

    def pinned(self) -> list[Task]:
        """All pinned tasks, by name."""
        return [self.entries[name].state.task for name in sorted(self._pinned)]

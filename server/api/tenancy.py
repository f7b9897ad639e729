"""Which tasks and users a caller means by the ids that they say, and in which words they are answered.

The index knows scoped names (`adapters_store.scope`); clients say and see ids alone. A caller's id stands for their own
tenant's, else for the public task of that id. What is another tenant's is never looked up, so that neither an answer
nor its time tells whether it exists.
"""

from __future__ import annotations

from adapters_store import NotFound, RedisIndex, StoreUnavailable, TaskState, id_of, scoped, tenant_of
from server.api.caller import Caller
from server.api.services import Services


def own(caller: Caller, name: str, *, what: str = "task") -> str:
    """The scoped name of the caller's own task or user, whether or not there is one: what a write is done to.

    Raises `NotFound` for what is no id but the scoped name of somebody's.
    """
    if "/" in name:
        raise NotFound(what, name)
    return scoped(caller.tenant, name)


def visible(services: Services, caller: Caller, name: str) -> str:
    """The scoped name of the task that the caller means by "task", "task@N" or "task@canary": what a read is done to.

    Their own task, else the public one; where there is neither, their own name, which nothing has.
    """
    if "/" in name.partition("@")[0]:
        raise NotFound("task", name)
    return services.directory.seen_by(caller.tenant, name)


def is_own(caller: Caller, scoped_name: str) -> bool:
    """Whether a visible task is the caller's: only then do they see who uses and changes it."""
    return tenant_of(scoped_name) == caller.tenant


async def list_visible(
    services: Services, caller: Caller, limit: int, after: str | None
) -> tuple[list[TaskState], bool]:
    """Up to `limit` of the caller's own and the public tasks by id, from the first beyond the id `after`; and whether
    more follow. An own task hides the public one of its id. While Redis is away it is as this server last knew it."""
    beyond = None if after is None else own(caller, after)
    try:
        states, has_more = await _index_of(services).list_states(limit, beyond, tenant=caller.tenant)
    except StoreUnavailable:
        states, has_more = services.directory.list_states(limit, beyond, tenant=caller.tenant)
    last = id_of(states[-1].task.name) if has_more and states else None
    others = []
    for task in services.directory.public():
        task_id = id_of(task.name)
        in_page = (after is None or task_id > after) and (last is None or task_id <= last)
        if in_page and not is_own(caller, task.name) and services.directory.get(own(caller, task_id)) is None:
            others.append(task.name)
    if others:
        public = services.directory.states(others[: limit + 1])
        states = sorted([*states, *public], key=lambda state: id_of(state.task.name))
    return states[:limit], has_more or len(states) > limit


def _index_of(services: Services) -> RedisIndex:
    """The index, unless Redis is known to be away: then nobody waits for it."""
    if not services.directory.available:
        raise StoreUnavailable("Redis is away")
    return services.index


__all__ = ["id_of", "is_own", "list_visible", "own", "visible"]

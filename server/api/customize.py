"""From a folder of files to a user's customization of a task: checked against the task, stored, in force.

What a task's settings allow is looked at here; whether the adapter fits the base, and can be laid over the task's, is
the engine's to say.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from adapters_store import (
    Customization,
    CustomizationLimits,
    FeedEvent,
    NotFound,
    TaskState,
    customize_files,
    id_of,
)
from adapters_store.records import Mode
from server.api.adapter_refs import adapter_of
from server.api.caller import Caller
from server.api.publish import CheckedUpload, check_staged, facts_of
from server.api.resolve import check_servable, naming
from server.api.services import Services
from server.errors import AdapterError, RequestError


async def read_task(services: Services, task: str) -> TaskState:
    """The task and its active version as the index has them now; `NotFound`. `task` is a scoped name."""
    [state] = await services.index.read_tasks([task])
    if state is None:
        raise NotFound("task", task)
    return state


async def check_customization(
    services: Services, caller: Caller, user: str, state: TaskState, folder: Path, mode: Mode
) -> CheckedUpload:
    """Check the files of a staging folder as a customization; nothing is kept. Raises `RequestError`."""
    under = None
    if mode == "compose" and state.active is not None:
        check_servable(state.active, services.require_base(), "task")
        under = adapter_of(state.active)
    try:
        checked = await check_staged(services, folder, under)
    except AdapterError as error:
        raise naming(error, () if state.active is None else (state.active,)) from None
    if checked.facts.tasks is not None:
        message = f"this checkpoint holds {checked.facts.tasks} tasks, and a customization is of one"
        raise AdapterError("unsupported_method", message, "files")
    if state.task.settings.customization is not None:
        _check_limits(state.task.settings.customization, checked)
    await services.quotas.check_room(
        caller, checked.bytes, lambda: services.index.charged_for(user, state.task.name, caller.key_id)
    )
    return checked


async def put_customization(
    services: Services, caller: Caller, user: str, state: TaskState, folder: Path, mode: Mode
) -> tuple[Customization, CheckedUpload]:
    """Check the files of a staging folder, which are moved away, and lay them over the task, in place of what the user
    had there. `user` is a scoped name."""
    checked = await check_customization(services, caller, user, state, folder, mode)
    base = services.require_base()
    customization = await customize_files(
        services.index,
        services.blobs,
        user,
        state.task.name,
        folder,
        facts_of(checked, base),
        mode=mode,
        change=caller.change,
    )
    services.customizations.forget(user, state.task.name)
    base.engine.healed([record.sha256 for record in customization.files.values()])
    return customization, checked


async def delete_customization(services: Services, caller: Caller, user: str, task: str) -> None:
    """Remove it, or raise `NotFound`. Both are scoped names. Where there is none, what the user has over other tenants'
    tasks of this id goes: once such a task is public no longer, nothing else names it, and it still counts."""
    try:
        await _delete(services, caller, user, task)
    except NotFound:
        others = [name for name in await services.index.customized_as(user, id_of(task)) if name != task]
        deleted = False
        for other in others:
            with suppress(NotFound):
                await _delete(services, caller, user, other)
                deleted = True
        if not deleted:
            raise


async def find_customization(services: Services, user: str, task: str) -> Customization | None:
    """What the user has over the task, else what `delete_customization` removes in its place. Both are scoped names."""
    found = await services.index.find_customization(user, task)
    if found is None:
        for other in await services.index.customized_as(user, id_of(task)):
            found = found or await services.index.find_customization(user, other)
    return found


async def _delete(services: Services, caller: Caller, user: str, task: str) -> None:
    await services.index.delete_customization(user, task, change=caller.change)
    services.customizations.forget(user, task)


async def delete_user(services: Services, caller: Caller, user: str) -> None:
    """Remove all that the user has; a user who has nothing is fine. `user` is a scoped name."""
    await services.index.delete_user(user, change=caller.change)
    services.customizations.changed(FeedEvent(id="", kind="user_deleted", user=user))


def _check_limits(limits: CustomizationLimits, checked: CheckedUpload) -> None:
    facts = checked.facts
    if limits.methods is not None and facts.method not in limits.methods:
        allowed = ", ".join(limits.methods)
        raise _over("methods", f"the task lets its users lay {allowed} over it, and this is {facts.method}")
    for name, limit, found in (
        ("max_virtual_tokens", limits.max_virtual_tokens, facts.virtual_tokens),
        ("max_parameters", limits.max_parameters, facts.parameters),
        ("max_bytes", limits.max_bytes, checked.bytes),
    ):
        if limit is not None and found > limit:
            raise _over(name, f"the task's customizations may have {limit}, and this one has {found}")


def _over(limit: str, message: str) -> RequestError:
    return RequestError("customization_limit", f"{limit}: {message}", limit)

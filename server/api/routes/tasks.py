"""`/v1/tasks`: tasks and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from adapters_store import Canary, FeedEvent, StoreUnavailable, Task, Version
from server.api.answers import json_response
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.caller import Caller
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.routes.versions import version_json
from server.api.schemas.tasks import TaskBody, TaskPatch
from server.api.services import Services
from server.api.task_settings import put_settings, revision_of
from server.api.tenancy import id_of, is_own, list_visible, own, visible

router = APIRouter(tags=["tasks"], route_class=GuardedRoute)

MAX_PAGE = 1000


@router.get(
    "/v1/tasks",
    summary="List tasks by name",
    responses=examples.answers({"object": "list", "data": [examples.TASK], "has_more": False}),
)
@needs("invoke")
async def list_tasks(
    services: TheServices,
    caller: TheCaller,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: Annotated[str | None, Query(description="the last name of the page before")] = None,
) -> Response:
    """One page of the caller's own tasks and the public ones, each with its active version's method and size."""
    services.require_base()
    page, has_more = await list_visible(services, caller, limit, after)
    used = await _last_used(services, caller, [state.task for state in page])
    data = [task_json(state.task, state.active, used.get(state.task.name)) for state in page]
    return json_response({"object": "list", "data": data, "has_more": has_more})


@router.put(
    "/v1/tasks/{task}", summary="Create a task or change its settings", responses=examples.answers(examples.TASK)
)
@needs("publish")
async def put_task(
    task: str,
    body: TaskBody,
    services: TheServices,
    caller: TheCaller,
    if_match: Annotated[str | None, Header(description="change only settings of this revision; else 412")] = None,
) -> Response:
    """A setting left out keeps its value; null resets it. Changes of several callers at once are all kept, one after
    the other; with `If-Match` and the task's `revision` (its ETag) a change is refused if another came between."""
    changed = await put_settings(services, caller, task, body, revision=revision_of(if_match))
    return await _show(services, caller, changed)


@router.get(
    "/v1/tasks/{task}",
    summary="Show a task",
    responses=examples.answers({**examples.TASK, "versions": [examples.VERSION]}),
)
@needs("invoke")
async def get_task(task: str, services: TheServices, caller: TheCaller) -> Response:
    """Settings, pointers and all versions."""
    return await _show(services, caller, await services.index.get_task(visible(services, caller, task)))


@router.patch("/v1/tasks/{task}", summary="Switch to a version, or try one", responses=examples.answers(examples.TASK))
@needs("publish")
async def patch_task(task: str, body: TaskPatch, services: TheServices, caller: TheCaller) -> Response:
    """`active_version` switches all requests, `canary` gives a version its percent of them: the same users always, or,
    of requests without a user, the same request ids. Requests in flight end on the version that they started on. A
    version made for another base than this server's is refused (409 `base_mismatch`)."""
    facts = services.require_base().facts
    name, base = own(caller, task), facts.fingerprint
    if body.active_version is not None:
        known = services.directory.get(name)
        if known is not None and known.settings.pinned:
            version = await services.index.get_version(name, body.active_version)
            await services.pins.check(facts, name, version.parameters)
        changed = await services.index.activate(name, body.active_version, base=base, change=caller.change)
    else:
        canary = None if body.canary is None else Canary(body.canary.version, body.canary.percent)
        changed = await services.index.set_canary(name, canary, base=base, change=caller.change)
    await services.directory.refresh([name])
    return await _show(services, caller, changed)


@router.post(
    "/v1/tasks/{task}/rollback",
    summary="Switch back to the version before",
    responses=examples.answers(examples.TASK),
)
@needs("publish")
async def rollback(task: str, services: TheServices, caller: TheCaller) -> Response:
    """To the newest version that was active before and still exists. What it is rolled back from is none that a
    further rollback leads to. Where that was made for another base than this server's, 409 `base_mismatch`."""
    base = services.require_base().facts.fingerprint
    name = own(caller, task)
    changed = await services.index.rollback(name, base=base, change=caller.change)
    await services.directory.refresh([name])
    return await _show(services, caller, changed)


@router.delete("/v1/tasks/{task}", status_code=204, summary="Delete a task and its versions", responses=examples.ERRORS)
@needs("publish")
async def delete_task(task: str, services: TheServices, caller: TheCaller) -> Response:
    """Its version numbers stay used; users' customizations go with it."""
    name = own(caller, task)
    await services.index.delete_task(name, change=caller.change)
    services.customizations.changed(FeedEvent(id="", kind="task_deleted", task=name))
    await services.directory.refresh([name])
    return Response(status_code=204)


def task_json(task: Task, active: Version | None, last_used: float | None) -> dict[str, Any]:
    """A task without its versions; `methods` and `bytes` are the active one's."""
    canary, limits = task.canary, task.settings.customization
    return {
        "task": id_of(task.name),
        "description": task.settings.description,
        "template": task.settings.template,
        "defaults": task.settings.defaults,
        "labels": task.settings.labels,
        "public": task.settings.public,
        "pinned": task.settings.pinned,
        "customization": None if limits is None else msgspec.structs.asdict(limits),
        "revision": task.settings_revision,
        "active": task.active,
        "previous": task.previous,
        "canary": None if canary is None else {"version": canary.version, "percent": canary.percent},
        "methods": [] if active is None else [active.method],
        "bytes": 0 if active is None else active.bytes,
        "created": task.created,
        "updated": task.updated,
        "last_used": last_used,
    }


async def _last_used(services: Services, caller: Caller, tasks: Sequence[Task]) -> dict[str, float | None]:
    """By name. Of another tenant's public task it is not told, and of none while Redis is away."""
    names = [task.name for task in tasks if is_own(caller, task.name)]
    if services.directory.available:
        with suppress(StoreUnavailable):
            return dict(zip(names, await services.index.last_uses(names), strict=True))
    return {}


async def _show(services: Services, caller: Caller, task: Task) -> Response:
    base = services.require_base()
    versions = await services.index.list_versions(task.name)
    active = next((version for version in versions if version.number == task.active), None)
    used = await _last_used(services, caller, [task])
    document = task_json(task, active, used.get(task.name))
    shown = [version_json(version, base, is_active=version.number == task.active) for version in versions]
    response = json_response({**document, "versions": shown})
    response.headers["ETag"] = f'"{task.settings_revision}"'
    return response

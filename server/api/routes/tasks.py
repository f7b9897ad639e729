"""`/v1/tasks`: tasks and their settings."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from adapters_store import Task, Version
from server.api.answers import json_response
from server.api.publish import put_settings
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.routes.versions import version_json
from server.api.schemas.tasks import TaskBody, TaskPatch
from server.api.services import Services
from server.errors import RequestError

router = APIRouter(tags=["tasks"])

MAX_PAGE = 1000


@router.get(
    "/v1/tasks",
    summary="List tasks by name",
    responses=examples.answers({"object": "list", "data": [examples.TASK], "has_more": False}),
)
async def list_tasks(
    services: TheServices,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: Annotated[str | None, Query(description="the last name of the page before")] = None,
) -> Response:
    """One page, each task with its active version's method and size."""
    services.require_base()
    page, has_more = await services.index.list_active(limit, after)
    used = await asyncio.gather(*(services.index.last_used(task.name) for task, _ in page))
    data = [task_json(task, active, last_used) for (task, active), last_used in zip(page, used, strict=True)]
    return json_response({"object": "list", "data": data, "has_more": has_more})


@router.put(
    "/v1/tasks/{task}", summary="Create a task or change its settings", responses=examples.answers(examples.TASK)
)
async def put_task(task: str, body: TaskBody, services: TheServices) -> Response:
    """A setting left out keeps its value; null resets it."""
    return await _show(services, await put_settings(services, task, body))


@router.get(
    "/v1/tasks/{task}",
    summary="Show a task",
    responses=examples.answers({**examples.TASK, "versions": [examples.VERSION]}),
)
async def get_task(task: str, services: TheServices) -> Response:
    """Settings, pointers and all versions."""
    return await _show(services, await services.index.get_task(task))


@router.patch("/v1/tasks/{task}", summary="Switch to a version", responses=examples.answers(examples.TASK))
async def patch_task(task: str, body: TaskPatch, services: TheServices) -> Response:
    """Requests in flight end on the version that they started on. `previous` names the version to roll back to."""
    services.require_base()
    if body.active_version is None:
        if "canary" in body.model_fields_set:  # null: there is none to remove
            return await _show(services, await services.index.get_task(task))
        raise RequestError("invalid_request", "active_version: name the version to switch to", "active_version")
    patched = await services.index.activate(task, body.active_version)
    await services.directory.refresh([task])
    return await _show(services, patched)


@router.delete("/v1/tasks/{task}", status_code=204, summary="Delete a task and its versions", responses=examples.ERRORS)
async def delete_task(task: str, services: TheServices) -> Response:
    """Its version numbers stay used."""
    await services.index.delete_task(task)
    await services.directory.refresh([task])
    return Response(status_code=204)


def task_json(task: Task, active: Version | None, last_used: float | None) -> dict[str, Any]:
    """A task without its versions; `methods` and `bytes` are the active one's."""
    canary = task.canary
    return {
        "task": task.name,
        "description": task.settings.description,
        "template": task.settings.template,
        "defaults": task.settings.defaults,
        "labels": task.settings.labels,
        "active": task.active,
        "previous": task.previous,
        "canary": None if canary is None else {"version": canary.version, "percent": canary.percent},
        "methods": [] if active is None else [active.method],
        "bytes": 0 if active is None else active.bytes,
        "created": task.created,
        "updated": task.updated,
        "last_used": last_used,
    }


async def _show(services: Services, task: Task) -> Response:
    base = services.require_base()
    versions = await services.index.list_versions(task.name)
    active = next((version for version in versions if version.number == task.active), None)
    document = task_json(task, active, await services.index.last_used(task.name))
    shown = [version_json(version, base, is_active=version.number == task.active) for version in versions]
    return json_response({**document, "versions": shown})

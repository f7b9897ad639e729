"""`/v1/tasks/{task}/history`: who changed a task, when, and by which request."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from adapters_store import HistoryEntry, NotFound
from server.api.answers import json_response
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.routes.tasks import MAX_PAGE
from server.api.tenancy import own

router = APIRouter(tags=["tasks"], route_class=GuardedRoute)


@router.get(
    "/v1/tasks/{task}/history",
    summary="Show who changed a task",
    responses=examples.answers({"object": "list", "data": [examples.HISTORY_ENTRY], "has_more": False}),
)
@needs("invoke")
async def get_history(
    task: str,
    services: TheServices,
    caller: TheCaller,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    before: Annotated[int | None, Query(ge=1, description="the last id of the page before")] = None,
) -> Response:
    """One page of the changes of a task of the caller's tenant, newest first; it outlives the task. `actor` is an API
    key's id, empty where the server asks for none. About the last 1000 are kept."""
    name = own(caller, task)
    entries = await services.index.history(name, limit + 1, before)
    if not entries and before is None:
        raise NotFound("task", name)
    data = [_entry_json(entry) for entry in entries[:limit]]
    return json_response({"object": "list", "data": data, "has_more": len(entries) > limit})


def _entry_json(entry: HistoryEntry) -> dict[str, object]:
    return {
        "id": entry.id,
        "time": entry.time,
        "action": entry.action,
        "actor": entry.actor,
        "request_id": entry.request_id,
        "detail": entry.detail,
    }

"""`/v1/models`: the base and every task, as OpenAI lists models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from adapters_store import NotFound, Task
from server.api.answers import json_response
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.resolve import not_found
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.services import ServedBase
from server.api.tenancy import id_of, list_visible, visible

router = APIRouter(tags=["models"], route_class=GuardedRoute)

_PAGE = 1000  # tasks read at once


@router.get(
    "/v1/models",
    summary="List the base and all tasks",
    responses=examples.answers({"object": "list", "data": [examples.MODEL]}),
)
@needs("invoke")
async def list_models(services: TheServices, caller: TheCaller) -> Response:
    """The base first, then every task by name: the caller's own, and public ones."""
    base = services.require_base()
    models = [_base_model(base)]
    has_more, last = True, None
    while has_more:
        states, has_more = await list_visible(services, caller, _PAGE, last)
        models += [_task_model(state.task, base) for state in states]
        last = id_of(states[-1].task.name) if states else last
    return json_response({"object": "list", "data": models})


@router.get("/v1/models/{model:path}", summary="Look up one model", responses=examples.answers(examples.MODEL))
@needs("invoke")
async def get_model(model: str, services: TheServices, caller: TheCaller) -> Response:
    """The base, a task, or `task@N`."""
    base = services.require_base()
    if model == base.facts.id:
        return json_response(_base_model(base))
    try:
        name = visible(services, caller, model)
        task = services.directory.get(name)
        if task is not None:
            return json_response(_task_model(task, base))
        task, _ = await services.directory.resolve(name)
    except NotFound as error:
        raise not_found(error, "model") from None
    return json_response({**_task_model(task, base), "id": model})


def _base_model(base: ServedBase) -> dict[str, Any]:
    return {
        "id": base.facts.id,
        "object": "model",
        "created": base.created,
        "owned_by": "medley",
        "parent": None,
        "max_model_len": base.facts.max_model_len,
    }


def _task_model(task: Task, base: ServedBase) -> dict[str, Any]:
    return {
        "id": id_of(task.name),
        "object": "model",
        "created": int(task.created),
        "owned_by": "medley",
        "parent": base.facts.id,
        "max_model_len": base.facts.max_model_len,
    }

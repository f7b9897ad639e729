"""`/v1/users`: users' own layers over tasks.

A task is the caller's own or a public one, as in every call; limits that its settings name hold for both. A user is
known by their customizations alone.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from adapters_store import ID_PATTERN, Customization, NotFound
from adapters_store.records import Mode
from server.api.answers import json_response
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.caller import Caller
from server.api.customize import (
    check_customization,
    delete_customization,
    delete_user,
    find_customization,
    put_customization,
    read_task,
)
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.routes.tasks import MAX_PAGE
from server.api.routes.uploading import MULTIPART, received
from server.api.services import ServedBase, Services
from server.api.tenancy import id_of, own, visible
from server.errors import RequestError

router = APIRouter(tags=["users"], route_class=GuardedRoute)

UserId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]


@router.put(
    "/v1/users/{user}/tasks/{task}",
    status_code=201,
    summary="Lay a user's own adapter over a task",
    responses={
        **examples.answers(examples.CUSTOMIZATION, status=201, description="It is in force"),
        200: {
            "description": "A dry run found nothing wrong",
            "content": {"application/json": {"example": examples.CUSTOMIZATION}},
        },
    },
    openapi_extra={"requestBody": MULTIPART},
)
@needs("publish")
async def put(
    user: UserId,
    task: str,
    request: Request,
    services: TheServices,
    caller: TheCaller,
    mode: Mode = "compose",
    dry_run: bool = False,
) -> Response:
    """The files of an adapter's folder are laid over the task's own adapter (`compose`) or take its place (`replace`)
    in requests with this `user`, and replace what the user had there. With `dry_run` everything is checked and nothing
    kept."""
    try:
        response = await _receive(services, caller, user, task, request, mode=mode, dry_run=dry_run)
    except RequestError as error:
        services.metrics.customization(error.code)
        raise
    services.metrics.customization("checked" if dry_run else "created")
    return response


@router.get(
    "/v1/users/{user}/tasks",
    summary="List what a user has",
    responses=examples.answers({"object": "list", "data": [examples.CUSTOMIZATION], "has_more": False}),
)
@needs("invoke")
async def list_customizations(
    user: UserId,
    services: TheServices,
    caller: TheCaller,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: Annotated[str | None, Query(description="the last task of the page before")] = None,
) -> Response:
    """One page of the user's customizations by task."""
    base = services.require_base()
    page, has_more = await _page(services, caller, user, limit, after)
    data = [
        customization_json(found, base, is_reached=visible(services, caller, id_of(found.task)) == found.task)
        for found in page
    ]
    return json_response({"object": "list", "data": data, "has_more": has_more})


@router.get(
    "/v1/users/{user}/tasks/{task}",
    summary="Show a user's customization",
    responses=examples.answers(examples.CUSTOMIZATION),
)
@needs("invoke")
async def get(user: UserId, task: str, services: TheServices, caller: TheCaller) -> Response:
    """What the user has laid over the task."""
    base = services.require_base()
    name = visible(services, caller, task)
    found = await find_customization(services, own(caller, user, what="user"), name)
    if found is None:
        raise NotFound("customization", name)
    return json_response(customization_json(found, base, is_reached=found.task == name))


@router.delete(
    "/v1/users/{user}/tasks/{task}",
    status_code=204,
    summary="Delete a user's customization",
    responses=examples.ERRORS,
)
@needs("publish")
async def delete(user: UserId, task: str, services: TheServices, caller: TheCaller) -> Response:
    """Requests in flight end on what they started with; later ones get the task alone. Where the user has none, what
    they laid over another tenant's task of this id is deleted, which is public no longer or hidden by an own one."""
    await delete_customization(services, caller, own(caller, user, what="user"), visible(services, caller, task))
    return Response(status_code=204)


@router.delete("/v1/users/{user}", status_code=204, summary="Delete all that a user has", responses=examples.ERRORS)
@needs("publish")
async def delete_all(user: UserId, services: TheServices, caller: TheCaller) -> Response:
    """All customizations of the user; 204 as well where there are none."""
    await delete_user(services, caller, own(caller, user, what="user"))
    return Response(status_code=204)


def customization_json(customization: Customization, base: ServedBase, *, is_reached: bool = True) -> dict[str, Any]:
    """A customization; `servable` says whether it was made for this server's base, and is over the task that its id
    names (`is_reached`)."""
    return {
        "user": id_of(customization.user),
        "task": id_of(customization.task),
        "mode": customization.mode,
        "made_against": customization.made_against,
        "digest": customization.digest,
        "method": customization.method,
        "parameters": customization.parameters,
        "bytes": customization.bytes,
        "virtual_tokens": customization.virtual_tokens,
        "rank": customization.rank,
        "servable": is_reached and customization.base_fingerprint == base.facts.fingerprint,
        "created": customization.created,
        "files": [
            {"name": name, "sha256": record.sha256, "bytes": record.size}
            for name, record in sorted(customization.files.items())
        ],
    }


async def _receive(
    services: Services, caller: Caller, user: str, task: str, request: Request, *, mode: Mode, dry_run: bool
) -> Response:
    base = services.require_base()
    user_name, task_name = own(caller, user, what="user"), visible(services, caller, task)
    async with received(services, request) as folder:
        state = await read_task(services, task_name)
        if dry_run:
            checked = await check_customization(services, caller, user_name, state, folder, mode)
            document = {
                "user": user,
                "task": task,
                "mode": mode,
                "digest": checked.digest,
                "method": checked.facts.method,
                "parameters": checked.facts.parameters,
                "bytes": checked.bytes,
                "warnings": checked.warnings,
                "dry_run": True,
            }
            return json_response(document)
        customization, checked = await put_customization(services, caller, user_name, state, folder, mode)
    return json_response({**customization_json(customization, base), "warnings": checked.warnings}, 201)


async def _page(
    services: Services, caller: Caller, user: str, limit: int, after: str | None
) -> tuple[list[Customization], bool]:
    """All but those that another task of their id hides: what is over a task that is public no longer is shown, as it
    still counts."""

    def named(task_id: str) -> str | None:
        """The task that the caller names by this id, if there is one."""
        name = visible(services, caller, task_id)
        return None if services.directory.get(name) is None else name

    user_name = own(caller, user, what="user")
    position = None if after is None else visible(services, caller, after)
    if after is not None and named(after) is None and (others := await services.index.customized_as(user_name, after)):
        position = others[-1]
    shown: list[Customization] = []
    has_more = True
    while has_more and len(shown) < limit:
        page, has_more = await services.index.list_user_customizations(user_name, limit - len(shown), position)
        shown += [found for found in page if named(id_of(found.task)) in (None, found.task)]
        if page:
            position = page[-1].task
    return shown, has_more

"""`/v1/tasks/{task}/versions`: uploads, and what was uploaded."""

from __future__ import annotations

import uuid
from contextlib import AbstractContextManager, AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from adapters_store import Version, VersionCorrupt, on_threads
from server.api.adapter_refs import adapter_of
from server.api.answers import json_response
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.caller import Caller
from server.api.disconnect import while_connected
from server.api.publish import check_room, check_staged, check_task_name, publish_staged, task_names
from server.api.resolve import check_servable, name_of, naming
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.routes.uploading import MULTIPART, received
from server.api.services import ServedBase, Services
from server.api.tenancy import id_of, own, visible
from server.engine.protocol import NeighboursFound
from server.errors import RequestError

router = APIRouter(tags=["versions"], route_class=GuardedRoute)

_NEIGHBOURS = {
    "task": "sentiment",
    "version": 1,
    "method": "prompt_tuning",
    "virtual_tokens": [
        {"norm": 1.9, "neighbours": [{"token_id": 812, "token": " review", "similarity": 0.61, "norm": 1.4}]}
    ],
    "layers": [],
}


@router.post(
    "/v1/tasks/{task}/versions",
    status_code=201,
    summary="Upload an adapter",
    responses={
        **examples.answers(examples.VERSION, status=201, description="A new version"),
        200: {
            "description": "This content is a version already, or a dry run found nothing wrong",
            "content": {"application/json": {"example": examples.VERSION}},
        },
    },
    openapi_extra={"requestBody": MULTIPART},
)
@needs("publish")
async def upload(
    task: str,
    request: Request,
    services: TheServices,
    caller: TheCaller,
    activate: bool = True,
    dry_run: bool = False,
    task_index: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """The files of an adapter's folder become a version of the task, which is created if new. With `dry_run` everything
    is checked and nothing kept.

    A checkpoint of N tasks (multitask prompt tuning) becomes a version of each of the tasks `{task}:0` … `{task}:N-1`;
    the answer is the first one's with all of them in `tasks`. With `task_index` it is a version of `{task}` itself,
    of that one of its tasks alone.
    """
    try:
        response = await _receive(
            services, caller, task, request, activate=activate, dry_run=dry_run, task_index=task_index
        )
    except RequestError as error:
        services.metrics.upload(error.code)
        raise
    services.metrics.upload("checked" if dry_run else "created" if response.status_code == 201 else "existing")
    return response


@router.get(
    "/v1/tasks/{task}/versions/{number}", summary="Show a version", responses=examples.answers(examples.VERSION)
)
@needs("invoke")
async def get_version(task: str, number: int, services: TheServices, caller: TheCaller) -> Response:
    """A version and its files' hashes."""
    base = services.require_base()
    name = visible(services, caller, task)
    version = await services.index.get_version(name, number)
    active = (await services.index.get_task(name)).active
    return json_response(version_json(version, base, is_active=number == active))


@router.delete(
    "/v1/tasks/{task}/versions/{number}",
    status_code=204,
    summary="Delete a version that neither is active nor the canary",
    responses=examples.ERRORS,
)
@needs("publish")
async def delete_version(task: str, number: int, services: TheServices, caller: TheCaller) -> Response:
    """Its number stays used."""
    name = own(caller, task)
    await services.index.delete_version(name, number, change=caller.change)
    await services.directory.refresh([name])
    return Response(status_code=204)


@router.get(
    "/v1/tasks/{task}/versions/{number}/files/{name}",
    summary="Download a file",
    response_class=FileResponse,
    responses={200: {"description": "The file, byte for byte as uploaded"}, **examples.ERRORS},
)
@needs("invoke")
async def get_file(task: str, number: int, name: str, services: TheServices, caller: TheCaller) -> Response:
    """A file of a version, as it was uploaded."""
    version = await services.index.get_version(visible(services, caller, task), number)
    record = version.files.get(name)
    if record is None:
        message = f"version {number} of '{task}' has no file '{name}'; it has {', '.join(sorted(version.files))}"
        raise RequestError("file_not_found", message, "name")
    try:
        return await _BlobResponse.of(services.blobs.file(record.sha256), name)
    except VersionCorrupt as error:
        raise RequestError(
            "version_corrupt", f"{name_of(version)}: {error}; upload its content again", "name"
        ) from None


@router.get(
    "/v1/tasks/{task}/versions/{number}/neighbours",
    summary="Show what virtual tokens are near to",
    responses=examples.answers(_NEIGHBOURS),
)
@needs("invoke")
async def get_neighbours(
    task: str,
    number: int,
    request: Request,
    services: TheServices,
    caller: TheCaller,
    k: Annotated[int, Query(ge=1, le=100)] = 5,
) -> Response:
    """Of a soft prompt: each virtual token's norm and the `k` nearest tokens of the vocabulary by cosine. Of a prefix:
    its keys' and values' norms in each layer. Other methods have no virtual tokens."""
    base = services.require_base()
    version = await services.index.get_version(visible(services, caller, task), number)
    check_servable(version, base, "number")
    search = base.engine.neighbours(uuid.uuid4().hex, adapter_of(version), k)
    try:
        found = await while_connected(request.receive, search)
    except RequestError as error:
        raise naming(error, (version,)) from None
    document = {"task": id_of(version.task), "version": version.number, "method": version.method}
    return json_response({**document, **_neighbours_json(found, base)})


class _BlobResponse(FileResponse):
    """A blob's file, which its store keeps on this machine until it has been sent."""

    _use: AsyncExitStack

    @classmethod
    async def of(cls, blob: AbstractContextManager[Path], name: str) -> _BlobResponse:
        """Raises as opening the blob does."""
        use = AsyncExitStack()
        path = await use.enter_async_context(on_threads(blob))
        response = cls(path, media_type="application/octet-stream", filename=name)
        response._use = use
        return response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._use:
            await super().__call__(scope, receive, send)


def _neighbours_json(found: NeighboursFound, base: ServedBase) -> dict[str, Any]:
    """One of the two lists is empty: which, the method says."""
    text = (lambda token_id: None) if base.tokenizer is None else base.tokenizer.token_text
    return {
        "virtual_tokens": [
            {
                "norm": token.norm,
                "neighbours": [
                    {
                        "token_id": near.token_id,
                        "token": text(near.token_id),
                        "similarity": near.similarity,
                        "norm": near.norm,
                    }
                    for near in token.nearest
                ],
            }
            for token in found.tokens
        ],
        "layers": [{"key_norms": layer.keys, "value_norms": layer.values} for layer in found.layers],
    }


def version_json(version: Version, base: ServedBase, *, is_active: bool) -> dict[str, Any]:
    """A version; `servable` says whether it was made for this server's base."""
    return {
        "task": id_of(version.task),
        "version": version.number,
        "digest": version.digest,
        "method": version.method,
        "parameters": version.parameters,
        "bytes": version.bytes,
        "virtual_tokens": version.virtual_tokens,
        "rank": version.rank,
        "active": is_active,
        "servable": version.base_fingerprint == base.facts.fingerprint,
        "warnings": version.warnings,
        "created": version.created,
        "files": [
            {"name": name, "sha256": record.sha256, "bytes": record.size}
            for name, record in sorted(version.files.items())
        ],
    }


async def _receive(
    services: Services,
    caller: Caller,
    task: str,
    request: Request,
    *,
    activate: bool,
    dry_run: bool,
    task_index: int | None,
) -> Response:
    check_task_name(services, task)
    base = services.require_base()
    async with received(services, request) as folder:
        if dry_run:
            checked = await check_staged(services, folder)
            names = task_names(services, task, checked.facts, task_index)
            await check_room(services, caller, task, checked)
            for name in names if activate else []:
                await services.pins.check_active(base.facts, own(caller, name), checked.facts.parameters)
            document: dict[str, Any] = {
                "task": task,
                "version": None,
                "digest": checked.digest,
                "method": checked.facts.method,
                "parameters": checked.facts.parameters,
                "bytes": checked.bytes,
                "active": False,
                "warnings": checked.warnings,
                "dry_run": True,
            }
            if names != [task]:
                document["tasks"] = names
            return json_response(document)
        published = await publish_staged(services, caller, task, folder, activate=activate, task_index=task_index)
    documents = []
    for version, _ in published:
        is_active = (await services.index.get_task(version.task)).active == version.number
        documents.append(version_json(version, base, is_active=is_active))
    document = documents[0]
    if document["task"] != task:  # a checkpoint of several tasks
        document = {**document, "tasks": documents}
    return json_response(document, 201 if any(is_new for _, is_new in published) else 200)

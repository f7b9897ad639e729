"""`/v1/tasks/{task}/versions`: uploads, and what was uploaded."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from adapters_store import Version, VersionCorrupt
from server.api.answers import json_response
from server.api.disconnect import while_connected
from server.api.errors import request_error_of
from server.api.publish import check_staged, check_task_name, publish_staged, task_names
from server.api.resolve import adapter_of, check_servable
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.services import ServedBase, Services
from server.api.uploads import ACCEPTED_FILES, receive_files
from server.engine.protocol import NeighboursFound
from server.errors import RequestError

router = APIRouter(tags=["versions"])

_MULTIPART = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["files"],
                "properties": {
                    "files": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": f"with file names: {', '.join(ACCEPTED_FILES)}",
                    }
                },
            }
        }
    },
}


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
    openapi_extra={"requestBody": _MULTIPART},
)
async def upload(
    task: str, request: Request, services: TheServices, activate: bool = True, dry_run: bool = False
) -> Response:
    """The files of an adapter's folder become a version of the task, which is created if new. With `dry_run` everything
    is checked and nothing kept.

    A checkpoint of N tasks (multitask prompt tuning) becomes a version of each of the tasks `{task}:0` … `{task}:N-1`;
    the answer is the first one's with all of them in `tasks`.
    """
    try:
        response = await _receive(services, task, request, activate=activate, dry_run=dry_run)
    except RequestError as error:
        services.metrics.upload(error.code)
        raise
    services.metrics.upload("checked" if dry_run else "created" if response.status_code == 201 else "existing")
    return response


@router.get(
    "/v1/tasks/{task}/versions/{number}", summary="Show a version", responses=examples.answers(examples.VERSION)
)
async def get_version(task: str, number: int, services: TheServices) -> Response:
    """A version and its files' hashes."""
    base = services.require_base()
    version = await services.index.get_version(task, number)
    active = (await services.index.get_task(task)).active
    return json_response(version_json(version, base, is_active=number == active))


@router.delete(
    "/v1/tasks/{task}/versions/{number}",
    status_code=204,
    summary="Delete a version that is not active",
    responses=examples.ERRORS,
)
async def delete_version(task: str, number: int, services: TheServices) -> Response:
    """Its number stays used."""
    await services.index.delete_version(task, number)
    await services.directory.refresh([task])
    return Response(status_code=204)


@router.get(
    "/v1/tasks/{task}/versions/{number}/files/{name}",
    summary="Download a file",
    response_class=FileResponse,
    responses={200: {"description": "The file, byte for byte as uploaded"}, **examples.ERRORS},
)
async def get_file(task: str, number: int, name: str, services: TheServices) -> Response:
    """A file of a version, as it was uploaded."""
    version = await services.index.get_version(task, number)
    record = version.files.get(name)
    if record is None:
        message = f"version {number} of '{task}' has no file '{name}'; it has {', '.join(sorted(version.files))}"
        raise RequestError("file_not_found", message, "name")
    if not services.blobs.exists(record.sha256):
        raise request_error_of(VersionCorrupt(record.sha256, f"blob {record.sha256} is missing from the blob store"))
    return FileResponse(services.blobs.path(record.sha256), media_type="application/octet-stream", filename=name)


@router.get(
    "/v1/tasks/{task}/versions/{number}/neighbours",
    summary="Show what virtual tokens are near to",
    responses=examples.answers(_NEIGHBOURS),
)
async def get_neighbours(
    task: str, number: int, request: Request, services: TheServices, k: Annotated[int, Query(ge=1, le=100)] = 5
) -> Response:
    """Of a soft prompt: each virtual token's norm and the `k` nearest tokens of the vocabulary by cosine. Of a prefix:
    its keys' and values' norms in each layer. Other methods have no virtual tokens."""
    base = services.require_base()
    version = await services.index.get_version(task, number)
    check_servable(version, base, "number")
    search = base.engine.neighbours(uuid.uuid4().hex, adapter_of(version), k)
    found = await while_connected(request.receive, search)
    document = {"task": version.task, "version": version.number, "method": version.method}
    return json_response({**document, **_neighbours_json(found, base)})


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
        "task": version.task,
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


async def _receive(services: Services, task: str, request: Request, *, activate: bool, dry_run: bool) -> Response:
    check_task_name(services, task)
    base = services.require_base()
    with services.upload(), services.blobs.staging() as folder:
        content_type = request.headers.get("content-type", "")
        await receive_files(content_type, request.stream(), folder, services.settings.max_upload_bytes)
        if dry_run:
            checked = await check_staged(services, folder)
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
            if checked.facts.tasks is not None:
                document["tasks"] = task_names(services, task, checked.facts)
            return json_response(document)
        published = await publish_staged(services, task, folder, activate=activate)
    documents = []
    for version, _ in published:
        is_active = (await services.index.get_task(version.task)).active == version.number
        documents.append(version_json(version, base, is_active=is_active))
    document = documents[0]
    if document["task"] != task:  # a checkpoint of several tasks
        document = {**document, "tasks": documents}
    return json_response(document, 201 if any(is_new for _, is_new in published) else 200)

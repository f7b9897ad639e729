"""`/v1/tasks/{task}/versions`: uploads, and what was uploaded."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from adapters_store import Version, VersionCorrupt
from server.api.answers import json_response
from server.api.errors import request_error_of
from server.api.publish import check_staged, check_task_name, publish_staged
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.services import ServedBase, Services
from server.api.uploads import ACCEPTED_FILES, receive_files
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
    """The files of a PEFT folder become a version of the task, which is created if new. With `dry_run` everything is
    checked and nothing kept."""
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
            document = {
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
            return json_response(document)
        version, is_new = await publish_staged(services, task, folder, activate=activate)
    is_active = (await services.index.get_task(task)).active == version.number
    return json_response(version_json(version, base, is_active=is_active), 201 if is_new else 200)

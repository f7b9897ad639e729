"""What the routes that take an adapter's files have in common: the body in the OpenAPI document, and its reception."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Request

from adapters_store import on_threads
from server.api.services import Services
from server.api.uploads import ACCEPTED_FILES, receive_files

MULTIPART: dict[str, Any] = {
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


@asynccontextmanager
async def received(services: Services, request: Request) -> AsyncIterator[Path]:
    """The request's files in a staging folder, which is gone at the end of the block. Raises as `receive_files` does,
    and `too_many_uploads`."""
    with services.upload():
        async with on_threads(services.blobs.staging()) as folder:
            content_type = request.headers.get("content-type", "")
            await receive_files(content_type, request.stream(), folder, services.settings.max_upload_bytes)
            yield folder

"""The bodies that change a task."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from server.api.schemas.body import Body, example, harmless
from server.api.schemas.sampling import TaskDefaults
from server.api.templates import MAX_SOURCE

MAX_DESCRIPTION = 4096
MAX_LABELS = 64


class TaskBody(Body):
    """`PUT /v1/tasks/{task}`: settings to change. A field left out keeps its value, null resets it."""

    model_config = example(
        description="Is a review good or bad?",
        template="Review: {{ input }}\nSentiment:",
        defaults={"max_tokens": 4, "temperature": 0},
    )

    description: str | None = Field(None, max_length=MAX_DESCRIPTION)
    template: str | None = Field(None, max_length=MAX_SOURCE, description="Jinja over `input` and `inputs`")
    defaults: TaskDefaults | None = Field(None, description="sampling fields for requests that leave them out")
    labels: dict[str, Annotated[str, Field(max_length=256)]] | None = Field(None, max_length=MAX_LABELS)


class TaskPatch(Body):
    """`PATCH /v1/tasks/{task}`: which version serves."""

    model_config = example(active_version=1)

    active_version: int | None = Field(None, ge=1)
    canary: Annotated[Any, harmless()] = Field(None, description="not supported by this server")

"""The bodies that change a task."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.body import Body, example
from server.api.schemas.sampling import TaskDefaults
from server.api.templates import MAX_SOURCE

MAX_DESCRIPTION = 4096
MAX_LABELS = 64


class CustomizationBody(Body):
    """What users may lay over a task; a field left out: anything."""

    methods: Annotated[list[str], Field(min_length=1)] | None = Field(None, description="names of `GET /v1/methods`")
    max_virtual_tokens: int | None = Field(None, ge=0, lt=2**31)
    max_parameters: int | None = Field(None, ge=0, le=2**53)
    max_bytes: int | None = Field(None, ge=0, le=2**53, description="of all files")


class TaskBody(Body):
    """`PUT /v1/tasks/{task}`: settings to change. A field left out keeps its value, null resets it."""

    model_config = example(
        description="Is a review good or bad?",
        template="Review: {{ input }}\nSentiment:",
        defaults={"max_tokens": 4, "temperature": 0},
        customization={"methods": ["lora", "prompt_tuning"], "max_virtual_tokens": 32},
    )

    description: str | None = Field(None, max_length=MAX_DESCRIPTION)
    template: str | None = Field(None, max_length=MAX_SOURCE, description="Jinja over `input` and `inputs`")
    defaults: TaskDefaults | None = Field(None, description="sampling fields for requests that leave them out")
    labels: dict[str, Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        None, max_length=MAX_LABELS, description="name to the text that is scored; each has its own"
    )
    public: bool | None = Field(None, description="every tenant may use it; the scope `admin` is needed to change this")
    pinned: bool | None = Field(None, description="the active version's adapter stays loaded")
    customization: CustomizationBody | None = Field(None, description="what users may lay over it; null: anything")

    @field_validator("labels")
    @classmethod
    def _are_distinct(cls, labels: dict[str, str] | None) -> dict[str, str] | None:
        """Of two labels of one text only chance can prefer one."""
        names: dict[str, str] = {}
        for name, text in (labels or {}).items():
            if text in names:
                raise PydanticCustomError(
                    "labels", f"'{names[text]}' and '{name}' have the same text; give each its own"
                )
            names[text] = name
        return labels


class CanaryBody(Body):
    """A version that has a share of the requests."""

    version: int = Field(ge=1)
    percent: float = Field(ge=0, le=100)


class TaskPatch(Body):
    """`PATCH /v1/tasks/{task}`: which version serves. Either `active_version` or `canary`; a null canary ends it."""

    model_config = example(canary={"version": 2, "percent": 5})

    active_version: int | None = Field(None, ge=1)
    canary: CanaryBody | None = None

    @model_validator(mode="after")
    def _one_change(self) -> TaskPatch:
        if (self.active_version is not None) == ("canary" in self.model_fields_set):
            raise PydanticCustomError("change", "give either active_version or canary, one change at a time")
        return self

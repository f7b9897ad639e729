"""The body of `POST /v1/tasks/{task}/classify`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.body import Body, Priority, User, example


class ClassifyBody(Body):
    """An input for a task, as of `generate`."""

    model_config = example(input="The food was cold.")

    input: str | None = Field(None, description="the prompt itself where the task has no template")
    inputs: dict[str, Any] | None = Field(None, description="named values for the task's template")
    prompt_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    user: User | None = None
    priority: Priority | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> ClassifyBody:
        has_text = self.input is not None or self.inputs is not None
        if has_text == (self.prompt_token_ids is not None):
            raise PydanticCustomError("prompt", "give either input (and/or inputs) or prompt_token_ids")
        return self

"""The bodies of `POST /v1/tasks/{task}/generate` and `POST /v1/generate`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.body import Body, Priority, User, example, harmless
from server.api.schemas.sampling import SamplingFields


class GenerateBody(SamplingFields):
    """An input for a task: `input` and/or `inputs` for its template, or the prompt's token ids."""

    model_config = example(input="The food was cold.", max_tokens=4, temperature=0)

    input: str | None = Field(None, description="the prompt itself where the task has no template")
    inputs: dict[str, Any] | None = Field(None, description="named values for the task's template")
    prompt_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    user: User | None = None
    priority: Priority | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateBody:
        has_text = self.input is not None or self.inputs is not None
        if has_text == (self.prompt_token_ids is not None):
            raise PydanticCustomError("prompt", "give either input (and/or inputs) or prompt_token_ids")
        return self


class BatchItem(GenerateBody):
    """One request of a batch."""

    model_config = example(task="sentiment", input="The food was cold.", max_tokens=4)

    task: str = Field(description="a task or task@N")
    stream: Annotated[bool | None, harmless(False)] = None


class BatchBody(Body):
    """Requests for any tasks; each has its own result or error."""

    model_config = example(
        requests=[{"task": "sentiment", "input": "The food was cold."}, {"task": "translate@2", "input": "Good day"}]
    )

    requests: Annotated[
        list[Any],  # each is checked as a `BatchItem`, so that a wrong one fails alone
        Field(min_length=1),
        WithJsonSchema({"type": "array", "minItems": 1, "items": BatchItem.model_json_schema()}),
    ]

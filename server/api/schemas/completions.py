"""The body of `POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.api.schemas.body import Priority, StreamOptions, User, example, harmless
from server.api.schemas.sampling import MAX_LOGPROBS, SamplingFields

_ONE_PROMPT = [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]


def is_token_ids(value: Any) -> bool:
    """Whether it is a list of integers; the empty list is."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _prompts(value: Any) -> list[str | list[int]]:
    """Every form of `prompt` as a list of prompts."""
    if isinstance(value, str) or (is_token_ids(value) and value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, str) or is_token_ids(item) for item in value):
        return value
    raise PydanticCustomError("prompt", "a string, a list of token ids, or a non-empty list of either is wanted")


Prompts = Annotated[
    list[Any],
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [*_ONE_PROMPT, {"type": "array", "items": {"anyOf": _ONE_PROMPT}}]}),
]


class CompletionBody(SamplingFields):
    """OpenAI's fields, and extensions named as vLLM names them."""

    model_config = example(model="sentiment", prompt="The food was cold.", max_tokens=4, temperature=0, stop="\n")

    model: str = Field(description="the base's id, a task, or task@N")
    prompt: Prompts
    n: int | None = Field(None, ge=1, description="choices of each prompt")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives shown beside each token")
    echo: bool | None = Field(None, description="return the prompt before the answer")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = None
    priority: Priority | None = None
    return_token_ids: bool | None = None
    best_of: Annotated[int | None, harmless(1)] = None
    suffix: Annotated[str | None, harmless("")] = None
    service_tier: Annotated[str | None, harmless("auto", "default")] = None
    store: Annotated[bool | None, harmless(False)] = None
    metadata: Annotated[dict[str, str] | None, harmless({})] = None

"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.body import Body, Priority, StreamOptions, User, example, harmless
from server.api.schemas.sampling import MAX_LOGPROBS, SamplingFields

MAX_MESSAGES = 4096


def _text_of(content: Any) -> Any:
    """A message's text; a list of text parts is one text."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list) or not all(_is_text_part(part) for part in content):
        raise PydanticCustomError("unsupported", "a string or a list of text parts is wanted; only text is supported")
    return "".join(part["text"] for part in content)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        BeforeValidator(_text_of),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
    ]
    name: str | None = None
    refusal: Annotated[str | None, harmless()] = None
    tool_calls: Annotated[list[Any] | None, harmless([])] = None
    audio: Annotated[Any, harmless()] = None
    function_call: Annotated[Any, harmless()] = None
    annotations: Annotated[list[Any] | None, harmless([])] = None


class ChatBody(SamplingFields):
    """OpenAI's fields, and extensions named as vLLM names them."""

    model_config = example(
        model="sentiment", messages=[{"role": "user", "content": "The food was cold."}], max_tokens=4
    )

    model: str = Field(description="the base's id, a task, or task@N")
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31, description="OpenAI's newer name of max_tokens")
    n: int | None = Field(None, ge=1, description="choices")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = None
    priority: Priority | None = None
    return_token_ids: bool | None = None
    tools: Annotated[list[Any] | None, harmless([])] = None
    tool_choice: Annotated[Any, harmless("none", "auto")] = None
    parallel_tool_calls: bool | None = None  # without tools it says nothing
    functions: Annotated[list[Any] | None, harmless([])] = None
    function_call: Annotated[Any, harmless("none", "auto")] = None
    response_format: Annotated[Any, harmless({"type": "text"})] = None
    modalities: Annotated[list[str] | None, harmless(["text"])] = None
    audio: Annotated[Any, harmless()] = None
    prediction: Annotated[Any, harmless()] = None
    web_search_options: Annotated[Any, harmless()] = None
    reasoning_effort: Annotated[str | None, harmless("none")] = None
    verbosity: Annotated[str | None, harmless("medium")] = None
    safety_identifier: str | None = None  # this and the next are notes to the provider
    prompt_cache_key: str | None = None
    service_tier: Annotated[str | None, harmless("auto", "default")] = None
    store: Annotated[bool | None, harmless(False)] = None
    metadata: Annotated[dict[str, str] | None, harmless({})] = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens differ; send one")
        return self

    def given(self) -> dict[str, Any]:
        """The sampling fields; the newer name of `max_tokens` counts."""
        fields = super().given()
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        return fields

"""The sampling fields: of requests, and of a task's `defaults`.

A field left out of a request comes from the task's defaults, else it is OpenAI's default (`server.api.sampling` puts
them together and checks what depends on the base).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.api.schemas.body import Body

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_TOKEN_IDS = 1024  # of logit_bias and stop_token_ids


def _stop_strings(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return None
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        raise PydanticCustomError("stop", "a non-empty string or a list of them is wanted")
    if len(strings) > MAX_STOP_STRINGS or any(len(string) > MAX_STOP_LENGTH for string in strings):
        limits = {"count": MAX_STOP_STRINGS, "length": MAX_STOP_LENGTH}
        raise PydanticCustomError("stop", "at most {count} strings of at most {length} characters are possible", limits)
    return strings


def _token_keys(value: Any) -> Any:
    """JSON's keys are strings: `{"42": 1.5}`."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(str(key).isdecimal() for key in value):
        raise PydanticCustomError("logit_bias", "an object from token ids to numbers is wanted")
    return {int(key): bias for key, bias in value.items()}


StopStrings = Annotated[
    list[str] | None,
    BeforeValidator(_stop_strings),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]
LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]] | None,
    BeforeValidator(_token_keys),
    Field(max_length=MAX_TOKEN_IDS),
]


class SamplingFields(Body):
    """How the next token is chosen, and when generation ends."""

    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="most tokens of the answer")
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="over prompt and answer")
    logit_bias: LogitBias = Field(None, description="token id → added to its logit")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopStrings = Field(None, description="text that ends the answer; not returned")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=MAX_TOKEN_IDS)
    min_tokens: int | None = Field(None, ge=0, lt=2**31, description="no end and no stop before that many tokens")
    ignore_eos: bool | None = Field(None, description="the end-of-sequence token does not stop")

    def given(self) -> dict[str, Any]:
        """The sampling fields that are there, by name."""
        names = SamplingFields.model_fields
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class TaskDefaults(SamplingFields):
    """A task's `defaults`: used where a request leaves a field out."""

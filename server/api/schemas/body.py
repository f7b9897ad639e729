"""What all bodies share: strictness, and OpenAI's fields that are taken only at a value that changes nothing."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """A JSON body. A field given as null is a field left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def example(**fields: Any) -> ConfigDict:
    """What the OpenAPI document shows for a body; pydantic adds it to the configuration above."""
    return ConfigDict(json_schema_extra={"example": fields})


def harmless(*values: Any) -> AfterValidator:
    """Accept null and these values; any other asks for a feature that the server does not have."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise PydanticCustomError("unsupported", "not supported by this server; leave the field out")
        return value

    return AfterValidator(check)


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, harmless(False)] = None


User = Annotated[str, Field(min_length=1, max_length=128)]

"""What all bodies share: strictness, and OpenAI's fields that are taken only at a value that changes nothing."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from adapters_store import ID_PATTERN

_SURROGATE = re.compile("[\ud800-\udfff]")


class Body(BaseModel):
    """A JSON body. A field given as null is a field left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        """JSON can spell one half of a surrogate pair, which no tokenizer and no encoding takes."""
        if _has_surrogate(value):
            raise PydanticCustomError("unicode", "one half of a surrogate pair is no text; send whole characters")
        return value


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


User = Annotated[str, Field(pattern=f"^{ID_PATTERN}$", description="whose customization of the task is applied")]
Priority = Annotated[int, Field(ge=0, le=9, description="lower starts earlier; left out: 0")]


def _has_surrogate(value: Any) -> bool:
    rest = [value]  # a list, not recursion: JSON may be nested as deeply as Python can read it
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            if not item.isascii() and _SURROGATE.search(item):
                return True
        elif isinstance(item, list):
            rest += item
        elif isinstance(item, dict):
            rest += item
            rest += item.values()
    return False

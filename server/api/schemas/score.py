"""The body of `POST /v1/tasks/{task}/score`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.body import Body, Priority, User, example


class ScoreBody(Body):
    """An input for a task, as of `generate`, and the texts that may follow it."""

    model_config = example(input="The food was cold.", choices=[" positive", " negative"])

    input: str | None = Field(None, description="the prompt itself where the task has no template")
    inputs: dict[str, Any] | None = Field(None, description="named values for the task's template")
    prompt_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    choices: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="texts, each tokenized by itself and put behind the input as it is: where words begin with a space "
        "in the tokenizer's vocabulary, give them one; left out: the task's labels",
    )
    normalize: Literal["tokens", "none"] = Field(
        "tokens", description="what `best` compares: the mean of a choice's token log-probabilities, or their sum"
    )
    user: User | None = None
    priority: Priority | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> ScoreBody:
        has_text = self.input is not None or self.inputs is not None
        if has_text == (self.prompt_token_ids is not None):
            raise PydanticCustomError("prompt", "give either input (and/or inputs) or prompt_token_ids")
        return self

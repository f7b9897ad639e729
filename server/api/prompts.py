"""Prompts: what a caller sent, as the token ids that the engine gets, and the room that the model has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.api.resolve import Target
from server.api.sampling import check_token_ids
from server.api.schemas.chat import Message
from server.api.services import ServedBase
from server.api.templates import PromptTemplate
from server.engine.protocol import BaseFacts
from server.errors import RequestError


@dataclass(frozen=True)
class Prompt:
    """One prompt. `text` is None where token ids came."""

    token_ids: list[int]
    text: str | None = None


async def text_prompt(base: ServedBase, text: str, *, param: str, special_tokens: bool = True) -> Prompt:
    """A string, with the tokenizer's own special tokens around it unless it brings its own."""
    tokenizer = base.require_tokenizer(param)
    return Prompt(await tokenizer.encode(text, special_tokens=special_tokens), text)


def token_prompt(base: ServedBase, token_ids: list[int], *, param: str) -> Prompt:
    """Token ids, taken as they are."""
    check_token_ids(token_ids, base.facts, param)
    return Prompt(token_ids)


async def input_prompt(base: ServedBase, target: Target, text: str | None, inputs: dict[str, Any] | None) -> Prompt:
    """An input through the task's template; without a template, the input itself."""
    source = target.settings.template
    if source is not None:
        given = {"input": text, "inputs": inputs}
        variables = {name: value for name, value in given.items() if value is not None}
        return await text_prompt(base, PromptTemplate(source, param="input").render(variables), param="input")
    if inputs is not None:
        message = "inputs: there is no template to put them into; give the task one, or send input"
        raise RequestError("invalid_request", message, "inputs")
    assert text is not None, "the schema wants an input, inputs or token ids"
    return await text_prompt(base, text, param="input")


async def chat_prompt(base: ServedBase, target: Target, messages: Sequence[Message]) -> Prompt:
    """A conversation through the task's own template, else the base's chat template."""
    conversation = [message.model_dump(include={"role", "content", "name"}, exclude_none=True) for message in messages]
    source = target.settings.template
    if source is not None:
        spoken = [message.content for message in messages if message.role == "user"]
        variables = {"messages": conversation, "inputs": {}, **({"input": spoken[-1]} if spoken else {})}
        text = PromptTemplate(source, param="messages").render(variables)
        return await text_prompt(base, text, param="messages")
    if base.chat_template is None:
        message = "messages: neither base nor task has a chat template; use /v1/completions or give the task a template"
        raise RequestError("no_chat_template", message, "messages")
    text = base.chat_template.render(
        {"messages": conversation, "add_generation_prompt": True, **base.facts.special_tokens}
    )
    return await text_prompt(base, text, param="messages", special_tokens=False)


def room_for(prompt: Prompt, target: Target, facts: BaseFacts, max_tokens: int | None, *, param: str) -> int:
    """The request's `max_tokens`; without one, whatever the model's length and the KV cache leave.

    Raises `RequestError` (`context_length_exceeded`) when virtual tokens, prompt and answer are too long together.
    """
    used = target.virtual_tokens + len(prompt.token_ids)
    parts = f"{target.virtual_tokens} virtual tokens + {len(prompt.token_ids)} prompt tokens"
    if max_tokens is None:
        left = min(facts.max_model_len, (facts.kv_pages - 1) * facts.page_size) - used
        if left > 0:
            return left
        message = f"{param}: {parts} leave no room in the model's length of {facts.max_model_len}"
        raise RequestError("context_length_exceeded", message, param)
    if used + max_tokens > facts.max_model_len:
        message = f"{parts} + {max_tokens} new ones are more than the model's length of {facts.max_model_len}"
        raise RequestError("context_length_exceeded", message, "max_tokens" if used < facts.max_model_len else param)
    return max_tokens

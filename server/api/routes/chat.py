"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import answer
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.choice import Delta
from server.api.generation import Generation, arrival
from server.api.limits import check_counts
from server.api.prompts import chat_prompt
from server.api.resolve import resolve
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.sampling import plan_sampling
from server.api.schemas.chat import ChatBody
from server.api.scores import chat_logprobs

router = APIRouter(tags=["chat"], route_class=GuardedRoute)


@router.post(
    "/v1/chat/completions", summary="Answer a conversation", responses=examples.answers(examples.CHAT, stream=True)
)
@needs("invoke")
async def chat(body: ChatBody, request: Request, services: TheServices, caller: TheCaller) -> Response:
    """OpenAI's chat, through the task's own template, else the base's chat template. Without `max_tokens` an answer
    may take all that the model's length leaves."""
    with arrival(services.metrics) as arrived:
        base = services.require_base()
        n = body.n or 1
        check_counts(services.settings, n=n)
        target = await resolve(services, base, caller, body.model, param="model", user=body.user)
        arrived.label = target.label
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        plan = plan_sampling(body.given(), target.settings.defaults, base.facts, max_tokens=None, logprobs=logprobs)
        prompt = await chat_prompt(base, target, body.messages)
        generation = Generation(
            services,
            base,
            caller,
            target,
            [prompt],
            plan,
            n=n,
            param="messages",
            user=body.user,
            priority=body.priority,
            arrived=arrived,
        )
    return await answer(request, generation, ChatWriter(generation, body), stream=body.stream)


class ChatWriter:
    """A generation as OpenAI writes chat completions."""

    def __init__(self, generation: Generation, body: ChatBody) -> None:
        self._generation = generation
        self._body = body
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage

    @property
    def medley(self) -> dict[str, Any]:
        """What was really applied."""
        return self._generation.target.medley

    def whole(self, choices: list[Delta]) -> dict[str, Any]:
        """The document."""
        written = []
        for index, delta in enumerate(choices):
            message = {"role": "assistant", "content": delta.text, "refusal": None}
            written.append(self._choice(index, delta, {"message": message}, first=True))
        return self._document("chat.completion", written, self._generation.usage())

    def chunk(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any] | None:
        """An event; None while a step's text is held back and nothing else was asked for."""
        if not (delta.text or delta.finish_reason or self._body.logprobs or self._body.return_token_ids):
            return None
        said = {"role": "assistant", "content": delta.text} if first else {"content": delta.text}
        choice = self._choice(index, delta, {"delta": said}, first=first)
        document = self._document("chat.completion.chunk", [choice], None)
        if not self._include_usage:
            del document["usage"]
        return document

    def closing(self) -> dict[str, Any] | None:
        """The usage, if it was asked for."""
        if not self._include_usage:
            return None
        return self._document("chat.completion.chunk", [], self._generation.usage())

    def _document(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._generation.id}",
            "object": kind,
            "created": self._generation.created,
            "model": self._body.model,
            "choices": choices,
            "usage": usage,
        }

    def _choice(self, index: int, delta: Delta, said: dict[str, Any], *, first: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, **said, "logprobs": None, "finish_reason": delta.finish_reason}
        if self._body.logprobs:
            choice["logprobs"] = chat_logprobs(delta.scored, self._generation.tokenizer)
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = self._generation.prompt_of(index).token_ids
        return choice

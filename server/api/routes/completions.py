"""`POST /v1/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import answer
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.choice import Delta
from server.api.generation import Generation, arrival
from server.api.limits import check_counts
from server.api.prompts import Prompt, text_prompt, token_prompt
from server.api.resolve import resolve
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.sampling import plan_sampling
from server.api.schemas.completions import CompletionBody
from server.api.scores import completion_logprobs, score_prompt
from server.api.services import ServedBase

router = APIRouter(tags=["completions"], route_class=GuardedRoute)


@router.post(
    "/v1/completions", summary="Complete a prompt", responses=examples.answers(examples.COMPLETION, stream=True)
)
@needs("invoke")
async def complete(body: CompletionBody, request: Request, services: TheServices, caller: TheCaller) -> Response:
    """OpenAI's completions, for the base and every task. A task's template is not applied: the prompt is the text."""
    with arrival(services.metrics) as arrived:
        base = services.require_base()
        n = body.n or 1
        check_counts(services.settings, prompts=len(body.prompt), n=n)
        target = await resolve(services, base, caller, body.model, param="model", user=body.user)
        arrived.label = target.label
        plan = plan_sampling(
            body.given(),
            target.settings.defaults,
            base.facts,
            logprobs=body.logprobs,
            prompt_logprobs_from=0 if body.echo and body.logprobs is not None else None,
        )
        prompts = [await _prompt(base, prompt) for prompt in body.prompt]
        generation = Generation(
            services,
            base,
            caller,
            target,
            prompts,
            plan,
            n=n,
            param="prompt",
            user=body.user,
            priority=body.priority,
            arrived=arrived,
        )
    return await answer(request, generation, CompletionWriter(generation, body), stream=body.stream)


async def _prompt(base: ServedBase, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        return await text_prompt(base, prompt, param="prompt")
    return token_prompt(base, prompt, param="prompt")


class CompletionWriter:
    """A generation as OpenAI writes completions."""

    def __init__(self, generation: Generation, body: CompletionBody) -> None:
        self._generation = generation
        self._body = body
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage
        self._echoes = [_echo_of(prompt, generation) for prompt in generation.prompts] if body.echo else []

    @property
    def medley(self) -> dict[str, Any]:
        """What was really applied."""
        return self._generation.target.medley

    def whole(self, choices: list[Delta]) -> dict[str, Any]:
        """The document."""
        written = [self._choice(index, delta, first=True) for index, delta in enumerate(choices)]
        return self._document(written, self._generation.usage())

    def chunk(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any] | None:
        """An event; None while a step's text is held back and nothing else was asked for."""
        body = self._body
        asked = body.logprobs is not None or body.return_token_ids or (first and body.echo)
        if not (delta.text or delta.finish_reason or asked):
            return None
        document = self._document([self._choice(index, delta, first=first)], None)
        if not self._include_usage:
            del document["usage"]
        return document

    def closing(self) -> dict[str, Any] | None:
        """The usage, if it was asked for."""
        return self._document([], self._generation.usage()) if self._include_usage else None

    def _document(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self._generation.id}",
            "object": "text_completion",
            "created": self._generation.created,
            "model": self._body.model,
            "choices": choices,
            "usage": usage,
        }

    def _choice(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        generation, body = self._generation, self._body
        prompt = generation.prompt_of(index)
        echo = self._echoes[index // generation.n] if body.echo else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + delta.text if first else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }
        if body.logprobs is not None:
            choice["logprobs"] = completion_logprobs(delta.scored, generation.tokenizer, len(echo))
            if delta.prompt_scores is not None:
                scored = score_prompt(prompt.token_ids, delta.prompt_scores, generation.tokenizer)
                before = completion_logprobs(scored, generation.tokenizer, 0)
                choice["logprobs"] = {name: before[name] + values for name, values in choice["logprobs"].items()}
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = prompt.token_ids
        return choice


def _echo_of(prompt: Prompt, generation: Generation) -> str:
    """The prompt as text."""
    if prompt.text is not None:
        return prompt.text
    return "" if generation.tokenizer is None else generation.tokenizer.decode(prompt.token_ids)

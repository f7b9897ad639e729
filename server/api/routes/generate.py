"""`POST /v1/tasks/{task}/generate` and `POST /v1/generate`: a task's answer to an input."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from adapters_store import StoreError
from server.api.answers import answer, json_response
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.caller import Caller
from server.api.choice import Delta
from server.api.disconnect import while_connected
from server.api.errors import body_of, request_error_of, validation_fault
from server.api.generation import Generation, arrival
from server.api.limits import check_counts
from server.api.prompts import Prompt, input_prompt, token_prompt
from server.api.resolve import Target, resolve
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.sampling import plan_sampling
from server.api.schemas.generate import BatchBody, BatchItem, GenerateBody
from server.api.services import ServedBase, Services
from server.errors import RequestError

router = APIRouter(tags=["generate"], route_class=GuardedRoute)


@router.post(
    "/v1/tasks/{task}/generate",
    summary="Let a task answer an input",
    responses=examples.answers(examples.GENERATED, stream=True),
)
@needs("invoke")
async def generate(
    task: str, body: GenerateBody, request: Request, services: TheServices, caller: TheCaller
) -> Response:
    """`task` may be `task@N`, or the base's id. A stream is events of `text`, then one with the `finish_reason`."""
    generation = await _start(services, caller, task, body)
    return await answer(request, generation, GenerateWriter(generation, body), stream=body.stream)


@router.post(
    "/v1/generate",
    summary="Let many tasks answer many inputs",
    responses=examples.answers({"results": [examples.GENERATED, examples.ERROR]}),
)
@needs("invoke")
async def generate_batch(body: BatchBody, request: Request, services: TheServices, caller: TheCaller) -> Response:
    """Results in the order of the requests; one that fails carries its own `error`."""
    services.require_base()
    check_counts(services.settings, prompts=len(body.requests), param="requests")
    items = [_result(services, caller, item) for item in body.requests]
    results = await while_connected(request.receive, _all(items))
    return json_response({"results": results})


async def _start(services: Services, caller: Caller, name: str, body: GenerateBody) -> Generation:
    with arrival(services.metrics) as arrived:
        base = services.require_base()
        target = await resolve(services, base, caller, name, param="task", user=body.user)
        arrived.label = target.label
        plan = plan_sampling(body.given(), target.settings.defaults, base.facts)
        prompt = await _prompt(base, target, body)
        param = "input" if body.prompt_token_ids is None else "prompt_token_ids"
        return Generation(
            services,
            base,
            caller,
            target,
            [prompt],
            plan,
            n=1,
            param=param,
            user=body.user,
            priority=body.priority,
            arrived=arrived,
        )


async def _prompt(base: ServedBase, target: Target, body: GenerateBody) -> Prompt:
    if body.prompt_token_ids is not None:
        return token_prompt(base, body.prompt_token_ids, param="prompt_token_ids")
    return await input_prompt(base, target, body.input, body.inputs)


async def _all(items: list[Coroutine[Any, Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    return list(await asyncio.gather(*items))


async def _result(services: Services, caller: Caller, item: Any) -> dict[str, Any]:
    """One item's result, or its error."""
    try:
        body = BatchItem.model_validate(item)
        generation = await _start(services, caller, body.task, body)
        writer = GenerateWriter(generation, body)
        return {**writer.whole(await generation.collect()), "medley": writer.medley}
    except ValidationError as error:
        return body_of(validation_fault(error.errors()[0]))
    except RequestError as error:
        return body_of(error)
    except StoreError as error:
        return body_of(request_error_of(error))


class GenerateWriter:
    """A generation in Medley's own form."""

    def __init__(self, generation: Generation, body: GenerateBody) -> None:
        self._generation = generation
        self._body = body
        self._finish_reason: str | None = None

    @property
    def medley(self) -> dict[str, Any]:
        """What was really applied."""
        return self._generation.target.medley

    def whole(self, choices: list[Delta]) -> dict[str, Any]:
        """The document."""
        [delta] = choices
        medley = self.medley
        document = {
            "task": medley["task"],
            "version": medley["version"],
            "output": delta.text,
            "finish_reason": delta.finish_reason,
            "usage": self._generation.usage(),
        }
        if self._body.return_token_ids:
            document["token_ids"] = delta.token_ids
            document["prompt_token_ids"] = self._generation.prompts[0].token_ids
        return document

    def chunk(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any] | None:
        """An event with text; None while a step's text is held back."""
        self._finish_reason = delta.finish_reason
        with_ids = self._body.return_token_ids and delta.token_ids
        if not delta.text and not with_ids:
            return None
        return {"text": delta.text, "token_ids": delta.token_ids} if with_ids else {"text": delta.text}

    def closing(self) -> dict[str, Any] | None:
        """The last event."""
        return {"finish_reason": self._finish_reason, "usage": self._generation.usage()}

"""`POST /v1/tasks/{task}/classify`: the labels of an input, or its number, by the task's classification head.

Probabilities are a softmax over the head's outputs where one label is right, and each output's sigmoid where several
may be; a head with one output is a regression, whose output is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import json_response
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.disconnect import while_connected
from server.api.generation import Generation, arrival
from server.api.prompts import Prompt, input_prompt, token_prompt
from server.api.resolve import Target, resolve
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.sampling import plan_sampling
from server.api.schemas.classify import ClassifyBody
from server.api.services import ServedBase
from server.engine.protocol import Classification

router = APIRouter(tags=["generate"], route_class=GuardedRoute)

_EXAMPLE = {
    "task": "sentiment",
    "version": 1,
    "labels": [{"label": "negative", "probability": 0.93}, {"label": "positive", "probability": 0.07}],
    "best": "negative",
    "usage": {**examples.USAGE, "completion_tokens": 0, "total_tokens": 9},
    "medley": examples.MEDLEY,
}


@router.post("/v1/tasks/{task}/classify", summary="Classify an input", responses=examples.answers(_EXAMPLE))
@needs("invoke")
async def classify(
    task: str, body: ClassifyBody, request: Request, services: TheServices, caller: TheCaller
) -> Response:
    """`task` may be `task@N`. All labels, best first; of a regression `value` in place of `labels` and `best`."""
    with arrival(services.metrics) as arrived:
        base = services.require_base()
        target = await resolve(services, base, caller, task, param="task", user=body.user)
        arrived.label = target.label
        generation = Generation(
            services,
            base,
            caller,
            target,
            [await _prompt(base, target, body)],
            plan_sampling({}, {}, base.facts, max_tokens=0),
            n=1,
            param="input" if body.prompt_token_ids is None else "prompt_token_ids",
            user=body.user,
            priority=body.priority,
            arrived=arrived,
            classify=True,
        )
    [delta] = await while_connected(request.receive, generation.collect())
    assert delta.classification is not None, "it was asked for"
    medley = target.medley
    return json_response(
        {
            "task": medley["task"],
            "version": medley["version"],
            **_answer(delta.classification, list(target.settings.labels)),
            "usage": generation.usage(),
            "medley": medley,
        }
    )


async def _prompt(base: ServedBase, target: Target, body: ClassifyBody) -> Prompt:
    if body.prompt_token_ids is not None:
        return token_prompt(base, body.prompt_token_ids, param="prompt_token_ids")
    return await input_prompt(base, target, body.input, body.inputs)


def _answer(said: Classification, names: list[str]) -> dict[str, Any]:
    """`names` are the task's own for the labels: used where there are as many."""
    if said.kind == "regression":
        return {"value": said.logits[0]}
    labels = names if len(names) == len(said.logits) else said.labels
    probabilities = _softmax(said.logits) if said.kind == "single" else [_sigmoid(logit) for logit in said.logits]
    ranked = sorted(zip(labels, probabilities, strict=True), key=lambda pair: -pair[1])
    return {
        "labels": [{"label": label, "probability": probability} for label, probability in ranked],
        "best": ranked[0][0],
    }


def _softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _sigmoid(logit: float) -> float:
    small = math.exp(-abs(logit))  # never overflows
    return 1 / (1 + small) if logit >= 0 else small / (1 + small)

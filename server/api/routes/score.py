"""`POST /v1/tasks/{task}/score`: which of several texts follows an input, by their log-probabilities.

Rank classification: T-Few (Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", NeurIPS 2022) divides a choice's log-probability by its tokens, as `normalize` does by default.
Each choice is a sequence of its own, the input's tokens and then the choice's; the engine runs the input once for all.
Behind an empty input a soft prompt's last virtual token predicts the choices' first tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import json_response
from server.api.auth import GuardedRoute, TheCaller, needs
from server.api.choice import Delta
from server.api.disconnect import while_connected
from server.api.generation import Generation, arrival
from server.api.prompts import Prompt, input_prompt, token_prompt
from server.api.resolve import Target, resolve
from server.api.routes import examples
from server.api.routes.dependencies import TheServices
from server.api.sampling import plan_sampling
from server.api.schemas.score import ScoreBody
from server.api.services import ServedBase
from server.errors import RequestError
from server.settings import Settings

router = APIRouter(tags=["generate"], route_class=GuardedRoute)

_NEVER = -9999.0  # of a token that cannot follow: JSON has no infinity
_EXAMPLE = {
    "choices": [
        {"text": " positive", "logprob": -3.2, "tokens": 2},
        {"text": " negative", "logprob": -0.1, "tokens": 2},
    ],
    "best": 1,
    "usage": {**examples.USAGE, "completion_tokens": 0, "total_tokens": 9},
    "medley": examples.MEDLEY,
}


@dataclass(frozen=True)
class _Choice:
    """A text that may follow the input."""

    text: str
    token_ids: list[int]
    label: str | None  # its name among the task's labels


@router.post("/v1/tasks/{task}/score", summary="Score the choices for an input", responses=examples.answers(_EXAMPLE))
@needs("invoke")
async def score(task: str, body: ScoreBody, request: Request, services: TheServices, caller: TheCaller) -> Response:
    """`task` may be `task@N`, or the base's id. `logprob` is the sum over a choice's tokens, given the input."""
    with arrival(services.metrics) as arrived:
        base = services.require_base()
        target = await resolve(services, base, caller, task, param="task", user=body.user)
        arrived.label = target.label
        choices = await _choices(base, target, body, services.settings)
        prompt = await _input(base, target, body)
        param = "input" if body.prompt_token_ids is None else "prompt_token_ids"
        if not prompt.token_ids and not target.virtual_tokens:
            raise _no_input(param)
        plan = plan_sampling({}, {}, base.facts, max_tokens=0, prompt_logprobs_from=len(prompt.token_ids))
        generation = Generation(
            services,
            base,
            caller,
            target,
            [Prompt(prompt.token_ids + choice.token_ids) for choice in choices],
            plan,
            n=1,
            param=param,
            user=body.user,
            priority=body.priority,
            arrived=arrived,
            shared_tokens=len(prompt.token_ids),
        )
    scored = await while_connected(request.receive, generation.collect())
    if any(None in (delta.prompt_scores or ()) for delta in scored):
        raise _no_input(param)  # its virtual tokens are a prefix's
    first: dict[tuple[int, ...], float] = {}  # of equal choices, whose rows may differ in the last digit
    logprobs = [
        first.setdefault(tuple(choice.token_ids), _logprob(delta))
        for choice, delta in zip(choices, scored, strict=True)
    ]
    lengths = [len(choice.token_ids) if body.normalize == "tokens" else 1 for choice in choices]
    ranked = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
    return json_response(
        {
            "choices": [_choice_json(choice, logprob) for choice, logprob in zip(choices, logprobs, strict=True)],
            "best": ranked.index(max(ranked)),
            "usage": _usage(generation),
            "medley": target.medley,
        }
    )


async def _choices(base: ServedBase, target: Target, body: ScoreBody, settings: Settings) -> list[_Choice]:
    """The body's choices, else the task's labels, as tokens. Raises `RequestError` for none and for too many."""
    labels: dict[str, str] = target.settings.labels if body.choices is None else {}
    texts = list(labels.values()) if body.choices is None else body.choices
    if not texts:
        raise RequestError(
            "invalid_request", "choices: the task has no labels; give it some, or send choices", "choices"
        )
    limit = min(settings.max_score_choices, settings.max_queue)
    if len(texts) > limit:
        message = f"choices: {len(texts)} are more than the {limit} that one HTTP request may have"
        raise RequestError("invalid_request", message, "choices")
    tokenizer = base.require_tokenizer("choices")
    choices = []
    names: list[str | None] = [*labels] if labels else [None] * len(texts)
    for index, (text, name) in enumerate(zip(texts, names, strict=True)):
        token_ids = await tokenizer.encode(text, special_tokens=False)
        if not token_ids:
            param = f"choices.{index}" if name is None else "choices"
            which = "it" if name is None else f"the task's label '{name}'"
            raise RequestError(
                "invalid_request", f"{param}: {which} has no tokens, so there is nothing to score", param
            )
        choices.append(_Choice(text, token_ids, name))
    return choices


async def _input(base: ServedBase, target: Target, body: ScoreBody) -> Prompt:
    if body.prompt_token_ids is not None:
        return token_prompt(base, body.prompt_token_ids, param="prompt_token_ids")
    return await input_prompt(base, target, body.input, body.inputs)


def _no_input(param: str) -> RequestError:
    message = (
        f"{param}: it has no tokens, and there is no soft prompt whose last virtual token the choices could follow"
    )
    return RequestError("empty_prompt", message, param)


def _logprob(delta: Delta) -> float:
    """The sum over the choice's tokens."""
    assert delta.prompt_scores is not None, "it was asked for"
    return sum(max(score.chosen, _NEVER) for score in delta.prompt_scores if score is not None)


def _choice_json(choice: _Choice, logprob: float) -> dict[str, Any]:
    document = {"text": choice.text, "logprob": logprob, "tokens": len(choice.token_ids)}
    return document if choice.label is None else {"label": choice.label, **document}


def _usage(generation: Generation) -> dict[str, Any]:
    """The input is counted once, and each choice; cached are the positions that not even the first had to run."""
    return {
        **generation.usage(),
        "prompt_tokens_details": {
            "cached_tokens": min(choice.cached_tokens for choice in generation.choices),
            "virtual_tokens": generation.choices[0].virtual_tokens,
        },
    }

"""From a request's sampling fields and its task's defaults to what the engine runs with.

The order: the request's own field, the task's `defaults`, OpenAI's default. Nothing is clamped: what the base cannot
do is refused with the field's name.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from server.engine.protocol import BaseFacts, Sampling
from server.errors import RequestError

DEFAULT_MAX_TOKENS = 16  # of OpenAI's completions


@dataclass(frozen=True)
class SamplingPlan:
    """`Sampling` but for the seed and `max_tokens`, which may differ between the prompts of one request."""

    fields: Mapping[str, Any]  # of `Sampling`
    stop: tuple[str, ...]
    seed: int | None
    max_tokens: int | None  # None: whatever the model's length leaves

    def sampling(self, max_tokens: int) -> Sampling:
        """For one prompt. Without a seed of the caller's, every prompt draws its own."""
        if self.fields.get("min_tokens", 0) > max_tokens:
            message = f"min_tokens: it is greater than max_tokens ({max_tokens})"
            raise RequestError("invalid_request", message, "min_tokens")
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(max_tokens=max_tokens, seed=seed, **self.fields)


def plan_sampling(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    facts: BaseFacts,
    *,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    logprobs: int | None = None,
    prompt_logprobs_from: int | None = None,
) -> SamplingPlan:
    """Put a request's sampling fields (`SamplingFields.given`) over its task's defaults.

    `max_tokens` is used where neither names one. Raises `RequestError` for token ids that the base does not have, and
    for stop strings where it has no tokenizer.
    """
    chosen = {**defaults, **given}
    stop = tuple(chosen.pop("stop", ()))
    if stop and facts.tokenizer is None:
        raise RequestError("no_tokenizer", "stop: the base has no tokenizer, so there is no text to stop at", "stop")
    seed = chosen.pop("seed", None)
    limit = chosen.pop("max_tokens", max_tokens)
    if "logit_bias" in chosen:  # a task's defaults come from JSON, whose keys are strings
        chosen["logit_bias"] = {int(token): bias for token, bias in chosen["logit_bias"].items()}
        check_token_ids(chosen["logit_bias"], facts, "logit_bias")
    if "stop_token_ids" in chosen:
        chosen["stop_token_ids"] = tuple(chosen["stop_token_ids"])
        check_token_ids(chosen["stop_token_ids"], facts, "stop_token_ids")
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0
    fields = {**chosen, "logprobs": logprobs, "prompt_logprobs_from": prompt_logprobs_from}
    return SamplingPlan(fields=fields, stop=stop, seed=seed, max_tokens=limit)


def check_token_ids(token_ids: Iterable[int], facts: BaseFacts, param: str) -> None:
    """Refuse ids that the base does not have."""
    for token_id in token_ids:
        if not 0 <= token_id < facts.vocab_size:
            message = f"{param}: {token_id} is no token id of this base; they are 0 to {facts.vocab_size - 1}"
            raise RequestError("invalid_request", message, param)

"""One choice of a request: the engine's tokens turned into text, log-probabilities and a finish reason.

`Choice.feed` is called with every `Tokens` of its sequence and says what a stream would send; `Delta`s of one choice,
added up, are the choice without streaming. It knows neither JSON nor the engine's stream: the caller aborts the
sequence when `finish_reason` comes from a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from server.api.stop import StopStrings
from server.api.text import BaseTokenizer
from server.engine.protocol import Classification, TokenLogprobs, Tokens


@dataclass(slots=True)
class ScoredToken:
    """A token with its log-probabilities and where its text begins."""

    token_id: int
    logprobs: TokenLogprobs | None  # None: the prompt's first, which nothing precedes
    offset: int  # characters


@dataclass(slots=True)
class Delta:
    """What one or more steps add to a choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)  # empty unless log-probabilities were asked for
    prompt_scores: list[TokenLogprobs | None] | None = None
    classification: Classification | None = None
    finish_reason: str | None = None

    def add(self, other: Delta) -> Self:
        """Append a later one."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.scored += other.scored
        self.prompt_scores = other.prompt_scores if self.prompt_scores is None else self.prompt_scores
        self.classification = other.classification
        self.finish_reason = other.finish_reason
        return self


class Choice:
    """See the module. The text is empty where the base has no tokenizer."""

    def __init__(
        self, tokenizer: BaseTokenizer | None, prompt: Sequence[int], *, stop: Sequence[str], min_tokens: int
    ) -> None:
        """`stop` strings count in the text of the tokens after the first `min_tokens`."""
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer(prompt)
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens
        self._length = 0  # characters decoded so far, held ones counted
        self.num_tokens = 0
        self.virtual_tokens = 0
        self.cached_tokens = 0

    def feed(self, tokens: Tokens) -> Delta:
        """What the tokens add."""
        self.virtual_tokens, self.cached_tokens = tokens.virtual_tokens, tokens.cached_tokens
        delta = Delta(prompt_scores=tokens.prompt_logprobs, classification=tokens.classification)
        for index, token_id in enumerate(tokens.token_ids):
            self.num_tokens += 1
            delta.token_ids.append(token_id)
            if tokens.logprobs is not None:
                delta.scored.append(ScoredToken(token_id, tokens.logprobs[index], self._length))
            delta.text += self._decode(token_id)
            if self._stop.found:
                delta.finish_reason = "stop"
                return delta
        if tokens.finish_reason is not None:
            delta.text += self._flush()
            delta.finish_reason = "stop" if self._stop.found else tokens.finish_reason
        return delta

    def _decode(self, token_id: int) -> str:
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.feed(token_id)
        self._length += len(text)
        return text if self.num_tokens <= self._min_tokens else self._stop.feed(text)

    def _flush(self) -> str:
        rest = "" if self._detokenizer is None else self._detokenizer.flush()
        return self._stop.feed(rest) + self._stop.flush()

"""Log-probabilities in OpenAI's two forms: of completions and of chat. Natural logarithms.

Without a tokenizer a token is written `token_id:42`. As at OpenAI, -9999 stands for what cannot happen: JSON has no
infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.choice import ScoredToken
from server.api.text import BaseTokenizer
from server.engine.protocol import TokenLogprobs

_NEVER = -9999.0


def completion_logprobs(scored: Sequence[ScoredToken], tokenizer: BaseTokenizer | None, shift: int) -> dict[str, Any]:
    """Four lists of one length; `shift` characters stand before the first offset. The chosen token is always among
    the `top_logprobs`, beside the alternatives that were asked for."""
    return {
        "tokens": [_text(token.token_id, tokenizer) for token in scored],
        "token_logprobs": [None if token.logprobs is None else _finite(token.logprobs.chosen) for token in scored],
        "top_logprobs": [_alternatives(token, tokenizer) for token in scored],
        "text_offset": [shift + token.offset for token in scored],
    }


def chat_logprobs(scored: Sequence[ScoredToken], tokenizer: BaseTokenizer | None) -> dict[str, Any]:
    """One entry per token, alternatives best first."""
    content = []
    for token in scored:
        assert token.logprobs is not None, "only a prompt's first token has none"
        content.append(
            {
                **_entry(token.token_id, token.logprobs.chosen, tokenizer),
                "top_logprobs": [_entry(other, value, tokenizer) for other, value in token.logprobs.top.items()],
            }
        )
    return {"content": content, "refusal": None}


def score_prompt(
    prompt: Sequence[int], scores: Sequence[TokenLogprobs | None], tokenizer: BaseTokenizer | None
) -> list[ScoredToken]:
    """A prompt's tokens for `echo` with `logprobs`; the first has no log-probability."""
    detokenizer = None if tokenizer is None else tokenizer.detokenizer([])
    scored, offset = [], 0
    for token_id, logprobs in zip(prompt, scores, strict=True):
        scored.append(ScoredToken(token_id, logprobs, offset))
        offset += 0 if detokenizer is None else len(detokenizer.feed(token_id))
    return scored


def _alternatives(token: ScoredToken, tokenizer: BaseTokenizer | None) -> dict[str, float] | None:
    if token.logprobs is None:
        return None
    chosen = {_text(token.token_id, tokenizer): _finite(token.logprobs.chosen)}
    others = {_text(other, tokenizer): _finite(value) for other, value in token.logprobs.top.items()}
    return others | chosen


def _entry(token_id: int, logprob: float, tokenizer: BaseTokenizer | None) -> dict[str, Any]:
    content = None if tokenizer is None else list(tokenizer.token_bytes(token_id))
    return {"token": _text(token_id, tokenizer), "logprob": _finite(logprob), "bytes": content}


def _text(token_id: int, tokenizer: BaseTokenizer | None) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _finite(logprob: float) -> float:
    return max(logprob, _NEVER)

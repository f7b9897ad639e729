"""Text to token ids and back, incrementally, by the base's own tokenizer.

What a stream's pieces add up to is, by construction, what the same request gets without streaming: both come from
the one `Detokenizer`. A character whose bytes are spread over several tokens appears once it is whole. Special tokens
stand for no text. This module knows neither requests nor stop strings.
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

from server.api.pieces import Pieces

_CONTEXT_TOKENS = 8  # decoded again before each new one, so that it is spelled as it is inside a text
_LONG_TEXT = 16_384  # characters; tokenizing more than this leaves the event loop to a thread


class Detokenizer(Protocol):
    """The text that follows a prompt, token by token."""

    def feed(self, token_id: int) -> str:
        """The text that has become certain; empty while a character is incomplete."""

    def flush(self) -> str:
        """At the end: what is left of an incomplete character, as replacement characters."""


class BaseTokenizer:
    """The base's tokenizer. Thread-safe: nothing changes after construction."""

    def __init__(self, serialized: str) -> None:
        """`serialized`: the text of `tokenizer.json`."""
        self._tokenizer: Tokenizer = Tokenizer.from_str(serialized)
        self._tokenizer.no_truncation()  # a file may carry its training's settings
        self._tokenizer.no_padding()
        fields = json.loads(serialized)
        self.pieces = Pieces(fields)
        self.special_ids = frozenset(token["id"] for token in fields.get("added_tokens", []) if token["special"])

    async def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; `special_tokens` adds the tokenizer's own around the text, as it was trained with."""
        if len(text) > _LONG_TEXT:
            return await asyncio.to_thread(self._encode, text, special_tokens)
        return self._encode(text, special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence, special tokens left out."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """For the text that follows `prompt`."""
        return _JoinedBytes(self, prompt) if self.pieces.join else _SlidingWindow(self, prompt)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special tokens by their names; a leading space is kept."""
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self.pieces.of(piece)  # a model may have more rows than the vocabulary

    def token_text(self, token_id: int) -> str:
        """The same as text; OpenAI's `bytes:` notation for what is no whole character."""
        content = self.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)


class _JoinedBytes:
    """A text is its tokens' bytes laid end to end: an incremental UTF-8 decoder does the rest."""

    def __init__(self, tokenizer: BaseTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = [token for token in prompt if token not in tokenizer.special_ids]
        self._leading_spaces = 0 if text else tokenizer.pieces.leading_spaces
        for token_id in text[-_CONTEXT_TOKENS:]:  # a prompt of token ids may end inside a character
            self.feed(token_id)

    def feed(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        while self._leading_spaces and text:
            self._leading_spaces = self._leading_spaces - 1 if text[0] == " " else 0
            text = text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _SlidingWindow:
    """Decode the last tokens with and without the new one; what the longer text adds is the new one's."""

    def __init__(self, tokenizer: BaseTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT_TOKENS:])

    def feed(self, token_id: int) -> str:
        before = self._tokenizer.decode(self._window)
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)[len(before) :]
        self._window = self._window[-_CONTEXT_TOKENS:]
        return text

    def flush(self) -> str:
        return ""

"""An HTTP client that costs next to nothing: it shares the machine's cores with the server that it measures.

It runs on uvloop, which reads into one buffer; asyncio's own loop asks for another quarter of a megabyte for each read.
One protocol per connection: the request is one write, the answer's bytes are kept as they come and looked at only when
all requests have ended. One connection per request, closed by the server, so that the end of the stream is the end of
the answer and no framing need be read meanwhile. Both kinds of completions are understood: a JSON document, and a
stream of events.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop


class AnswerError(Exception):
    """The server answered otherwise than with the tokens asked for."""


@dataclass(frozen=True)
class Answer:
    """One HTTP answer, and when its parts came."""

    status: int
    body: bytes  # without chunk framing
    started: float  # when the request was sent; all times are `time.perf_counter()`
    arrivals: tuple[float, ...]  # of each read, the head's included

    @property
    def seconds(self) -> float:
        """From the request to the last byte."""
        return self.arrivals[-1] - self.started

    @property
    def longest_gap(self) -> float:
        """The longest time in which nothing came, after the first read."""
        return max((later - earlier for earlier, later in pairwise(self.arrivals)), default=0.0)

    def json(self) -> Any:
        """The body of an answer that is one document."""
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The documents of a streamed answer, in order, without the closing `[DONE]`."""
        lines = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        return [json.loads(line) for line in lines if line.strip() != b"[DONE]"]

    def completion_tokens(self) -> int:
        """Tokens that the usage of the answer counts. Raises `AnswerError` for an answer that is none."""
        return int(self._usage()["completion_tokens"])

    def cached_tokens(self) -> int:
        """Prompt tokens that the server says it had in its cache; 0 where it says nothing of them. Raises
        `AnswerError`."""
        return int((self._usage().get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    def _usage(self) -> dict[str, Any]:
        if self.status != 200:
            raise AnswerError(f"status {self.status}: {self.body.decode(errors='replace')[:500]}")
        is_stream = self.body.startswith(b"data: ")
        documents = self.events() if is_stream else [self.json()]
        usages = [document["usage"] for document in documents if document.get("usage")]
        if not usages:
            raise AnswerError(f"the answer ends without usage: {self.body.decode(errors='replace')[-500:]}")
        return cast(dict[str, Any], usages[-1])


def completion(model: str, prompt: Any, new_tokens: int, **fields: object) -> dict[str, Any]:
    """The body of `POST /v1/completions`: greedy, to the full length."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


def streamed(body: dict[str, Any]) -> dict[str, Any]:
    """The same request, answered event by event, with the usage at its end."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


async def post_all(url: str, path: str, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """All requests at once, the answers in their order."""
    requests = [_request(url, path, body) for body in bodies]  # before any is sent
    return await asyncio.gather(*(_send(url, request) for request in requests))


def complete_all(url: str, bodies: Sequence[dict[str, Any]]) -> tuple[float, list[Answer]]:
    """All completions at once: seconds from the first request to the last answer's end, and the answers.

    Raises `AnswerError` where one is not as long as was asked for.
    """
    started = time.perf_counter()
    answers = uvloop.run(post_all(url, "/v1/completions", bodies))
    seconds = max(answer.arrivals[-1] for answer in answers) - started
    for body, answer in zip(bodies, answers, strict=True):
        prompts = body["prompt"]
        wanted = body["max_tokens"] * (len(prompts) if isinstance(prompts[0], list) else 1)
        if answer.completion_tokens() != wanted:
            raise AnswerError(f"{answer.completion_tokens()} tokens instead of {wanted}")
    return seconds, answers


def _request(url: str, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def _send(url: str, request: bytes) -> Answer:
    address = urlsplit(url)
    assert address.hostname is not None, "a server's URL names its host"
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_connection(lambda: _Exchange(request), address.hostname, address.port or 80)
    return await protocol.answer


class _Exchange(asyncio.Protocol):
    """One request and its answer."""

    def __init__(self, request: bytes) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._request = request
        self._parts: list[bytes] = []
        self._arrivals: list[float] = []
        self._started = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._started = time.perf_counter()
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._arrivals.append(time.perf_counter())
        self._parts.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None or not self._parts:
            self.answer.set_exception(exc or AnswerError("the server closed the connection without an answer"))
            return
        status, body = _parse(b"".join(self._parts))
        self.answer.set_result(Answer(status, body, self._started, tuple(self._arrivals)))


def _parse(answer: bytes) -> tuple[int, bytes]:
    """Status and body of a whole HTTP/1.1 answer (RFC 9112)."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    headers = dict(line.lower().split(b":", 1) for line in lines[1:])
    if headers.get(b"transfer-encoding", b"").strip() == b"chunked":
        body = _unchunked(body)
    return int(lines[0].split()[1]), body


def _unchunked(framed: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        end = framed.index(b"\r\n", at)
        size = int(framed[at:end].split(b";")[0], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(framed[end + 2 : end + 2 + size])
        at = end + 2 + size + 2

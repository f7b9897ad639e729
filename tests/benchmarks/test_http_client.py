"""The benchmarks' HTTP client, against answers written by hand."""

from __future__ import annotations

import asyncio
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.http_client import AnswerError, complete_all, completion, post_all, streamed

USAGE = json.dumps({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}})


@contextmanager
def _server(answer: bytes, requests: list[bytes] | None = None) -> Iterator[str]:
    """A server that gives everybody the same bytes."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            lines = []
            while (line := self.rfile.readline().strip()) != b"":
                lines.append(line)
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            body = self.rfile.read(length)
            if requests is not None:
                requests.extend([lines[0], body])
            self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _document(body: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}".encode()


def _events(*documents: str, chunks: int) -> bytes:
    """A chunked event stream, cut into that many chunks wherever they fall."""
    text = "".join(f"data: {document}\n\n" for document in [*documents, "[DONE]"]).encode()
    size = -(-len(text) // chunks)
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n" + framed


def test_a_document_is_counted_by_its_usage() -> None:
    requests: list[bytes] = []
    with _server(_document(USAGE), requests) as url:
        seconds, answers = complete_all(url, [completion("base", [1, 2], 3)])
    assert requests[0] == b"POST /v1/completions HTTP/1.1"
    sent = json.loads(requests[1])
    assert sent["prompt"] == [1, 2]
    assert sent["temperature"] == 0
    assert sent["ignore_eos"] is True
    assert answers[0].completion_tokens() == 3
    assert answers[0].cached_tokens() == 0
    assert 0 < answers[0].seconds <= seconds


@pytest.mark.parametrize("chunks", [1, 7, 200])
def test_a_stream_is_put_together_from_its_chunks(chunks: int) -> None:
    event = json.dumps({"choices": [{"text": "é\n"}], "usage": None})
    with _server(_events(event, event, USAGE, chunks=chunks)) as url:
        _, answers = complete_all(url, [streamed(completion("base", [1, 2], 3))] * 2)
    for answer in answers:
        assert answer.events() == [json.loads(event), json.loads(event), json.loads(USAGE)]
        assert answer.completion_tokens() == 3


@pytest.mark.parametrize(
    ("details", "cached"), [(None, 0), ({}, 0), ({"cached_tokens": None}, 0), ({"cached_tokens": 2}, 2)]
)
def test_cached_tokens_are_those_that_the_usage_tells_of(details: object, cached: int) -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "prompt_tokens_details": details}
    with _server(_document(json.dumps({"choices": [], "usage": usage}))) as url:
        _, answers = complete_all(url, [completion("base", [1, 2], 3)])
    assert answers[0].cached_tokens() == cached


def test_a_request_of_many_prompts_wants_the_tokens_of_all() -> None:
    with _server(_document(USAGE)) as url, pytest.raises(AnswerError, match="3 tokens instead of 6"):
        complete_all(url, [completion("base", [[1], [2]], 3)])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (_document('{"error": "busy"}', "429 Too Many Requests"), "status 429.*busy"),
        (_document('{"choices": []}'), "without usage"),
        (b"", "without an answer"),
    ],
)
def test_a_failed_answer_is_no_measurement(answer: bytes, message: str) -> None:
    with _server(answer) as url, pytest.raises(AnswerError, match=message):
        complete_all(url, [completion("base", [1], 3)])


def test_answers_come_in_the_order_of_the_requests() -> None:
    with _server(_document(USAGE)) as url:
        answers = asyncio.run(post_all(url, "/v1/completions", [{"model": "a"}] * 5))
    assert [answer.status for answer in answers] == [200] * 5
